"""What the benchmarks make of their measurements, by rows of known figures."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling, shared_fakes
from benchmarks.gpu import peers
from ganscale.run_directory import RunDirectory


def test_peers_are_compared_by_medians_over_rounds() -> None:
    common = {"section": "sngan", "precision": "fp16", "batch_size": 64, "discriminator_steps": 5}
    rows: list[dict[str, Any]] = [
        {**common, "side": side, "images_per_second": speed, "parameters": [4_304_387, 1_055_105]}
        for side, speeds in (("studiogan", (900, 1000, 5000)), ("ganscale", (8000, 2500, 100)))
        for speed in speeds
    ]
    rows += [
        {"section": "r3gan", "side": "r3gan", "error": "took longer than 300 s"},
        {**common, "section": "r3gan", "side": "ganscale", "images_per_second": 559}
        | {"parameters": [1, 2]},
    ]
    header, _, r3gan, sngan = peers.table(rows).splitlines()
    assert header.count("|") == sngan.count("|")
    assert "| 1,000 | 2,500 | 2.50 |" in sngan
    assert "fp16 4.30 / 1.06 M" in sngan
    assert "64 x 5" in sngan
    assert "| took longer than 300 s | 559 |  |" in r3gan


def scaling_row(form: str, speed: float, *, with_clocks: bool = False) -> dict[str, Any]:
    clocks = {
        "statistics_calls": 21.0,
        "statistics_seconds": 0.012,
        "statistics_bytes": 1e6,
        "gradients_seconds": 0.02,
        "gradients_bytes": 6e6,
        "exposed_seconds": 0.004,
    }
    process = {"step_seconds": 0.5, "collectives": clocks, "parts": {"data_wait": 0.003}}
    return {
        "form": form,
        "config": "dcgan-cifar10",
        "per_worker": 128,
        "with_clocks": with_clocks,
        "images_per_second": speed,
        "step_seconds": 0.5,
        "load_before": 0.1,
        "processes": [process],
    }


def test_efficiency_is_that_of_the_median_round() -> None:
    rows = [
        *(scaling_row("independent", 300.0), scaling_row("together", 294.0)),  # 98 %
        *(scaling_row("together", 240.0), scaling_row("independent", 300.0)),  # 80 %
        *(scaling_row("independent", 200.0), scaling_row("together", 194.0)),  # 97 %
        scaling_row("independent", 10.0, with_clocks=True),
        scaling_row("together", 10.0, with_clocks=True),
    ]
    text = scaling.table(rows)
    assert "| 300.0 | 240.0 | 80.0 % |" in text
    assert "median efficiency 97.0 %" in text
    made_of = "together, ms: step 500.0, waiting for data 3.0, 21 all-reduces of statistics 12.0"
    assert made_of in text
    assert "of these after the backward 4.0; 7.00 MB exchanged" in text


def test_a_distance_between_two_measurements_lies_on_a_power_law() -> None:
    points = [(1000, 80.0), (4000, 40.0), (16000, 20.0)]  # falls as the root of the images
    interpolated = shared_fakes.interpolated(points, 2000)
    assert interpolated == pytest.approx(80 / math.sqrt(2))
    assert shared_fakes.interpolated(points, 4000) == pytest.approx(40)
    assert shared_fakes.interpolated(points, 16001) is None
    assert shared_fakes.interpolated(points, 999) is None


def test_shared_fakes_are_compared_at_equal_images_and_at_equal_time(tmp_path: Path) -> None:
    for form, factor in (("separate", 1.0), ("shared", 1.1)):
        for seed in (0, 1):
            file = RunDirectory(tmp_path / f"quickstart-{form}-{seed}").metrics
            file.parent.mkdir(parents=True)
            # Twice the images halve the distance.
            rows = [{"nimg": n, "metrics/fd_x": factor * 1e6 / n} for n in (1000, 2000, 4000)]
            file.write_text("".join(json.dumps(row) + "\n" for row in [{"nimg": 500}, *rows]))
    speeds = [("separate", 100.0, [90.0, 110.0]), ("shared", 125.0, [112.5, 137.5])]
    variants = [
        {"variant": name, "images_per_second": speed, "rounds": rounds, "ratio": speed / 100}
        for name, speed, rounds in speeds
    ]
    row = {"config": "quickstart", "variants": variants}
    (tmp_path / "speeds.json").write_text(json.dumps(row) + "\n")
    arguments = argparse.Namespace(storage=tmp_path, configs=["quickstart"], seeds=[0, 1])
    text = shared_fakes.report(arguments)
    assert "shared is 1.250 times as fast (1.250 to 1.250 in 2 rounds)" in text
    # A quarter more images in the same time: 1.1 / 1.25.
    assert "| 1,000 | 1000, 1000 | 1100, 1100 | 1.100 | 0.880 |" in text
    assert "| 2,000 | 500, 500 | 550, 550 | 1.100 | 0.880 |" in text
    # Beyond the last measurement nothing is known.
    assert "| 4,000 | 250, 250 | 275, 275 | 1.100 |  |" in text
