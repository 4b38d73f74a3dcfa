"""Print columns of runs' metrics at some positions, and draw them as curves.

    python docs/tutorial/curves.py runs/a runs/b --columns train/loss_G train/grad_norm_G \
      --at 4 8 16 --out curves.png

A run's `metrics.jsonl` has a row for each thousand of images or so. `--at` takes the rows nearest
to these positions in kimg. The names of the columns are explained in docs/reference/log-keys.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import ganscale

_LOGARITHMIC = ("grad_norm", "penalty")
"""Parts of the names of columns whose values span orders of magnitude."""


def print_table(tables: dict[str, Any], columns: Sequence[str], positions: Sequence[float]) -> None:
    """Print a line for each run and column, with its values at the positions."""
    run_width = max(map(len, ("run", *tables))) + 2
    column_width = max(map(len, columns)) + 2
    header = "".join(f"{f'{kimg:g} kimg':>10}" for kimg in positions)
    print(f"{'run':{run_width}}{'column':{column_width}}{header}")
    for name, table in tables.items():
        for column in columns:
            rows = table.dropna(subset=[column])
            nearest = [(rows.nimg - 1000 * kimg).abs().idxmin() for kimg in positions]
            values = "".join(f"{rows[column][row]:10.4g}" for row in nearest)
            print(f"{name:{run_width}}{column:{column_width}}{values}")


def draw(tables: dict[str, Any], columns: Sequence[str], path: Path) -> None:
    """Draw a panel for each column with a curve for each run, beside one another."""
    figure = Figure(figsize=(4.2 * len(columns), 3.2), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        for name, table in tables.items():
            rows = table.dropna(subset=[column])
            axes.plot(rows.nimg / 1000, rows[column], label=name)
        if any(part in column for part in _LOGARITHMIC):
            axes.set_yscale("log")
        axes.set_title(column.removeprefix("train/"))
        axes.set_xlabel("kimg")
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Print and draw columns of runs' metrics.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--columns", nargs="+", required=True)
    parser.add_argument("--at", nargs="+", type=float, required=True, metavar="KIMG")
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    """Read the command line, then print and draw."""
    arguments = build_parser().parse_args()
    tables = {path.name: ganscale.Run(path).metrics for path in arguments.runs}
    print_table(tables, arguments.columns, arguments.at)
    if arguments.out:
        draw(tables, arguments.columns, arguments.out)


if __name__ == "__main__":
    main()
