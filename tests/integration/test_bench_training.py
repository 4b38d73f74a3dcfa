"""How fast a configuration trains, by the loop's own rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ganscale.cli import main
from ganscale.training.benchmark import bench_training
from ganscale.world import World
from tests.conftest import MakeConfig


def test_a_configuration_is_trained_for_some_seconds_and_leaves_nothing(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    found = bench_training(make_config(), World(), seconds=4.0)
    assert found.precision == "fp32"
    assert found.peak_memory_gib is found.device_memory_gib is None
    a_step = 16 / found.images_per_second
    assert sum(found.parts.values()) == pytest.approx(a_step, rel=0.5)
    assert found.parts["discriminator"] > 0
    assert not [*tmp_path.iterdir()]


def test_thirty_steps_are_measured_however_short_the_time(make_config: MakeConfig) -> None:
    assert bench_training(make_config(), World(), seconds=0.001).num_rows >= 1


def test_the_verb_prints_and_writes_what_was_measured(
    procedural_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speed.json"
    with pytest.raises(SystemExit) as exit_:
        main(
            ["bench", "train", f"data.shards={procedural_shards}", "model.base_channels=4"]
            + ["--seconds", "4", "--json", str(out)]
        )
    assert exit_.value.code == 0
    assert "images/s" in capsys.readouterr().out
    assert json.loads(out.read_text())["images_per_second"] > 0
