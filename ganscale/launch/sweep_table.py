"""A sweep on the terminal: a table that changes, or a line for each report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ganscale.config.sweep import Population, Sweep
from ganscale.launch.sweep_status import TrialStatus


@contextmanager
def displayed(
    sweep: Sweep, statuses: Sequence[TrialStatus], console: Console
) -> Iterator[Callable[[TrialStatus], None]]:
    """Show how the trials stand while the block runs; yields what takes a trial that has reported
    or ended."""

    def print_line(status: TrialStatus) -> None:
        line = f"{status.name}  {status.kimg:9g} kimg  {_score(status)}  {status.state}"
        line += f": {status.message}" if status.message else ""
        console.print(line, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield print_line
        return
    with Live(get_renderable=lambda: sweep_table(sweep, statuses), console=console):
        yield lambda status: None


def ranked(sweep: Sweep, statuses: Sequence[TrialStatus]) -> list[TrialStatus]:
    """Best first by the last value of the metric; those without one last."""
    sign = -1.0 if sweep.file.mode == "max" else 1.0
    return sorted(statuses, key=lambda s: math.inf if s.score is None else sign * s.score)


def sweep_table(sweep: Sweep, statuses: Sequence[TrialStatus]) -> Table:
    """A row for each trial, best first."""
    table = Table(box=None, pad_edge=False)
    is_population = isinstance(sweep.file.scheduler, Population)
    for column in ("trial", "state", "kimg", sweep.file.metric, *sweep.file.search):
        table.add_column(column, no_wrap=True)
    if is_population:
        table.add_column("copied", no_wrap=True)
    for status in ranked(sweep, statuses):
        cells = [status.name, status.state, f"{status.kimg:g}", _score(status)]
        for name in sweep.file.search:
            value = status.values[name]
            cells.append(f"{value:.4g}" if isinstance(value, float) else str(value))
        table.add_row(*cells, *([status.source] if is_population else []))
    return table


def _score(status: TrialStatus) -> str:
    return "-" if status.score is None else f"{status.score:.6g}"
