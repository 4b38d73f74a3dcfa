"""The command that writes a generator as a file to give away."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ganscale import __version__
from ganscale.cli.app import app
from ganscale.cli.options import Snapshot
from ganscale.errors import ConfigError

__all__: list[str] = []

Format = Literal["safetensors", "torch-export", "onnx"]

_SUFFIXES: dict[Format, str] = {
    "safetensors": ".safetensors",
    "torch-export": ".pt2",
    "onnx": ".onnx",
}


@app.command(
    epilog="Example: ganscale export runs/r3gan-small --out cifar10.safetensors --evaluation "
    "evaluation.json    For other programs: ganscale export runs/r3gan-small --format onnx --out "
    "cifar10.onnx"
)
def export(
    path: Snapshot,
    out: Annotated[
        Path, typer.Option(help="A name that ends in .safetensors, .pt2 or .onnx, as the format.")
    ],
    file_format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="safetensors in half precision for ganscale; a graph for torch.export.load; or "
            "ONNX, which needs ganscale[onnx].",
        ),
    ] = "safetensors",
    evaluation: Annotated[
        Path | None,
        typer.Option(help="What `evaluate --json` wrote of this snapshot, for the card."),
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Of the weights, such as CC0-1.0.")] = None,
    max_difference: Annotated[
        float,
        typer.Option(
            min=0,
            help="Largest change of a value that rounding to half precision may make, 0 to 255.",
        ),
    ] = 8.0,
) -> None:
    """Write a generator to give away, with a card beside it: NAME.safetensors and NAME.md.

    Its images are compared with those of the snapshot. `sample` and all others take a
    .safetensors file; graphs run where this package is not installed.
    """
    from ganscale.generation.export import export_generator, write_card
    from ganscale.generation.graph_export import export_onnx, export_program, graph_usage
    from ganscale.generation.model_card import recipe_of, recorded_evaluation, usage_of
    from ganscale.generation.snapshot import load_generator, snapshot_file
    from ganscale.run_directory import containing_run

    if out.suffix != (suffix := _SUFFIXES[file_format]):
        raise ConfigError(f"--out {out}: expected a name that ends in {suffix}")
    snapshot = snapshot_file(path)
    if snapshot.resolve() == out.resolve():
        raise ConfigError(f"--out {out} is the snapshot itself: choose another name")
    generator = load_generator(snapshot)
    about: dict[str, Any] = dict(generator.info.get("about", {}))
    if evaluation is not None:
        about |= _measured(evaluation, snapshot)
    elif "metrics" not in about:
        about |= recorded_evaluation(snapshot, generator.info["nimg"])
    if licence is not None:
        about["licence"] = licence
    about["exported"] = f"{date.today().isoformat()} by ganscale {__version__}"
    if file_format == "safetensors":
        difference = export_generator(generator, out, about=about, max_difference=max_difference)
        precision, usage = "in half precision", usage_of(out.name)
    else:
        export_graph = export_program if file_format == "torch-export" else export_onnx
        difference = export_graph(generator, out, about=about)
        precision, usage = "in full precision", graph_usage(generator, out)
    run_dir = containing_run(snapshot)
    write_card(
        out,
        generator,
        about=about,
        file=f"{precision}; {difference}",
        usage=usage,
        recipe=None if run_dir is None else recipe_of(run_dir),
    )
    typer.echo(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB) and {out.with_suffix('.md')}")
    typer.echo(str(difference))


def _measured(file: Path, snapshot: Path) -> dict[str, Any]:
    """The metrics of the snapshot and their protocol, from a file of `evaluate --json`."""
    from ganscale.generation.model_card import evaluation_summary

    try:
        values = json.loads(file.read_text())
        summary = evaluation_summary(values)
        samples = values["protocol"]["samples"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--evaluation {file} is not what ganscale evaluate --json wrote"
        ) from None
    # Figures of another snapshot on the card would be believed.
    of_file = re.fullmatch(r"\d+ samples of (.*), seeds from \d+", samples)
    if of_file is None or Path(of_file[1]).resolve() != snapshot.resolve():
        raise ConfigError(f"--evaluation {file} is of {samples}, not of {snapshot}")
    return summary
