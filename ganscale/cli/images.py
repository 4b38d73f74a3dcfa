"""The command that draws images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ganscale.cli.app import app
from ganscale.cli.options import Device, Label, Snapshot, TruncationPsi
from ganscale.errors import ConfigError

__all__: list[str] = []


@app.command(epilog="Example: ganscale sample runs/quickstart --num 64 --seed 0 --out grid.png")
def sample(
    path: Snapshot,
    num: Annotated[int, typer.Option(min=1, help="How many images.")] = 64,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first image; each next one is 1 higher.")
    ] = 0,
    out: Annotated[
        Path,
        typer.Option(
            help="A grid as .png or .jpg, an array as .npy, or a folder for single images."
        ),
    ] = Path("samples.png"),
    label: Label = None,
    truncation_psi: TruncationPsi = None,
    device: Device = "cpu",
) -> None:
    """Draw images from a snapshot; a seed's image is always the same.

    Arrays of floats are drawn in colours in a grid; .npy files hold them in their own units.
    """
    from ganscale.generation.latent_sampler import LatentSampler
    from ganscale.generation.pictures import (
        GRID_FORMATS,
        as_pictures,
        check_format,
        save_grid,
        write_array,
        write_picture,
    )
    from ganscale.generation.snapshot import load_generator

    suffix = out.suffix.lower()
    if suffix and suffix not in (*GRID_FORMATS, ".npy") and not out.is_dir():
        raise ConfigError(
            f"--out {out}: unknown suffix {out.suffix!r}; expected {', '.join(GRID_FORMATS)}, "
            ".npy, or a folder, which has none"
        )
    generator = load_generator(path, device=device)
    # Before images are drawn, which may take long.
    check_format(out, generator.info["model"]["img_channels"])
    if label is not None and label >= generator.num_classes:
        if not generator.num_classes:
            raise ConfigError(f"--label {label}: this generator takes no labels: omit --label")
        raise ConfigError(f"--label {label}: expected a class of 0 to {generator.num_classes - 1}")
    sampler = LatentSampler(generator, truncation_psi=truncation_psi)
    images = sampler.sample_seeds(list(range(seed, seed + num)), label=label)
    if suffix in GRID_FORMATS:
        save_grid(as_pictures(images, generator.values), out)
    elif suffix == ".npy":
        write_array(images, out)
    else:
        for offset, image in enumerate(images):
            # The name says how to draw the image again.
            name = f"seed-{seed + offset:08d}"
            if generator.values.dtype == "uint8":
                write_picture(image, out / f"{name}.png")
            else:
                write_array(image, out / f"{name}.npy")
    typer.echo(f"wrote {num} images to {out}")
