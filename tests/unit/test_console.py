"""Progress of long work: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import ast
import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

import ganscale
from ganscale.tracking import console as console_module
from ganscale.tracking.console import counting, progress_bars, stderr_console


def test_without_a_terminal_a_task_that_reports_nothing_still_prints_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console_module, "_LINE_SECONDS", 0.01)
    shown = io.StringIO()
    with progress_bars(Console(file=shown, width=200, markup=False)) as start_task:
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
    with counting("building /data/[a] [/b] :100:", 4, terminal) as advance:
        advance(4)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert "100%" in text
    assert "building /data/[a] [/b] :100:" in text
    assert "(4)" not in text


def test_what_looks_like_markup_or_emoji_in_an_error_is_printed_as_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = "[/__w/pytorch/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.1]:100: [red]"
    stderr_console().print(error, highlight=False, soft_wrap=True)
    assert capsys.readouterr().err == f"{error}\n"


def test_no_console_of_the_package_interprets_markup_or_emoji() -> None:
    """rich raises an error at what a message of gloo begins with, which would end the run."""
    made = [
        (path.name, {keyword.arg: keyword.value for keyword in node.keywords})
        for path in Path(ganscale.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id == "Console"
    ]
    assert len(made) >= 5
    for name, options in made:
        for option in ("markup", "emoji"):
            stated = options.get(option)
            assert isinstance(stated, ast.Constant), (name, option)
            assert stated.value is False, (name, option)
