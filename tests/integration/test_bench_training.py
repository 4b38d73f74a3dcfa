"""How fast a configuration trains, by the loop's own rows, and the ways to run it compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ganscale.cli import main
from ganscale.config import load_config
from ganscale.training import benchmark
from ganscale.training.benchmark import (
    Variant,
    bench_training,
    compare_variants,
    speed_variants,
)
from ganscale.world import World
from tests.conftest import MakeConfig

ONE_THREAD = Variant("one thread", {"launch.threads_per_worker": 1})
AGAIN = Variant("again", {"launch.threads_per_worker": 1})


def test_a_configuration_is_trained_for_some_seconds_and_leaves_nothing(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    # What keeps the best checkpoints is measured by none of what is put off.
    best = {
        "checkpoint__keep_best": 1,
        "checkpoint__best_metric": "fid",
        "evaluation__every_kimg": 1,
    }
    found = bench_training(make_config(**best), World(), seconds=2.0)
    assert found.precision == "fp32"
    assert found.peak_memory_gib is found.device_memory_gib is None
    a_step = 16 / found.images_per_second
    assert sum(found.parts.values()) == pytest.approx(a_step, rel=0.5)
    assert found.parts["discriminator"] > 0
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_thirty_steps_are_measured_however_short_the_time(make_config: MakeConfig) -> None:
    assert bench_training(make_config(), World(), seconds=0.001).num_rows >= 1


@pytest.mark.parametrize(
    ("preset", "steps"),
    [
        ("dcgan-cifar10", 10),
        ("sngan-cifar10", 10),  # 5 discriminator steps for one of the generator
        ("biggan-cifar10", 12),  # 4
        ("stylegan2-ada-cifar10", 16),  # a lazy penalty at every 16th
    ],
)
def test_each_row_has_as_many_costly_steps_as_the_others(preset: str, steps: int) -> None:
    assert benchmark._steps_in_a_row(load_config(preset, [])) == steps


def test_the_verb_prints_and_writes_what_was_measured(
    procedural_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speed.json"
    with pytest.raises(SystemExit) as exit_:
        main(
            ["bench", "train", f"data.shards={procedural_shards}", "model.base_channels=4"]
            + ["--seconds", "1", "--json", str(out)]
        )
    assert exit_.value.code == 0
    assert "images/s" in capsys.readouterr().out
    assert json.loads(out.read_text())["images_per_second"] > 0


@pytest.mark.slow
def test_variants_are_measured_in_turns_and_those_that_fail_say_why(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    refused = Variant("refused", {"training.discriminator_steps": 0})
    failing = Variant("failing", {"data.shards": str(tmp_path / "gone")})
    told: list[str] = []
    results = compare_variants(
        make_config(),
        World(),
        [ONE_THREAD, refused, failing, AGAIN],
        seconds=0.2,
        rounds=2,
        report=told.append,
    )
    assert told == [
        *(f"round 1 of 2: {name}" for name in ("one thread", "refused", "failing", "again")),
        *(f"round 2 of 2: {name}" for name in ("one thread", "again")),
    ]
    trained, refused_, failing_, again = [result.summary() for result in results]
    assert "discriminator_steps" in refused_["obstacle"]
    assert "gone" in failing_["obstacle"]
    assert refused_["images_per_second"] is failing_["images_per_second"] is None
    assert trained["ratio"] == 1
    assert trained["parts"]["generator"] > 0
    for first, second in zip(trained["rounds"], again["rounds"], strict=True):
        assert math.isfinite(first)
        assert math.isfinite(second)
    by_round = [b / a for a, b in zip(trained["rounds"], again["rounds"], strict=True)]
    assert again["ratio"] == pytest.approx(sum(by_round) / 2)


def test_a_gpu_is_compared_by_how_steps_are_launched_and_a_cpu_by_its_threads(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    names = [variant.name for variant in speed_variants(config, torch.device("cuda:0"))]
    assert names == ["launched", "captured", "captured, compiled"]
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    on_cpu = speed_variants(config, torch.device("cpu"))
    assert [variant.changes["launch.threads_per_worker"] for variant in on_cpu] == [1, 6, 1, 6]
    compiled = [variant.changes.get("training.compile") for variant in on_cpu]
    assert compiled == ["off", "off", "on", "on"]
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3})
    assert len(speed_variants(config, torch.device("cpu"))) == 2


def test_the_verb_compares(
    procedural_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without the compiled ones, which take a minute of a compiler's time.
    refused = Variant("refused", {"training.discriminator_steps": 0})
    monkeypatch.setattr(benchmark, "speed_variants", lambda config, device: [ONE_THREAD, refused])
    out = tmp_path / "speed.json"
    with pytest.raises(SystemExit) as exit_:
        main(
            ["bench", "train", "--compare", f"data.shards={procedural_shards}"]
            + ["model.base_channels=4", "penalty.r1=1"]
            + ["--seconds", "1", "--rounds", "1", "--json", str(out)]
        )
    assert exit_.value.code == 0
    report = json.loads(out.read_text())
    trained, refused_ = report["variants"]
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("quickstart  fp32  batch 64  cpu  medians of 1 round(s) of 1 s")
    assert f"{trained['images_per_second']:,.1f}" in table[2]
    assert f"{1000 * 64 / trained['images_per_second']:,.2f}" in table[2]
    assert f"{1000 * trained['parts']['discriminator']:,.2f}" in table[2]
    assert "discriminator_steps" in refused_["obstacle"]
    assert refused_["obstacle"].splitlines()[0] in table[3]
