"""Which lines of metrics.jsonl and events.jsonl are part of the run as it is now."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ganscale.run_directory import RunDirectory
from ganscale.tracking.history import History, effective


def line(attempt: int, nimg: int, **more: Any) -> dict[str, Any]:
    return {"attempt": attempt, "nimg": nimg, **more}


def places(lines: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    return [(row["attempt"], row["nimg"]) for row in lines]


def test_rows_after_the_position_that_a_later_attempt_starts_from_are_replaced() -> None:
    rows = [line(1, 100), line(1, 200), line(1, 300), line(2, 250), line(2, 350)]
    assert places(effective(rows, {1: 0, 2: 200})) == [(1, 100), (1, 200), (2, 250), (2, 350)]


def test_without_a_start_the_first_row_of_an_attempt_decides() -> None:
    rows = [line(1, 100), line(1, 200), line(1, 300), line(2, 200), line(2, 300)]
    assert places(effective(rows, {})) == [(1, 100), (2, 200), (2, 300)]


def test_what_a_superseded_attempt_writes_late_does_not_count() -> None:
    rows = [line(1, 100), line(2, 200), line(1, 200), line(1, 300)]
    assert places(effective(rows, {1: 0, 2: 100})) == [(1, 100), (2, 200)]


def test_a_third_attempt_from_before_the_second_replaces_both() -> None:
    rows = [line(1, 100), line(1, 200), line(2, 300), line(3, 150)]
    assert places(effective(rows, {1: 0, 2: 200, 3: 100})) == [(1, 100), (3, 150)]


def test_an_attempt_that_has_logged_nothing_yet_replaces_already() -> None:
    rows = [line(1, 100), line(1, 200)]
    assert places(effective(rows, {1: 0, 2: 100})) == [(1, 100)]


def test_an_attempt_from_the_beginning_replaces_everything() -> None:
    rows = [line(1, 0), line(1, 100), line(2, 100)]
    assert places(effective(rows, {1: 0, 2: -1})) == [(2, 100)]


def write(path: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in lines) + tail)


def test_a_run_is_read_with_its_starts_from_its_events(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path)
    write(
        run_dir.events,
        [
            line(1, 0, event="start"),
            line(1, 300, event="alarm", kind="stuck"),
            {"event": "fault", "message": "rank 0 is gone"},
            line(2, 200, event="rollback"),
        ],
    )
    rows = [line(1, 100, loss=1.0), line(1, 300, loss=3.0), line(2, 300, loss=None)]
    write(run_dir.metrics, rows, tail='{"nimg": 40')
    history = History.read(run_dir)
    assert places(history.rows) == [(1, 100), (2, 300)]
    assert [event["event"] for event in history.events] == ["start", "rollback"]
    assert history.series("loss") == [(100, 1.0)]
    assert history.series("absent") == []


def test_a_run_without_files_has_no_history(tmp_path: Path) -> None:
    assert History.read(RunDirectory(tmp_path)) == History([], [])
