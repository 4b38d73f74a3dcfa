"""A sweep on the terminal: a table that changes, or a line for each result; and the last table."""

from __future__ import annotations

import math
import shlex
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ganscale.config.sweep import Population, Sweep
from ganscale.launch.sweep_book import Book, Standing

__all__ = ["SweepDisplay", "best_command", "ranked", "sweep_table"]


class SweepDisplay(AbstractContextManager["SweepDisplay"]):
    """Shows the standings while the block runs."""

    def __init__(self, book: Book, console: Console) -> None:
        self._book = book
        self._console = console
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(sweep_table(book), console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.update(sweep_table(self._book), refresh=True)
            self._live.stop()

    def refresh(self, trial: str) -> None:
        """Something has changed; `trial` has a result, unless it is empty."""
        if self._live is not None:
            self._live.update(sweep_table(self._book))
        elif trial:
            standing = self._book.standings[trial]
            text = f"{trial}  {standing.kimg:9g} kimg  {_score(standing)}  {standing.state}"
            told = f"{text}: {standing.message}" if standing.message else text
            self._console.print(told, highlight=False, soft_wrap=True)


def ranked(book: Book) -> list[Standing]:
    """Best first by the last value of the metric; those without one last."""
    sign = -1.0 if book.sweep.file.mode == "max" else 1.0

    def key(standing: Standing) -> tuple[float, int]:
        return (
            math.inf if standing.score is None else sign * standing.score,
            standing.number,
        )

    return sorted(book.standings.values(), key=key)


def sweep_table(book: Book) -> Table:
    """The standings, best first."""
    file = book.sweep.file
    table = Table(box=None, pad_edge=False)
    for column in ("trial", "state", "kimg", file.metric, *file.search):
        table.add_column(column, no_wrap=True)
    if isinstance(file.scheduler, Population):
        table.add_column("copied", no_wrap=True)
    for standing in ranked(book):
        values = [_short(standing.values[name]) for name in file.search]
        cells = [standing.name, standing.state, f"{standing.kimg:g}", _score(standing), *values]
        table.add_row(*cells, standing.source)
    return table


def best_command(book: Book) -> str | None:
    """The command that trains as the best trial did, or goes on with it; None without results.

    Values of a population's trial have changed on its way, so there is no command that repeats it.
    """
    best = ranked(book)[0]
    if best.score is None:
        return None
    sweep = book.sweep
    if isinstance(sweep.file.scheduler, Population):
        total = 2 * sweep.base.training.total_kimg
        return f"ganscale resume {sweep.root / best.name} training.total_kimg={total:g}"
    fields = {**sweep.file.overrides, **sweep.settings(best.values)}
    words = [f"{name}={_flow(value)}" for name, value in fields.items()]
    command = ["ganscale", "train", "--config", sweep.source, f"name={best.name}-again", *words]
    return shlex.join(command)


def settings_text(sweep: Sweep, values: dict[str, Any]) -> str:
    """Values as they would be given on the command line."""
    return "  ".join(f"{name}={_flow(v)}" for name, v in sweep.settings(values).items())


def _score(standing: Standing) -> str:
    return "-" if standing.score is None else f"{standing.score:.6g}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flow(value: Any) -> str:
    """In YAML, on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("...\n").strip()
