"""What the terminal shows of a run's rows, whatever the method."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from ganscale.tracking import console as console_module
from ganscale.tracking.console import counting, describe_row, progress_bars

PLAYERS: dict[str, tuple[dict[str, float | None], str, str]] = {
    "gan": ({"D": 0.5, "G": 2.25}, "loss_D  0.500  loss_G  2.250", "1/1"),
    "vae": ({"G": 0.125}, "loss_G  0.125", "1"),
    "encoder": ({"D": None, "E": 1.0}, "loss_D not finite  loss_E  1.000", "1/1"),
}


@pytest.mark.parametrize("method", PLAYERS)
def test_a_row_names_the_losses_that_the_method_has(method: str) -> None:
    losses, shown, scales = PLAYERS[method]
    row: dict[str, float | None] = {"nimg": 1000, "time/images_per_second": 500.0}
    for letter, loss in losses.items():
        row |= {f"train/loss_{letter}": loss, f"train/loss_scale_{letter}": 1.0}
        row[f"train/skips_{letter}"] = 0
    assert describe_row(row, 31_000) == f"   500 img/s  ETA 0:01:00  {shown}  scale {scales}"


def test_without_a_terminal_a_task_that_reports_nothing_still_prints_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console_module, "_LINE_SECONDS", 0.01)
    shown = io.StringIO()
    with progress_bars(Console(file=shown, width=200)) as start_task:
        start_task("features of [real] images", 50)(20)
        while shown.getvalue().count("20 of 50 (40%) after 0:00:0") < 3:
            time.sleep(0.001)
        start_task("comparing", None)
        while "comparing: 0 done after" not in shown.getvalue():
            time.sleep(0.001)
    lines = shown.getvalue().splitlines()
    assert lines[0] == "features of [real] images (50)"
    assert "comparing" in lines
    at_end = shown.getvalue()
    time.sleep(0.05)
    assert shown.getvalue() == at_end


def test_lines_of_a_task_are_at_most_half_a_minute_apart() -> None:
    assert console_module._LINE_SECONDS <= 30


def test_on_a_terminal_a_task_is_a_bar_and_no_line() -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, width=80, force_terminal=True)
    with counting("building", 4, terminal) as advance:
        advance(4)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert "100%" in text
    assert "building (4)" not in text
