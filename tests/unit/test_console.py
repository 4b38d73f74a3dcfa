"""Progress of long work: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from ganscale.tracking import console as console_module
from ganscale.tracking.console import counting, progress_bars


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
