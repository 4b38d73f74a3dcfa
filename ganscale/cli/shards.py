"""Commands for shard sets."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ganscale.cli.app import app, stderr_console
from ganscale.cli.options import Fit, Layout, Scale, Split
from ganscale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ganscale.data.shards import ShardSet


_ValueRange = Annotated[
    tuple[float, float] | None,
    typer.Option(
        help="Arrays of floats: the values that networks see as -1 and 1; default: the extremes."
    ),
]

_NumStreams = Annotated[
    int | None,
    typer.Option(min=1, help="The most workers that can read it; default: shards, at most 64."),
]
_ClassNames = Annotated[
    str | None,
    typer.Option(help="Names of the classes in the order of labels, separated by commas."),
]

shards_app = typer.Typer(help="Build and check shard sets.", no_args_is_help=True)
app.add_typer(shards_app, name="shards")


@shards_app.command(
    "build",
    epilog="Example: ganscale shards build --source cifar10 --split train --out data/cifar10-train",
)
def shards_build(
    out: Annotated[Path, typer.Option(help="New folder for the set.")],
    source: Annotated[
        str,
        typer.Option(
            help="auto, cifar10, cifar100, procedural, spectrograms, or a path to images, arrays "
            "or tars."
        ),
    ] = "auto",
    split: Annotated[Split, typer.Option(help="Which part of the source.")] = "train",
    layout: Annotated[
        Layout,
        typer.Option(
            help="Where classes come from: the first folder of a path, the folder an image lies "
            "in, nowhere (flat), or WebDataset tars; auto: the one that fits, if only one does."
        ),
    ] = "auto",
    num_shards: Annotated[
        int | None, typer.Option(min=1, help="Number of tars; default: 8 to 64, by the images.")
    ] = None,
    num_streams: _NumStreams = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many images.")] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels to which images are resized.")
    ] = None,
    fit: Annotated[
        Fit,
        typer.Option(
            help="With --resolution, of images that are not square: crop cuts out the centre, pad "
            "adds borders of the --background."
        ),
    ] = "crop",
    img_channels: Annotated[
        Literal["1", "3", "4"] | None, typer.Option(help="Convert to gray, RGB or RGBA.")
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(
            help="Colour of borders with --fit pad, and below what is transparent with "
            "--img-channels 1 or 3; default: white.",
            show_default=False,
        ),
    ] = None,
    value_range: _ValueRange = None,
    class_names: _ClassNames = None,
) -> None:
    """Write images as WebDataset shards with an index; the same input gives the same bytes."""
    from ganscale.data.building import build_shards, check_free
    from ganscale.data.resolve_source import resolve_source
    from ganscale.data.sources import open_source
    from ganscale.tracking.console import counting

    # Before anything is downloaded: an --out that is taken is refused at once.
    downloads = check_free(out).parent / "downloads"
    spec, notice = resolve_source(source, split, download_dir=downloads, layout=layout)
    console = stderr_console()
    notify = partial(console.print, highlight=False, soft_wrap=True)
    if notice:
        notify(notice)
    if layout != "auto" and spec.kind not in ("files", "webdataset"):
        raise ConfigError(
            f"--layout {layout} is for images in files, and {spec} has classes of its own: leave it"
        )
    opened = open_source(spec)
    total = min(len(opened), limit or sys.maxsize)
    with counting(f"building {out}", total, console) as progress:
        shard_set = build_shards(
            spec,
            out,
            num_shards=num_shards,
            num_streams=num_streams,
            limit=limit,
            resolution=resolution,
            # Choices of an option are texts.
            img_channels=None if img_channels is None else int(img_channels),
            background=background,
            fit=fit,
            value_range=value_range,
            class_names=_split_names(class_names),
            source=opened,
            progress=progress,
            notify=notify,
        )
    _print_shards(shard_set)


@shards_app.command("index", epilog="Example: ganscale shards index data/my-webdataset")
def shards_index(
    root: Annotated[Path, typer.Argument(help="Folder of WebDataset tars.")],
    split: Annotated[Split, typer.Option(help="Which part the tars are.")] = "train",
    num_streams: _NumStreams = None,
    value_range: _ValueRange = None,
    class_names: _ClassNames = None,
) -> None:
    """Index existing WebDataset tars in place, so that they can be trained on unchanged."""
    from ganscale.data.building import index_shards
    from ganscale.tracking.console import counting

    console = stderr_console()
    with counting(f"indexing {root}", None, console) as progress:
        shard_set = index_shards(
            root,
            split=split,
            num_streams=num_streams,
            value_range=value_range,
            class_names=_split_names(class_names),
            progress=progress,
            notify=partial(console.print, highlight=False, soft_wrap=True),
        )
    _print_shards(shard_set)


@shards_app.command("verify", epilog="Example: ganscale shards verify data/cifar10-train")
def shards_verify(root: Annotated[str, typer.Argument(help="Folder or URL of the set.")]) -> None:
    """Compare every shard with the index; exit code 1 if anything differs."""
    from ganscale.data.shards import ShardSet, verify_shards
    from ganscale.tracking.console import counting

    shard_set = ShardSet.load(root)
    with counting(f"verifying {root}", shard_set.num_samples, stderr_console()) as progress:
        problems = verify_shards(shard_set, progress)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise DataError(f"{root}: {len(problems)} of {len(shard_set.shards)} shards are damaged")
    typer.echo(
        f"{root}: {len(shard_set.shards)} shards, {shard_set.num_samples} samples, all verified"
    )


@shards_app.command("info", epilog="Example: ganscale shards info data/cifar10-train")
def shards_info(root: Annotated[str, typer.Argument(help="Folder or URL of the set.")]) -> None:
    """Print the number, shape, classes and statistics of a set's images."""
    from ganscale.data.shards import ShardSet

    _print_shards(ShardSet.load(root))


