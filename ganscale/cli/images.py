"""The command that draws images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ganscale.cli.app import app, write_json
from ganscale.cli.options import Device, JsonFile, Label, Seed, Snapshot, TruncationPsi
from ganscale.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ganscale.generation.sample_plan import PlannedImage
    from ganscale.generation.sampler import SampleableGenerator


_TEXT_KEYWORD = "ganscale"
_NUM_PRINTED = 64


@app.command(
    epilog="Example: ganscale sample runs/quickstart --num 64 --seed 0 --out grid.png    "
    "A row a class: ganscale sample runs/r3gan-small --per-class 8 --best-of 4 --out classes.png"
)
def sample(
    path: Snapshot,
    num: Annotated[int, typer.Option(min=1, help="How many images.")] = 64,
    seed: Seed = 0,
    out: Annotated[
        Path,
        typer.Option(
            help="A grid as .png or .jpg, an array as .npy, or a folder for single images."
        ),
    ] = Path("samples.png"),
    label: Label = None,
    per_class: Annotated[
        int | None,
        typer.Option(
            min=1, help="Draw this many images of every class, a row per class; replaces --num."
        ),
    ] = None,
    best_of: Annotated[
        int,
        typer.Option(
            min=1,
            help="Draw this many candidates for each image, with consecutive seeds, and keep the "
            "one that the run's discriminator rates most real.",
        ),
    ] = 1,
    truncation_psi: TruncationPsi = None,
    scale: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=16,
            help="Magnify a grid so many times; by default so that it fills a screen.",
        ),
    ] = None,
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Draw images from a snapshot; a seed's image is always the same.

    Arrays of floats are drawn in colours in a grid; .npy files hold them in their own units. The
    text of a PNG says which seed and class each image has.
    """
    from ganscale.evaluation.best_of import best_images, run_discriminator
    from ganscale.generation.latent_sampler import LatentSampler
    from ganscale.generation.pictures import GRID_FORMATS, check_format, grid_columns
    from ganscale.generation.sample_plan import describe_samples, plan_per_class, plan_samples
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
    _check_classes(generator, label, per_class)
    if per_class is None:
        columns = grid_columns(num)
        plan = plan_samples(
            num,
            seed=seed,
            num_candidates=best_of,
            num_classes=generator.num_classes,
            label=label,
        )
    else:
        columns = per_class
        plan = plan_per_class(
            per_class, seed=seed, num_candidates=best_of, num_classes=generator.num_classes
        )
    sampler = LatentSampler(generator, truncation_psi=truncation_psi)
    judged: dict[str, Any] = {}
    if best_of == 1:
        seeds = [image.seeds[0] for image in plan]
        labels = [image.label for image in plan if image.label is not None]
        images = sampler.sample_seeds(seeds, label=labels or None)
    else:
        pair = run_discriminator(path, generator)
        best = best_images(sampler, pair.discriminator, plan)
        images, seeds = best.images, best.seeds
        judged = {"best_of": best_of, "discriminator": pair.name, "logits": best.logits}
        typer.echo(f"judged by the discriminator of {pair.name}", err=True)
    summary = describe_samples(plan, seeds, columns=columns, info=generator.info) | judged
    if truncation_psi is not None:
        summary["truncation_psi"] = truncation_psi
    # Where a seed does not decide the class of its image, the name of a file has to say it.
    other_classes = per_class is not None or (best_of > 1 and label is None)
    _write(images, out, generator, plan, summary, scale=scale, name_classes=other_classes)
    write_json(json_file, summary)
    if best_of > 1 and len(seeds) <= _NUM_PRINTED:
        typer.echo(f"kept seeds {' '.join(map(str, seeds))}")
    typer.echo(f"wrote {len(images)} images to {out}")


def _check_classes(
    generator: SampleableGenerator, label: int | None, per_class: int | None
) -> None:
    """Raise `ConfigError` if the generator does not know the classes that are asked for."""
    if label is not None and per_class is not None:
        raise ConfigError(f"--label {label} is one class and --per-class shows all: omit one")
    option = f"--label {label}" if per_class is None else f"--per-class {per_class}"
    if (label, per_class) != (None, None) and not generator.num_classes:
        name = option.partition(" ")[0]
        raise ConfigError(f"{option}: this generator takes no labels: omit {name}")
    if label is not None and label >= generator.num_classes:
        raise ConfigError(f"{option}: expected a class of 0 to {generator.num_classes - 1}")


def _write(
    images: Tensor,
    out: Path,
    generator: SampleableGenerator,
    plan: list[PlannedImage],
    summary: dict[str, Any],
    *,
    scale: int | None,
    name_classes: bool,
) -> None:
    """Write images (n, C, H, W) as the suffix of `out` says."""
    from ganscale.generation.pictures import (
        GRID_FORMATS,
        as_pictures,
        save_grid,
        write_array,
        write_picture,
    )

    suffix = out.suffix.lower()
    if suffix in GRID_FORMATS:
        text = {_TEXT_KEYWORD: json.dumps(summary)}
        pictures = as_pictures(images, generator.values)
        columns = summary["columns"]
        names: list[str] = summary.get("classes", [])[::columns]
        # A row a class, where each is one; with other columns a row has several classes.
        rows = names if summary.get("classes") == [n for n in names for _ in range(columns)] else []
        save_grid(pictures, out, columns=columns, scale=scale, rows=rows, text=text)
        return
    if suffix == ".npy":
        write_array(images, out)
        return
    for image, planned, seed in zip(images, plan, summary["seeds"], strict=True):
        # The name says how to draw the image again.
        name = f"seed-{seed:08d}"
        if name_classes and planned.label is not None:
            name = f"class-{planned.label:03d}-{name}"
        if generator.values.dtype == "uint8":
            write_picture(image, out / f"{name}.png")
        else:
            write_array(image, out / f"{name}.npy")
