"""What a sweep remembers: sweep.jsonl in its folder, one line for each thing that has happened.

Ray Tune's own state is of no use to go on from: it leaves out what its schedulers know, and is
written in place, so a kill may cut it short. Here a line is complete or is none, what a scheduler
decided is in the line of the result that it decided on, and a population's copies are planned in
one line before the first is made. One process writes: the one that runs the sweep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ganscale.config.sweep import Sweep
from ganscale.errors import ConfigError
from ganscale.json_lines import read_lines
from ganscale.tracking.sinks import EventLog

__all__ = ["OVER", "Book", "Copy", "Standing"]

OVER = ("finished", "stopped")
"""States of trials that are not taken up again; `failed` ones and interrupted ones are."""

_MAY_GROW = ("trials", "max_concurrent")


@dataclass(frozen=True)
class Copy:
    """A trial takes over another's weights with other values; `kimg` is the round's position."""

    kimg: float
    target: str
    source: str
    values: dict[str, Any]


@dataclass
class Standing:
    """How a trial is."""

    name: str
    number: int
    values: dict[str, Any]
    state: str = "waiting"
    """waiting, running, paused, finished, stopped (by the scheduler), failed, interrupted."""
    kimg: float = 0.0
    """Position of its last result; 0 before the first."""
    score: float | None = None
    """The metric there; None if it was no number."""
    message: str = ""
    source: str = ""
    """The trial that it last copied."""


@dataclass
class Book:
    """The standings of a sweep, and the file that they come from."""

    sweep: Sweep
    standings: dict[str, Standing] = field(default_factory=dict)
    results: list[tuple[str, float, float | None]] = field(default_factory=list)
    """(trial, kimg, metric) in the order in which they came."""
    round_kimg: float = 0.0
    """Position of the population's last round."""
    copies: list[Copy] = field(default_factory=list)
    """Those that are planned and not known to be made."""

    def __post_init__(self) -> None:
        self.path = self.sweep.root / "sweep.jsonl"
        for trial in self.sweep.trials():
            standing = Standing(trial.name, trial.number, dict(trial.values))
            self.standings[trial.name] = standing
        for row in read_lines(self.path):
            self._take_up(row)
        for standing in self.standings.values():
            if standing.state in ("running", "paused"):
                standing.state = "interrupted"
        self._log: EventLog | None = None

    def open(self) -> None:
        """Begin to write. Raises `ConfigError` if the folder is that of another sweep."""
        _check_same(self.sweep)
        self._log = EventLog(self.path)
        self._write("start", trials=len(self.standings))

    def close(self) -> None:
        """Close the file."""
        if self._log is not None:
            self._log.close()

    @property
    def unfinished(self) -> list[Standing]:
        """The trials that are still to run, first to last."""
        return [s for s in self.standings.values() if s.state not in OVER]

    def started(self, trial: str) -> None:
        """A trial runs; not written, as its folder tells."""
        self.standings[trial].state = "running"

    def paused(self, trial: str) -> None:
        """A trial waits for the others of the population."""
        self.standings[trial].state = "paused"

    def result(self, trial: str, kimg: float, score: float | None, state: str) -> bool:
        """A result, and what became of the trial by it; returns whether it is news."""
        standing = self.standings[trial]
        is_news = kimg > standing.kimg or state in OVER
        if is_news:
            self._write("result", trial=trial, kimg=kimg, score=score, state=state)
        return is_news

    def ended(self, trial: str, state: str, message: str = "") -> None:
        """A trial failed or was interrupted."""
        self._write("ended", trial=trial, state=state, message=message)

    def plan(self, kimg: float, copies: Sequence[Copy], scores: Mapping[str, float | None]) -> None:
        """A round of the population: who is to copy whom, with which values."""
        planned = [
            {"target": c.target, "source": c.source, "values": c.values, "before": self._values(c)}
            for c in copies
        ]
        self._write("round", kimg=kimg, scores=dict(scores), copies=planned)

    def copied(self, copy: Copy, checkpoint: str) -> None:
        """A planned copy has been made; `checkpoint` is the trial's own."""
        self._write(
            "copy",
            kimg=copy.kimg,
            trial=copy.target,
            source=copy.source,
            checkpoint=checkpoint,
            values=copy.values,
        )

    def _values(self, copy: Copy) -> dict[str, Any]:
        """What the source has."""
        return self.standings[copy.source].values

    def _write(self, event: str, **fields: Any) -> None:
        assert self._log is not None
        self._take_up(self._log.write(event, **fields))

    def _take_up(self, row: dict[str, Any]) -> None:
        """What a line says, as it is written or read again."""
        kind, standing = row["event"], self.standings.get(row.get("trial", ""))
        if kind == "round":
            self.round_kimg = row["kimg"]
            self.copies = [
                Copy(row["kimg"], copy["target"], copy["source"], copy["values"])
                for copy in row["copies"]
            ]
        if standing is None:
            return
        if kind == "result":
            self.results.append((standing.name, row["kimg"], row["score"]))
            standing.kimg, standing.score = row["kimg"], row["score"]
            standing.state, standing.message = row["state"], ""
        elif kind == "ended":
            standing.state, standing.message = row["state"], row["message"]
        elif kind == "copy":
            self.copies = [copy for copy in self.copies if copy.target != standing.name]
            standing.values, standing.source = dict(row["values"]), row["source"]


def _check_same(sweep: Sweep) -> None:
    """Leave the sweep's description in its folder, or compare with the one that is there."""
    path = sweep.root / "sweep.yaml"
    now = {
        "sweep": sweep.file.model_dump(mode="json"),
        "base": sweep.base.model_dump(mode="json"),
    }
    text = yaml.safe_dump(now, sort_keys=False)
    if path.is_file():
        before, now = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(text)
        changed = [name for name in _changed(before, now) if name not in _MAY_GROW]
        if before["sweep"]["trials"] is not None and sweep.file.trials is not None:
            changed += ["fewer trials"] * (sweep.file.trials < before["sweep"]["trials"])
        if changed:
            raise ConfigError(
                f"{sweep.root} holds a sweep with other settings ({', '.join(changed)}): choose "
                "another name, or remove the folder"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary: Path = path.with_name(".sweep.yaml.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of what differs, of the file or of a section of the base."""
    return [
        name
        for part in now
        for name in now[part]
        if before.get(part, {}).get(name) != now[part][name]
    ]
