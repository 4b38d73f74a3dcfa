"""Rows and events are whole lines of JSON, whatever an earlier writer left behind."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ganscale.json_lines import locked
from ganscale.run_directory import RunDirectory
from ganscale.tracking.live_view import RunFollower
from ganscale.tracking.logs import log_event, log_row, to_stderr
from ganscale.tracking.sinks import EventLog, FaultCounts, JsonlSink, NullSink, Sinks


def lines(path: Path) -> list[str]:
    text = path.read_text()
    assert text.endswith("\n")
    return text.splitlines()


def test_each_row_is_a_complete_line_before_log_returns(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    rows = [{"step": n, "nimg": 64 * n, "train/loss_G": n / 3} for n in range(4)]
    for count, row in enumerate(rows, start=1):
        sink.log(row)
        assert [json.loads(line) for line in lines(path)] == rows[:count]
    sink.close()


def test_a_later_writer_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        sink = JsonlSink(path)
        sink.log({"step": step})
        sink.close()
    assert lines(path) == ['{"step": 1}', '{"step": 2}']


@pytest.mark.parametrize("part", ['{"step": 2, "tra', "x" * 200_000])
def test_the_part_of_a_line_that_a_kill_left_is_cut_off(tmp_path: Path, part: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + part)
    sink = JsonlSink(path)
    sink.log({"step": 3})
    sink.close()
    assert lines(path) == ['{"step": 1}', '{"step": 3}']


def test_a_line_that_another_process_is_writing_is_not_cut_off(tmp_path: Path) -> None:
    """It holds the lock until the line is complete."""
    path = tmp_path / "events.jsonl"
    opened: list[EventLog] = []
    opening = threading.Thread(target=lambda: opened.append(EventLog(path)))
    with path.open("a") as file:
        with locked(file):
            file.write('{"event": "fa')
            file.flush()
            opening.start()
            opening.join(0.2)
            file.write('ult"}\n')
            file.flush()
        opening.join()
        opened[0].write("waiting")
        opened[0].close()
    assert [json.loads(line)["event"] for line in lines(path)] == ["fault", "waiting"]


def test_opening_alone_changes_no_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    JsonlSink(path).close()
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_becomes_null(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log({"step": 1, "train/loss_D": value, "train/loss_G": 0.5})
    sink.close()
    assert lines(path) == ['{"step": 1, "train/loss_D": null, "train/loss_G": 0.5}']


def test_events_carry_time_name_and_fields(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    before = time.time()
    log = EventLog(path)
    log.write("start", nimg=0, device="cpu")
    log.write("end", nimg=128)
    rows = [json.loads(line) for line in lines(path)]
    log.close()
    assert [set(row) for row in rows] == [
        {"time", "event", "nimg", "device"},
        {"time", "event", "nimg"},
    ]
    assert [row["event"] for row in rows] == ["start", "end"]
    assert before - 0.001 <= rows[0]["time"] <= rows[1]["time"] <= time.time() + 0.001


def test_a_full_disk_names_the_file_of_rows() -> None:
    sink = JsonlSink(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left") as error:
        sink.log({"step": 1})
    assert error.value.filename == "/dev/full"
    with suppress(OSError):  # what could not be written is tried once more
        sink.close()


class Recorder:
    """A sink that remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def begin(self, rows: Any, events: Any) -> None:
        self.calls.append((rows, events))

    def log(self, row: Any) -> None:
        self.calls.append(dict(row))

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        self.calls.append((name, path, nimg, step))

    def event(self, event: Any) -> None:
        self.calls.append(event)

    def close(self) -> None:
        self.calls.append("close")


def test_several_sinks_get_the_same() -> None:
    first, second = Recorder(), Recorder()
    sinks = Sinks(first, NullSink(), second)
    alarm = {"event": "alarm", "message": "the loss of D is nan"}
    sinks.begin([{"step": 0}], [alarm])
    sinks.log({"step": 1})
    sinks.log_picture("samples", Path("a.png"), nimg=64, step=1)
    sinks.event(alarm)
    sinks.close()
    assert first.calls == [
        ([{"step": 0}], [alarm]),
        {"step": 1},
        ("samples", Path("a.png"), 64, 1),
        alarm,
        "close",
    ]
    assert second.calls == first.calls


def test_faults_are_counted_and_other_events_are_not() -> None:
    counts = FaultCounts()
    assert [counts.add({"event": kind}) for kind in ("alarm", "checkpoint", "alarm", "skip")] == [
        True,
        False,
        True,
        True,
    ]
    assert [counts[kind] for kind in ("alarm", "checkpoint", "skip", "stall")] == [2, 0, 1, 0]


def test_a_worker_logs_one_line_with_run_rank_and_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("ganscale")
    before = (logger.handlers, logger.level, logger.propagate)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    to_stderr("faces", 3)
    try:
        log_event({"event": "stall", "step": 41, "ranks": [2]}, "faces", 3)
        log_event({"event": "checkpoint", "step": 42, "nimg": 64}, "faces", 3)
        log_row({"step": 43, "nimg": 128, "train/loss_D": 0.25}, "faces", 3)
        warnings.showwarning("odd", UserWarning, "file.py", 1)
    finally:
        logger.handlers, logger.level, logger.propagate = before
    lines = [line.split(" ", 2)[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        'WARNING run=faces rank=3 step=41 stall: {"ranks": [2]}',
        'INFO run=faces rank=3 step=42 checkpoint: {"nimg": 64}',
        "INFO run=faces rank=3 step=43 nimg=128 train/loss_D=0.25",
        "WARNING run=faces rank=3 step=- UserWarning: odd",
    ]


def test_the_follower_shows_rows_that_come_after_half_a_line(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path)
    shown = io.StringIO()
    row = {
        "step": 2,
        "nimg": 128,
        "time/images_per_second": 50.0,
        "train/loss_D": float("nan"),
        "train/loss_G": 0.75,
        "train/loss_scale_D": 1.0,
        "train/loss_scale_G": 1.0,
        "train/skips_D": 0,
        "train/skips_G": 0,
    }
    with RunFollower(run_dir, 1000, Console(file=shown, width=200)):
        run_dir.metrics.write_text('{"step": 1, "nim')
        sink = JsonlSink(run_dir.metrics)
        sink.log(row)
        sink.close()
    assert "loss D not finite  G 0.750" in shown.getvalue()
