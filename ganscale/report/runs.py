"""A run as its folder has it, whatever state the files are in.

Files may be missing, cut off, or of a run that is being written at this moment. What cannot be read
is left out; a configuration that is refused is shown as text with the reason.
"""

from __future__ import annotations

import json
import math
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Self, TypeGuard

from ganscale.config import Config, load_config
from ganscale.errors import ConfigError
from ganscale.json_lines import read_lines
from ganscale.run_directory import RunDirectory
from ganscale.tracking.history import BEGINNINGS, History, Row

_META = "checkpoints/nimg-*/meta.json"
_MAX_HEADER_BYTES = 2**20


@dataclass(frozen=True)
class Attempt:
    """One start of a run, by the event that began it and what followed."""

    begin: Row
    end_time: float
    """When it last wrote anything, in seconds since 1970."""

    @property
    def number(self) -> int:
        return int(self.begin["attempt"])

    @property
    def seconds(self) -> float:
        """How long it lasted."""
        return max(0.0, self.end_time - float(self.begin["time"]))


@dataclass(frozen=True)
class Run:
    """What the files of one run say. Rows and events are those that have the fields they need."""

    place: str
    """The folder as the user named it, for commands."""
    root: Path
    name: str
    """Differs between the runs of one report."""
    config: Config | None
    config_text: str
    config_problem: str
    rows: list[Row]
    """All rows that were written, in the order of the file."""
    events: list[Row]
    history: History
    """Without what later attempts have replaced."""

    @classmethod
    def read(cls, place: str) -> Self:
        """Raises `ConfigError` if the folder does not exist or holds runs instead of being one."""
        root = Path(place).expanduser().absolute()
        if "://" in place:
            raise ConfigError(f"{place}: copy the run's folder to this machine first")
        if not root.is_dir():
            raise ConfigError(f"no such folder: {place}")
        run_dir = RunDirectory(root)
        _refuse_folder_of_runs(place, run_dir)
        config, problem = None, ""
        if run_dir.config.is_file():
            try:
                config = load_config(run_dir.config)
            except ConfigError as error:
                problem = str(error)
        rows: list[Row] = [row for row in _objects(run_dir.metrics) if _is_placed(row)]
        events: list[Row] = [event for event in _objects(run_dir.events) if _is_event(event)]
        return cls(
            place=place.rstrip("/") or place,
            root=root,
            name=run_dir.name,
            config=config,
            config_text=_text(run_dir.config),
            config_problem=problem,
            rows=rows,
            events=events,
            history=History.of(rows, events),
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing of a run has been written yet."""
        return not (self.rows or self.events or self.config_text)

    @property
    def training_rows(self) -> list[Row]:
        """The rows that the training loop has written; evaluations afterwards write others."""
        return [row for row in self.history.rows if "step" in row]

    @cached_property
    def nimg(self) -> int:
        """The position that the run has reached."""
        placed = [*self.training_rows, *self.history.events]
        return max((int(line["nimg"]) for line in placed), default=0)

    @property
    def total_nimg(self) -> int | None:
        """The position at which the run is finished; None if that is unknown."""
        return None if self.config is None else self.config.total_nimg

    @property
    def shards(self) -> str | None:
        """Where the images are that it trains on; None if that is unknown."""
        if self.config is None or self.config.data.shards is None:
            return None
        return RunDirectory(self.root).moved(self.config.data.shards, self.config.storage)

    @cached_property
    def attempts(self) -> list[Attempt]:
        """In the order of their numbers."""
        begins = {e["attempt"]: e for e in self.events if e["event"] in BEGINNINGS}
        last = {number: float(begin["time"]) for number, begin in begins.items()}
        written = [(row["attempt"], row.get("time/unix")) for row in self.rows if "step" in row]
        # An evaluation afterwards, which has a protocol, is not part of the attempt's time.
        written += [
            (e["attempt"], e["time"])
            for e in self.events
            if _is_number(e.get("attempt")) and "protocol" not in e
        ]
        for number, time in written:
            if number in last and _is_number(time):
                last[number] = max(last[number], float(time))
        return [Attempt(begins[number], last[number]) for number in sorted(begins)]

    @property
    def seconds(self) -> float:
        """How long all attempts lasted together."""
        return sum(attempt.seconds for attempt in self.attempts)

    @property
    def last_time(self) -> float | None:
        """When the run last wrote a row or an event, in seconds since 1970."""
        times = [row.get("time/unix") for row in self.rows if "step" in row]
        times += [e["time"] for e in self.events if "protocol" not in e]
        return max((float(time) for time in times if _is_number(time)), default=None)

    @property
    def images_per_second(self) -> float | None:
        """The median of the rows; the mean would include a slow start."""
        speeds = [y for _, y in self.points("time/images_per_second") if math.isfinite(y)]
        return median(speeds) if speeds else None

    @cached_property
    def _series(self) -> dict[str, list[tuple[float, float]]]:
        """All columns in one pass: a day's run has a million values."""
        series: dict[str, list[tuple[float, float]]] = {}
        for row in self.history.rows:
            kimg = row["nimg"] / 1000
            for name, value in row.items():
                if name not in series:
                    series[name] = []
                is_usual = type(value) is float and math.isfinite(value)
                y = value if is_usual or _is_number(value) else math.nan
                series[name].append((kimg, y))
        return series

    @property
    def columns(self) -> list[str]:
        """Names in the rows, in the order in which they first appear."""
        return list(self._series)

    def of_kind(self, *kinds: str) -> list[Row]:
        """The events of some kinds, in the order of the file."""
        return [event for event in self.events if event["event"] in kinds]

    def points(self, name: str) -> list[tuple[float, float]]:
        """(kimg, value) of a column, by position; NaN where the value was not finite."""
        return self._series.get(name, [])

    def latest(self, name: str, nimg: float = math.inf) -> float | None:
        """The newest finite value of a column up to a position."""
        points = self.points(name)
        end = bisect_right(points, nimg / 1000, key=lambda point: point[0])
        return next((y for _, y in reversed(points[:end]) if math.isfinite(y)), None)

    @cached_property
    def evaluations(self) -> list[Row]:
        """Events of evaluations that hold metrics with their intervals and the protocol."""
        return [
            event
            for event in self.history.events
            if event["event"] == "evaluation" and isinstance(event.get("metrics"), Mapping)
        ]

    @cached_property
    def snapshots(self) -> list[Path]:
        """Oldest first."""
        return sorted(RunDirectory(self.root).snapshots.glob("nimg-*.safetensors"))

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint was written; it may also lie elsewhere."""
        return bool(self.of_kind("checkpoint")) or any(self.root.glob("checkpoints/nimg-*"))

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes by label, from the newest snapshot; empty without any."""
        if self.config is None or not self.config.generator_spec["num_classes"]:
            return []
        count = int(self.config.generator_spec["num_classes"])
        names = [str(name) for name in _snapshot_info(self.snapshots).get("classes", ())]
        return names if len(names) == count else [str(label) for label in range(count)]

    @cached_property
    def newest_meta(self) -> Mapping[str, Any]:
        """What the newest checkpoint says for people: versions and world; empty without any."""
        for path in sorted(self.root.glob(_META), reverse=True):
            with suppress(OSError, ValueError):
                meta = json.loads(path.read_bytes())
                if isinstance(meta, dict):
                    return meta
        return {}


def open_runs(places: Sequence[str]) -> list[Run]:
    """Read the runs of a report, and name those that have one name by their folders.

    Raises `ConfigError` if a folder is no run's, or is named twice.
    """
    runs = [Run.read(place) for place in places]
    if len({run.root for run in runs}) < len(runs):
        raise ConfigError("a run is named twice: name each once")
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else replace(run, name=run.place) for run in runs]


