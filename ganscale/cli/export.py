"""The command that writes a generator as a file to give away."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from ganscale import __version__
from ganscale.cli.app import app
from ganscale.cli.options import Snapshot
from ganscale.errors import ConfigError

__all__: list[str] = []

_PROTOCOL = (
    "extractor",
    "num_samples",
    "reference",
    "num_reference",
    "reference_statistics",
    "extractor_digest",
)


@app.command(
    epilog="Example: ganscale export runs/r3gan-small --out cifar10.safetensors --evaluation "
    "evaluation.json"
)
def export(
    path: Snapshot,
    out: Annotated[Path, typer.Option(help="A name that ends in .safetensors.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(help="What `evaluate --json` wrote of this snapshot, for the card."),
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Of the weights, such as CC0-1.0.")] = None,
    max_difference: Annotated[
        float,
        typer.Option(min=0, help="Largest change of a value that rounding may make, 0 to 255."),
    ] = 8.0,
) -> None:
    """Write a generator in half precision, with a card beside it: NAME.safetensors and NAME.md.

    Its images are compared with those of the snapshot. `sample` and all others take the file.
    """
    from ganscale.evaluation.run_references import containing_run
    from ganscale.generation.export import export_generator, write_card
    from ganscale.generation.snapshot import load_generator, snapshot_file

    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a name that ends in .safetensors")
    snapshot = snapshot_file(path)
    if snapshot.resolve() == out.resolve():
        raise ConfigError(f"--out {out} is the snapshot itself: choose another name")
    about: dict[str, Any] = _measured(evaluation, snapshot)
    if licence is not None:
        about["licence"] = licence
    about["exported"] = f"{date.today().isoformat()} by ganscale {__version__}"
    generator = load_generator(snapshot)
    difference = export_generator(generator, out, about=about, max_difference=max_difference)
    run_dir = containing_run(snapshot)
    recipe = None if run_dir is None else _recipe(run_dir.config)
    write_card(out, generator, about=about, difference=difference, recipe=recipe)
    typer.echo(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB) and {out.with_suffix('.md')}")
    typer.echo(str(difference))


def _measured(file: Path | None, snapshot: Path) -> dict[str, Any]:
    """The metrics of the snapshot and their protocol, from a file of `evaluate --json`."""
    if file is None:
        return {}
    try:
        values = json.loads(file.read_text())
        protocol = values["protocol"]
        metrics = {name: value["value"] for name, value in values["metrics"].items()}
        kept = {name: protocol[name] for name in _PROTOCOL}
        samples = protocol["samples"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--evaluation {file} is not what ganscale evaluate --json wrote"
        ) from None
    # Figures of another snapshot on the card would be believed.
    of_file = re.fullmatch(r"\d+ samples of (.*), seeds from \d+", samples)
    if of_file is None or Path(of_file[1]).resolve() != snapshot.resolve():
        raise ConfigError(f"--evaluation {file} is of {samples}, not of {snapshot}")
    return {"metrics": metrics, "protocol": kept}


def _recipe(config: Path) -> dict[str, Any]:
    """The sections of a run's configuration that decide what is learnt."""
    from ganscale.config import load_config

    sections = ("model", "method", "objective", "penalty", "augment", "optimizer", "training")
    values = load_config(config).model_dump(mode="json")
    return {name: values[name] for name in ("seed", *sections)}
