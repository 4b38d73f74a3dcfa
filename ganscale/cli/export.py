"""The command that writes a generator as a file to give away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ganscale.atomic_files import write_text
from ganscale.cli.app import app
from ganscale.cli.options import Snapshot
from ganscale.errors import ConfigError

Format = Literal["safetensors", "torch-export", "onnx"]

_SUFFIXES: dict[Format, str] = {
    "safetensors": ".safetensors",
    "torch-export": ".pt2",
    "onnx": ".onnx",
}


@app.command(
    epilog="Example: ganscale export runs/r3gan-small --out cifar10.safetensors    "
    "For other programs: ganscale export runs/r3gan-small --format onnx --out cifar10.onnx"
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
    licence: Annotated[str | None, typer.Option(help="Of the weights, such as CC0-1.0.")] = None,
) -> None:
    """Write a generator to give away, with a card beside it: NAME.safetensors and NAME.md.

    Its images are compared with those of the snapshot. `sample` and all others take a
    .safetensors file; graphs run where this package is not installed.
    """
    from ganscale.generation.export import export_generator
    from ganscale.generation.generator import Generator
    from ganscale.generation.graph_export import export_onnx, export_program, graph_usage
    from ganscale.generation.model_card import card_text, usage_of
    from ganscale.generation.snapshot import snapshot_file

    if out.suffix != (suffix := _SUFFIXES[file_format]):
        raise ConfigError(f"--out {out}: expected a name that ends in {suffix}")
    snapshot = snapshot_file(path)
    if snapshot.resolve() == out.resolve():
        raise ConfigError(f"--out {out} is the snapshot itself: choose another name")
    generator = Generator.from_pretrained(snapshot)
    about = generator.about(licence)
    if file_format == "safetensors":
        difference = export_generator(generator, out, about=about)
        precision, usage = "in half precision", usage_of(out.name)
    else:
        export_graph = export_program if file_format == "torch-export" else export_onnx
        difference = export_graph(generator, out, about=about)
        precision, usage = "in full precision", graph_usage(generator, out)
    size, card = f"{out.stat().st_size / 1e6:.2f} MB", out.with_suffix(".md")
    file = f"{size} {precision}; {difference}"
    text = card_text(out.stem, generator, snapshot, about=about, file=file, usage=usage)
    write_text(card, text)
    typer.echo(f"wrote {out} ({size}) and {card}")
    typer.echo(str(difference))