def _refuse_folder_of_runs(place: str, run_dir: RunDirectory) -> None:
    if any(path.exists() for path in (run_dir.config, run_dir.metrics, run_dir.events)):
        return
    inside = sorted(path.parent.name for path in run_dir.root.glob("*/config.yaml"))
    if inside:
        raise ConfigError(
            f"{place} holds runs and is none: name some of them, as in {place}/{inside[0]}"
        )


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    # Damaged files may hold lines that are valid JSON and no objects.
    lines: Iterable[Any] = read_lines(path)
    return (line for line in lines if isinstance(line, dict))


def _is_placed(line: Row) -> bool:
    return _is_number(line.get("nimg")) and _is_number(line.get("attempt"))


def _is_event(line: Row) -> bool:
    kind = line.get("event")
    if not isinstance(kind, str) or not _is_number(line.get("time")):
        return False
    # Events of the driver, such as a fault, belong to no attempt and have no position.
    needs_place = kind in BEGINNINGS or {"nimg", "attempt"} <= line.keys()
    return not needs_place or _is_placed(line)


def _is_number(value: Any) -> TypeGuard[float]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _snapshot_info(snapshots: Sequence[Path]) -> Mapping[str, Any]:
    """The description in the newest snapshot's header, which needs no torch to be read."""
    for path in reversed(snapshots):
        # 8 bytes with the length of the header, then the header as JSON.
        with suppress(OSError, ValueError, KeyError, TypeError, struct.error):
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, _MAX_HEADER_BYTES)))
            info = json.loads(header["__metadata__"]["ganscale"])
            if isinstance(info, dict):
                return info
    return {}
