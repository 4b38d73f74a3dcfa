"""Gray images and arrays of floats, from their files to samples in their own units."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ganscale
from ganscale.config import Config
from ganscale.data.order import Order
from ganscale.data.reader import BatchReader, ShardImages
from ganscale.data.shard_cache import CachedStore
from ganscale.data.shards import ShardSet
from ganscale.data.values import ValueRange
from ganscale.errors import ConfigError
from ganscale.run_directory import RunDirectory
from ganscale.storage import ObjectStore
from ganscale.training.loop import train
from ganscale.world import World, process_group
from tests.conftest import MakeConfig, Verb
from tests.support.http_server import serving
from tests.support.runs import final_digest, read_rows


@pytest.fixture(autouse=True)
def alone() -> Any:
    with process_group(World()):
        yield


def trained(make_config: MakeConfig, shards: Path, **changes: Any) -> Config:
    config = make_config(
        data__shards=str(shards),
        model__img_channels=1,
        training__total_kimg=0.048,
        samples__every_kimg=0.016,
        **changes,
    )
    train(config, World())
    return config


def digest_of_an_epoch(shard_set: ShardSet, images: ShardImages) -> str:
    order = Order([s.num_samples for s in shard_set.shards], num_streams=7, window=9, seed=2)
    reader, found = BatchReader(shard_set, order, images, rank=0, world_size=1), hashlib.sha256()
    for position in range(0, shard_set.num_samples, 50):
        found.update(reader.read(position, 50).images.numpy().tobytes())
    return found.hexdigest()


def test_arrays_come_over_the_network_as_from_the_disk(
    spectrogram_shards: Path, tmp_path: Path
) -> None:
    local = ShardSet.load(spectrogram_shards)
    expected = digest_of_an_epoch(local, ShardImages(local))
    shutil.copytree(spectrogram_shards, tmp_path / "served")
    with serving(tmp_path / "served") as server:
        remote = ShardSet.load(server.url)
        assert remote.values == local.values
        assert isinstance(remote.store, ObjectStore)
        store = CachedStore(remote.store, remote.shards, tmp_path / "cache", None)
        for images in (ShardImages(remote), ShardImages(remote, store)):
            assert digest_of_an_epoch(remote, images) == expected


def test_arrays_are_trained_on_resumed_exactly_and_sampled_in_their_own_units(
    make_config: MakeConfig, spectrogram_shards: Path, verb: Verb, tmp_path: Path
) -> None:
    values = ShardSet.load(spectrogram_shards).values
    whole = trained(make_config, spectrogram_shards)
    parts = whole.with_changes({"name": "parts", "training.total_kimg": 0.032})
    train(parts, World())
    train(parts.with_changes({"training.total_kimg": 0.048}), World())
    assert final_digest(parts) == final_digest(whole)
    row = read_rows(RunDirectory(whole.run_dir).metrics)[-1]
    assert 0 < row["metrics/diversity"] < 255
    with Image.open(RunDirectory(whole.run_dir).sample_grid(48)) as grid:
        assert grid.mode == "RGB"
        red, _, blue = grid.split()
        assert red.tobytes() != blue.tobytes()  # in colours

    generator = ganscale.Generator.from_pretrained(whole.run_dir)
    assert generator.values == values
    expected = generator.sample(5, seed=3)
    assert expected.dtype == torch.float32
    assert values.low <= expected.min() < expected.max() <= values.high
    for out in ("all.npy", "folder", "grid.png"):
        options = ("--num", 5, "--seed", 3, "--out", tmp_path / out)
        code, _, err = verb("sample", whole.run_dir, *options)
        assert code == 0, err
    assert np.array_equal(np.load(tmp_path / "all.npy"), expected.numpy())
    assert np.array_equal(np.load(tmp_path / "folder" / "seed-00000007.npy"), expected[4].numpy())
    code, _, err = verb(
        "interpolate", whole.run_dir, "--frames", 2, "--out", tmp_path / "strip.png"
    )
    assert code == 0, err

    code, out, err = verb(
        "shards", "build", "--source", tmp_path / "folder", "--out", tmp_path / "again",
        "--num-shards", 1, "--value-range", -80, 0,
    )  # fmt: skip
    assert code == 0, err
    assert "5, 1x32x32 float32" in out
    assert "-80 to 0 (-1 and 1 to the networks)" in out
    again = ShardSet.load(tmp_path / "again")
    assert again.values == ValueRange("float32", -80, 0)
    found = ShardImages(again).read(np.arange(5)).pixels
    assert {array.numpy().tobytes() for array in found} == {a.numpy().tobytes() for a in expected}


def test_what_is_only_for_images_refuses_arrays(
    make_config: MakeConfig, spectrogram_shards: Path, verb: Verb, tmp_path: Path
) -> None:
    config = trained(make_config, spectrogram_shards)
    RunDirectory(config.run_dir).config.write_text(config.to_yaml())
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    np.save(arrays / "one.npy", np.zeros((32, 32), np.float32))
    for arguments in (
        ("evaluate", "--run", config.run_dir, "--num", 8),
        ("evaluate", "--images", arrays, "--reference", spectrogram_shards),
        ("evaluate", "--images", arrays, "--reference", arrays),
        ("nearest", config.run_dir, "--reference", spectrogram_shards, "--out", tmp_path / "x.png"),
        ("reconstruct", config.run_dir, "--images", spectrogram_shards,
         "--out", tmp_path / "x"),
    ):  # fmt: skip
        code, _, err = verb(*arguments)
        assert code in (1, 2), arguments
        assert "arrays of floats" in err, (arguments, err)
        assert err.count("\n") == 1
    with pytest.raises(ConfigError, match=r"every_kimg=1, but .* arrays of floats"):
        train(config.with_changes({"name": "evaluated", "evaluation.every_kimg": 1}), World())


def test_an_encoder_s_generator_must_mean_the_same_by_its_values(
    make_config: MakeConfig, spectrogram_shards: Path, tmp_path: Path
) -> None:
    config = trained(make_config, spectrogram_shards)
    shard_set = ShardSet.load(spectrogram_shards)
    other = tmp_path / "other"
    shutil.copytree(spectrogram_shards, other)
    replace(shard_set, values=ValueRange("float32", -70, 0)).save(other)
    encoder = config.with_changes(
        {"name": "encoder", "method": {"name": "encoder", "generator": str(config.run_dir)}}
    )
    with pytest.raises(ConfigError, match=r"build the set with the same --value-range"):
        train(encoder.with_changes({"data.shards": str(other)}), World())
    train(encoder, World())
    assert final_digest(encoder)[0] == 48


def test_gray_images_are_trained_on_sampled_and_evaluated(
    make_config: MakeConfig, verb: Verb, tmp_path: Path
) -> None:
    gray = tmp_path / "gray"
    code, out, err = verb(
        "shards", "build", "--source", "procedural", "--limit", 60, "--num-shards", 2,
        "--img-channels", 1, "--out", gray,
    )  # fmt: skip
    assert code == 0, err
    assert "60, 1x32x32 uint8" in out
    config = trained(
        make_config, gray, augment={"name": "ada", "p": 0.5}, evaluation__every_kimg=0.048,
        evaluation__num_images=100, evaluation__metrics=["prdc"],
        evaluation__extractor="efficientnet-lite0",
    )  # fmt: skip
    row = read_rows(RunDirectory(config.run_dir).metrics)[-1]
    assert math.isfinite(row["metrics/precision_efficientnet_lite0"])
    with Image.open(RunDirectory(config.run_dir).sample_grid(48)) as grid:
        pixels = np.asarray(grid.convert("RGB"))
        assert (pixels == pixels[..., :1]).all()  # gray

    code, _, err = verb("sample", config.run_dir, "--num", 60, "--out", tmp_path / "samples")
    assert code == 0, err
    expected = ganscale.Generator.from_pretrained(config.run_dir).sample(60)
    with Image.open(tmp_path / "samples" / "seed-00000059.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), expected[59, 0].numpy())
    figures = tmp_path / "figures.json"
    code, _, err = verb(
        "evaluate", "--images", tmp_path / "samples", "--reference", gray,
        "--metrics", "prdc,c2st_1nn", "--json", figures,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(figures.read_text())
    assert found["protocol"]["num_samples"] == 60
    assert 0 <= found["metrics"]["c2st_1nn_efficientnet_lite0"]["value"] <= 1