@shards_app.command(
    "show", epilog="Example: ganscale shards show data/cifar10-train --num 64 --out real.png"
)
def shards_show(
    root: Annotated[str, typer.Argument(help="Folder or URL of the set.")],
    num: Annotated[int, typer.Option(min=1, help="How many images.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Decides which images.")] = 0,
    out: Annotated[Path, typer.Option(help="A grid as .png or .jpg.")] = Path("real.png"),
    scale: Scale = 1,
) -> None:
    """Draw some of a set's images as a grid, to look at beside generated ones."""
    import numpy as np

    from ganscale.data.reader import ShardImages
    from ganscale.data.shards import ShardSet
    from ganscale.generation.pictures import as_pictures, save_grid

    shard_set = ShardSet.load(root)
    num = min(num, shard_set.num_samples)
    chosen = np.random.default_rng(seed).choice(shard_set.num_samples, num, replace=False)
    images = ShardImages(shard_set).read(np.sort(chosen))
    if images.damaged:
        raise images.damaged[0]
    save_grid(as_pictures(images.pixels, shard_set.values), out, scale=scale)
    typer.echo(f"wrote {num} images of {root} to {out}")


def _split_names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _print_shards(shard_set: ShardSet) -> None:
    from ganscale.data.values import PIXELS

    channels, height, width = shard_set.image_shape
    values = shard_set.values
    typer.echo(f"location   {shard_set.location}")
    typer.echo(f"source     {shard_set.source}, {shard_set.split}")
    typer.echo(f"samples    {shard_set.num_samples}, {channels}x{height}x{width} {values.dtype}")
    typer.echo(f"shards     {len(shard_set.shards)}, {shard_set.num_bytes / 2**20:.1f} MiB")
    typer.echo(f"streams    {shard_set.num_streams}")
    typer.echo(f"classes    {len(shard_set.classes)}: {', '.join(shard_set.classes[:20])}")
    if shard_set.values != PIXELS:
        typer.echo(f"range      {values.low:g} to {values.high:g} (-1 and 1 to the networks)")
    typer.echo(f"pixel mean {', '.join(f'{v:.3f}' for v in shard_set.pixel_mean)}")
    typer.echo(f"pixel std  {', '.join(f'{v:.3f}' for v in shard_set.pixel_std)}")
