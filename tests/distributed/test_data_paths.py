"""Training does not notice how its images are kept, and skips damage alike on any workers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ganscale.config import Config
from ganscale.data.shards import ShardSet
from ganscale.run_directory import RunDirectory
from ganscale.training.loop import train
from ganscale.world import World, process_group
from tests.conftest import MakeConfig
from tests.support.ranks import run_ranks
from tests.support.runs import final_digest, read_rows


def _train(world: World, config: Config) -> None:
    train(config, world)


def trained(config: Config, world_size: int, **changes: Any) -> Config:
    named = config.with_changes({**changes, "launch.num_workers": world_size})
    run_ranks(world_size, _train, named)
    return named


CACHES = ["none", "ram", "device"]
ARRAYS: dict[str, Any] = {"model.img_channels": 1, "training.total_kimg": 0.72}


@pytest.mark.parametrize(
    ("shards", "changes", "world_size", "caches"),
    [
        ("procedural_shards", {}, 2, ["none", "ram"]),
        pytest.param("spectrogram_shards", ARRAYS, 1, ["none", "device"], marks=pytest.mark.slow),
        pytest.param("procedural_shards", {}, 2, ["none", "device"], marks=pytest.mark.slow),
        pytest.param("procedural_shards", {}, 1, CACHES, marks=pytest.mark.slow),
        pytest.param("spectrogram_shards", ARRAYS, 2, CACHES, marks=pytest.mark.slow),
    ],
)
def test_final_weights_are_equal_bit_for_bit_whatever_the_cache(
    request: pytest.FixtureRequest,
    make_config: MakeConfig,
    shards: str,
    changes: dict[str, Any],
    world_size: int,
    caches: list[str],
) -> None:
    place = str(request.getfixturevalue(shards))
    config = make_config(data__shards=place, training__total_kimg=1.04)  # two epochs and a bit
    config = config.with_changes(changes)
    ends = {
        cache: final_digest(
            trained(config, world_size, name=f"{cache}-{world_size}", **{"data.cache": cache})
        )
        for cache in caches
    }
    assert len(set(ends.values())) == 1, ends


@pytest.fixture
def damaged_shards(procedural_shards: Path, tmp_path: Path) -> Path:
    """A copy with a flipped bit in five samples and one shard gone."""
    root = tmp_path / "damaged"
    shutil.copytree(procedural_shards, root)
    shard_set = ShardSet.load(root)
    for span in shard_set.spans(np.arange(50, 300, 50)):
        data = bytearray((root / span.name).read_bytes())
        data[span.start + span.length // 2] ^= 4
        (root / span.name).write_bytes(data)
    (root / shard_set.shards[-1].name).unlink()
    return root


def _losses(config: Config) -> torch.Tensor:
    rows = read_rows(RunDirectory(config.run_dir).metrics)
    return torch.tensor([[row["train/loss_D"], row["train/loss_G"]] for row in rows])


def _skipped(config: Config) -> list[str]:
    events = read_rows(RunDirectory(config.run_dir).events)
    return sorted(s for event in events if event["event"] == "skip" for s in event["samples"])


def test_damaged_samples_are_skipped_alike_on_any_number_of_workers(
    make_config: MakeConfig, damaged_shards: Path
) -> None:
    config = make_config(
        data__shards=str(damaged_shards),
        data__on_error="skip",
        optimizer__lr=1e-5,
        training__total_kimg=0.496,
    )
    one, *others = [trained(config, w, name=f"w{w}") for w in (1, 2, 3)]
    num_gone = ShardSet.load(damaged_shards).shards[-1].num_samples
    assert num_gone + 4 <= len(_skipped(one)) <= num_gone + 5  # 496 of 500 samples are read
    rows = read_rows(RunDirectory(one.run_dir).metrics)
    assert sum(row["data/num_skipped"] for row in rows) == len(_skipped(one))
    for other in others:
        assert _skipped(other) == _skipped(one)
        torch.testing.assert_close(_losses(other), _losses(one), rtol=1e-3, atol=0)


def test_damage_ends_the_run_by_default_naming_the_sample(
    make_config: MakeConfig, damaged_shards: Path
) -> None:
    config = make_config(data__shards=str(damaged_shards), training__total_kimg=0.496)
    with pytest.raises(RuntimeError, match=r"DamagedSample: .*shard-000\d\d.tar: sample \d+ at"):
        trained(config, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["ram", "device"])
def test_a_run_on_cuda_is_the_same_bit_for_bit_whatever_the_cache(
    make_config: MakeConfig, cache: str
) -> None:
    world, ends = World(device="cuda:0"), []
    for kept in ("none", cache):
        config = make_config(name=kept, data__cache=kept, training__total_kimg=1.04)
        with process_group(world):
            train(config, world)
        ends.append(final_digest(config))
    assert ends[0] == ends[1]
