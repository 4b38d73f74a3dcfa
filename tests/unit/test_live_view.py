"""What a run looks like on a terminal, and in the lines where there is none."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ganscale.cli.app import _GROUPS, app
from ganscale.config import Config
from ganscale.run_directory import RunDirectory
from ganscale.tracking import live_view
from ganscale.tracking.live_view import (
    RunFollower,
    RunStatus,
    describe_event,
    describe_row,
    view,
)
from ganscale.tracking.sinks import WRONG
from tests.conftest import Verb

LOSSES: dict[str, tuple[dict[str, float | None], str]] = {
    "gan": ({"D": 0.5, "G": 2.25}, "D 0.500  G 2.250"),
    "vae": ({"G": 0.125}, "G 0.125"),
    "encoder": ({"D": None, "E": 1.0}, "D not finite  E 1.000"),
}
START = {"event": "start", "time": 0.0, "nimg": 0, "world_size": 2, "device": "cpu"} | {
    "precision": "fp32",
    "wandb": "offline",
}


def row_of(nimg: int, losses: Any = None, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"nimg": nimg, "time/images_per_second": 500.0, **more}
    for letter, loss in (losses or {"D": 1.0, "G": 1.0}).items():
        row |= {f"train/loss_{letter}": loss, f"train/loss_scale_{letter}": 1.0}
        row[f"train/skips_{letter}"] = 0
    return row


def shown(status: RunStatus, width: int, now: float = 100.0) -> str:
    console = Console(file=io.StringIO(), width=width, record=True, markup=False)
    console.print(view(status, now=now))
    return console.export_text()


@pytest.mark.parametrize("method", LOSSES)
def test_a_row_names_the_losses_that_the_method_has(method: str) -> None:
    losses, expected = LOSSES[method]
    status = RunStatus("mine", 31_000)
    status.take_row(row_of(1000, losses))
    assert describe_row(status, {}) == (
        f"1 of 31 kimg  3%  500 images/s  0:01:00 left  loss {expected}"
    )


@pytest.mark.parametrize(
    ("losses", "expected"),
    [({}, "cross-entropy 0.728"), ({"D": 0.5, "G": 2.0}, "D 0.500  G 2.000  cross-entropy 0.728")],
)
def test_a_classifier_shows_its_loss(losses: dict[str, float], expected: str) -> None:
    row = {"nimg": 1000, "time/images_per_second": 500.0, "train/cross_entropy": 0.7277}
    row |= {f"train/loss_{letter}": loss for letter, loss in losses.items()}
    status = RunStatus("mine", 31_000)
    status.take_row(row)
    assert describe_row(status, {}).endswith(f"left  loss {expected}")


def test_scales_and_skips_appear_where_they_say_something() -> None:
    status = RunStatus("mine", 2000)
    status.take_row({**row_of(1000), "train/loss_scale_D": 1024.0, "train/skips_G": 3})
    assert describe_row(status, {}).endswith("D 1.000  G 1.000  scale 1024/1  skips 0/3")


@pytest.mark.parametrize("width", [80, 160])
def test_the_view_has_progress_speed_metrics_checkpoint_and_state(width: int) -> None:
    status = RunStatus("mine", 40_000)
    assert "starting" in shown(status, width)
    status.take_event(START)
    parts = {"time/discriminator_seconds": 0.06, "time/generator_seconds": 0.04}
    status.take_row(row_of(10_000, **{"metrics/fid": 50.0, "time/evaluation_seconds": 9.0}))
    status.take_row(row_of(20_000, **{"metrics/fid": 60.0, "metrics/kid": 0.01, **parts}))
    status.take_event({"event": "checkpoint", "nimg": 19_968, "time": 30.0})
    text = shown(status, width)
    assert "mine  training  2 workers, cpu, fp32, W&B offline" in text
    assert "50%  20 of 40 kimg  0:00:40 left" in text
    assert "500 images/s, 100 ms a step (discriminator 60%, generator 40%)" in text
    assert "fid 60 at 20 kimg (best 50)" in text
    assert "kid 0.01 at 20 kimg" in text
    assert "19.968 kimg, 0:01:10 ago" in text
    assert max(map(len, text.splitlines())) <= width
    status.take_event({"event": "fault", "message": "rank 1 is gone", "time": 1.0})
    assert "mine  restarting" in shown(status, width)
    status.take_event({"event": "end", "time": 2.0})
    assert "mine  finished" in shown(status, width)
    assert "left" not in shown(status, width)


@pytest.mark.parametrize("kind", WRONG)
def test_whatever_went_wrong_is_shown(kind: str) -> None:
    more: dict[str, dict[str, Any]] = {
        "stall": {"step": 7, "seconds": 130.0, "ranks": [1], "stacks": "the [/dev/x] reason"},
        "alarm": {"kind": "collapse", "action": "warn"},
    }
    message = "the [/dev/x] reason"
    event = {"event": kind, "time": 1.0, "nimg": 2000, "message": message, **more.get(kind, {})}
    text = describe_event(event)
    assert text is not None
    assert "the [/dev/x] reason" in text
    status = RunStatus("mine", 40_000)
    status.take_event(START)
    status.take_event(event)
    assert "the [/dev/x] reason" in shown(status, 200)


def test_a_run_that_says_nothing_for_long_shows_since_when() -> None:
    status = RunStatus("mine", 40_000)
    status.take_event(START)
    status.take_row(row_of(1000, **{"time/unix": 40.0}))
    assert "last row" not in shown(status, 80, now=100.0)
    assert "0:05:00 ago" in shown(status, 80, now=340.0)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDirectory:
    config = Config().with_changes(
        {"name": "mine", "storage": str(tmp_path), "training.total_kimg": 96.0}
    )
    config.run_dir.mkdir()
    run_dir = RunDirectory(config.run_dir)
    run_dir.config.write_text(config.to_yaml())
    return run_dir


def append(path: Path, *rows: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_without_a_terminal_there_is_a_line_each_twentieth_and_each_measurement(
    run_dir: RunDirectory,
) -> None:
    text = io.StringIO()
    total = 96_000
    with RunFollower(run_dir, total, Console(file=text, width=200)):
        append(run_dir.events, START)
        rows = [row_of(1000 * (i + 1)) for i in range(96)]
        rows[42]["metrics/fid"] = 12.5
        append(run_dir.metrics, *rows)
    lines = text.getvalue().splitlines()
    assert lines[0] == "start at 0 kimg: 2 workers, cpu, fp32, W&B offline"
    assert lines[1].startswith("1 of 96 kimg  1%")
    assert any(line.startswith("43 of 96") and line.endswith("fid 12.5") for line in lines)
    assert lines[-1].startswith("96 of 96 kimg  100%")
    assert len(lines) <= 3 + 20 + 1


def test_without_a_terminal_half_a_minute_is_never_without_a_line(
    run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    lines = live_view._Lines(10**9)
    due = [lines.is_due(row_of(1 + i), {}) for i in range(10)]
    assert due == [True, False, False] * 3 + [True]


def test_watch_shows_a_run_from_its_first_line_to_its_end(run_dir: RunDirectory) -> None:
    failed = {"event": "evaluation_failed", "time": 1.0, "nimg": 24_000}
    append(run_dir.events, START, {**failed, "message": "too few images"})
    append(run_dir.metrics, row_of(48_000, **{"metrics/fid": 12.5}))
    runner = CliRunner()
    once = runner.invoke(app, ["watch", str(run_dir.root), "--once"])
    assert once.exit_code == 0
    assert "mine  training" in once.stdout
    assert "the generator at 24 kimg could not be measured: too few images" in once.stdout
    assert "fid 12.5 at 48 kimg" in once.stdout
    append(run_dir.events, {"event": "end", "time": 9.0, "nimg": 96_000})
    ended = runner.invoke(app, ["watch", str(run_dir.root)])  # it does not wait for more
    assert "mine  finished" in ended.stdout


def test_watch_ends_with_an_error_when_the_run_is_dead(
    run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch, verb: Verb
) -> None:
    monkeypatch.setattr("ganscale.cli.training._STATUS_SECONDS", 0.0)
    fault = {"event": "fault", "time": 2.0, "message": "rank 1 is gone"}
    append(run_dir.events, START, fault)
    append(run_dir.metrics, row_of(1000, **{"time/unix": 1.0}))
    root = run_dir.root.rename(run_dir.root.with_name("my run"))
    code, _, errors = verb("watch", root)
    assert code == 1
    assert errors == (
        f"ganscale: {root} does not train any more (failed): Rank 1 is gone. "
        f"To go on: ganscale resume '{root}'\n"
    )


def test_every_verb_is_in_one_group_of_the_help() -> None:
    listed = [name for names in _GROUPS.values() for name in names]
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    groups = {str(group.name) for group in app.registered_groups}
    assert sorted(listed) == sorted({name.replace("_", "-") for name in commands | groups})
