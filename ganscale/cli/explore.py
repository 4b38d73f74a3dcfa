"""Commands that explore a trained generator: paths, directions, style mixing, nearest images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ganscale.cli.app import app, stderr_console
from ganscale.cli.options import (
    Device,
    Label,
    Scale,
    Seed,
    Snapshot,
    TruncationPsi,
    parse_integers,
)
from ganscale.errors import ConfigError
from ganscale.world import World, process_group

if TYPE_CHECKING:
    from torch import Tensor

    from ganscale.evaluation.distributions.nearest import Nearest
    from ganscale.evaluation.image_sets import ImageSet
    from ganscale.generation.latent_sampler import LatentSampler

_MOST_SEARCHED = 50_000
"""Images whose features are kept; a constant here, as reading the module would load torch."""


@app.command(
    epilog="Example: ganscale interpolate runs/quickstart --seeds 1,2,3 --out strip.png    "
    "Animated: ganscale interpolate runs/quickstart --seeds 1,2,3 --loop --out movie.gif"
)
def interpolate(
    path: Snapshot,
    seeds: Annotated[str, typer.Option(help="Seeds to pass through.")] = "0,1,2",
    frames: Annotated[int, typer.Option(min=1, help="Frames from one point to the next.")] = 16,
    mode: Annotated[
        Literal["slerp", "lerp", "class"],
        typer.Option(help="class: interpolate between --labels for each seed instead."),
    ] = "slerp",
    labels: Annotated[
        str | None,
        typer.Option(
            help="Classes to pass through, for --mode class; default: 0,1,2.", show_default=False
        ),
    ] = None,
    label: Label = None,
    loop: Annotated[bool, typer.Option("--loop", help="Return to the first point.")] = False,
    animate: Annotated[
        bool, typer.Option("--animate", help="Write an animation even if --out ends in .png.")
    ] = False,
    truncation_psi: TruncationPsi = None,
    out: Annotated[
        Path, typer.Option(help="A strip as .png, or an animation as .gif, .webp or .apng.")
    ] = Path("strip.png"),
    scale: Scale = 2,
    device: Device = "cpu",
) -> None:
    """Interpolate between images through their latents, or between classes."""
    from ganscale.generation.interpolation import class_frames, frames_between, lerp, slerp
    from ganscale.generation.pictures import ANIMATED, lay_out, write_animation, write_picture

    if out.suffix not in {".png", *ANIMATED}:
        raise ConfigError(f"--out {out}: expected .png, {', '.join(ANIMATED)}")
    if mode == "class" and label is not None:
        raise ConfigError("--label is for --mode slerp and lerp: use --labels for --mode class")
    if mode != "class" and labels is not None:
        raise ConfigError("--labels is for --mode class: use --label for the class of all images")
    sampler = _latent_sampler(path, truncation_psi, device)
    chosen = parse_integers("--seeds", seeds)
    if mode == "class":
        through = parse_integers("--labels", labels or "0,1,2")
        images = class_frames(sampler, chosen, through, frames, loop=loop)
    else:
        mix = slerp if mode == "slerp" else lerp
        images = frames_between(sampler, chosen, frames, mix=mix, label=label, loop=loop)[None]
    if animate or out.suffix in ANIMATED:
        write_animation(_sheets(images, scale), out)
    else:
        # Classes make a row for each seed already; one path is folded at the points that it passes.
        rows = images if mode == "class" else _folded(images[0], frames)
        write_picture(lay_out(rows, scale=scale), out)
    typer.echo(f"wrote {images.shape[1]} frames to {out}")


@app.command(epilog="Example: ganscale directions runs/quickstart --num 5 --out directions.png")
def directions(
    path: Snapshot,
    num: Annotated[
        int, typer.Option(min=1, help="Number of directions, largest effect first.")
    ] = 5,
    seeds: Annotated[str, typer.Option(help="Images to move.")] = "0,1,2",
    extent: Annotated[
        float, typer.Option(min=0, help="How far to move to each side, in standard deviations.")
    ] = 3.0,
    steps: Annotated[int, typer.Option(min=2, help="Images of each strip.")] = 7,
    label: Label = None,
    truncation_psi: TruncationPsi = None,
    out: Annotated[
        Path, typer.Option(help="A .png with a row for each direction and seed.")
    ] = Path("directions.png"),
    scale: Scale = 2,
    device: Device = "cpu",
) -> None:
    """Move images along the directions that change them most, found from the weights (SeFa)."""
    import torch

    from ganscale.generation.directions import edit_images, find_directions
    from ganscale.generation.pictures import (
        check_picture_name,
        label_sheet,
        lay_out,
        write_picture,
    )

    check_picture_name(out)
    sampler = _latent_sampler(path, truncation_psi, device)
    directions = find_directions(sampler, num)
    offsets = torch.linspace(-extent, extent, steps)
    strips = [
        edit_images(sampler, seed, directions.vectors, offsets, label=label)
        for seed in parse_integers("--seeds", seeds)
    ]
    # The seeds of one direction lie one below the other, so that its effect can be compared.
    rows = torch.stack(strips, 1).flatten(0, 1)
    names = [f"direction {n}" if k == 0 else "" for n in range(num) for k in range(len(strips))]
    strengths = [f"{offset:+.1f}" for offset in offsets.tolist()]
    write_picture(label_sheet(lay_out(rows, scale=scale), names, strengths), out)
    typer.echo("direction  eigenvalue")
    for number, value in enumerate(directions.eigenvalues.tolist()):
        typer.echo(f"{number:9d}  {value:10.4g}")
    typer.echo(f"wrote {len(rows)} strips to {out}")


@app.command(epilog="Example: ganscale mix runs/faces --rows 0,1,2 --columns 3,4,5 --layer 2")
def mix(
    path: Snapshot,
    rows: Annotated[str, typer.Option(help="Seeds of the coarse layers.")] = "0,1,2",
    columns: Annotated[str, typer.Option(help="Seeds of the fine layers.")] = "3,4,5,6",
    layer: Annotated[
        int, typer.Option(min=0, help="First layer that takes the column's style.")
    ] = 2,
    truncation_psi: TruncationPsi = None,
    out: Annotated[
        Path, typer.Option(help="A .png with the seeds' own images at its edges.")
    ] = Path("mix.png"),
    scale: Scale = 2,
    device: Device = "cpu",
) -> None:
    """Mix the styles of images, for generators with styles (StyleGAN2)."""
    import torch

    from ganscale.generation.latent_sampler import mixed_images
    from ganscale.generation.pictures import check_picture_name, lay_out, write_picture

    check_picture_name(out)
    sampler = _latent_sampler(path, truncation_psi, device)
    left, top = parse_integers("--rows", rows), parse_integers("--columns", columns)
    mixed = mixed_images(sampler, left, top, layer)
    edge = sampler.sample_seeds(left)[:, None]
    # The sheet is a table with the images of the rows' and columns' seeds at its edges.
    corner = torch.full_like(edge[:1], 255)
    head = torch.cat([corner, sampler.sample_seeds(top)[None]], 1)
    sheet = torch.cat([head, torch.cat([edge, mixed], 1)])
    write_picture(lay_out(sheet, scale=scale), out)
    typer.echo(f"wrote {len(left)} x {len(top)} mixtures to {out}")


@app.command(
    epilog="Example: ganscale nearest runs/quickstart --reference data/cifar10-train --num 16"
)
def nearest(
    path: Snapshot,
    reference: Annotated[str, typer.Option(help="Shard set, folder, archive or cifar10.")],
    num: Annotated[int, typer.Option(min=1, help="How many generated images.")] = 16,
    seed: Seed = 0,
    neighbours: Annotated[
        int, typer.Option(min=1, help="Number of neighbours by either distance.")
    ] = 4,
    num_reference: Annotated[
        int,
        typer.Option(
            min=2, max=_MOST_SEARCHED, help="The most reference images to search, drawn at random."
        ),
    ] = 10_000,
    truncation_psi: TruncationPsi = None,
    out: Annotated[
        Path,
        typer.Option(
            help="A .png; each row has an image, then its nearest by features and by pixels."
        ),
    ] = Path("nearest.png"),
    scale: Scale = 2,
    device: Device = "cpu",
) -> None:
    """Show generated images beside the training images nearest to them, to see copies."""
    import torch

    from ganscale.generation.pictures import check_picture_name, lay_out, write_picture

    check_picture_name(out)
    sampler = _latent_sampler(path, truncation_psi, device)
    seeds = list(range(seed, seed + num))
    images = sampler.sample_seeds(seeds)
    by_features, by_pixels, shown = _neighbours(
        images, reference, num_reference, neighbours, device
    )
    gap = torch.full_like(images[:, None], 255)
    rows = torch.cat([images[:, None], gap, shown[0], gap, shown[1]], 1)
    write_picture(lay_out(rows, scale=scale), out)
    _print_distances(seeds, by_features, by_pixels)
    typer.echo(f"wrote {num} images and their neighbours to {out}")


def _print_distances(seeds: list[int], by_features: Nearest, by_pixels: Nearest) -> None:
    """A row for each seed: the distance to its nearest image, and its share of a typical one."""
    typer.echo("    seed   features  of typical     pixels  of typical")
    for row, seed in enumerate(seeds):
        near = [nearest.distances[row, 0].item() for nearest in (by_features, by_pixels)]
        shares = near[0] / by_features.typical, near[1] / by_pixels.typical
        typer.echo(f"{seed:8d} {near[0]:10.4g} {shares[0]:11.2f} {near[1]:10.4g} {shares[1]:11.2f}")
    typer.echo(
        f" typical {by_features.typical:10.4g} {1:11.2f} {by_pixels.typical:10.4g} {1:11.2f}   "
        "(a training image to its nearest other; copies have far less)"
    )


def _neighbours(
    images: Tensor, place: str, num_reference: int, k: int, device: str
) -> tuple[Nearest, Nearest, tuple[Tensor, Tensor]]:
    """The nearest images by features and by pixels, and those images, (n, k, C, H, W) each."""
    from ganscale.evaluation.distributions.features import FeatureCache
    from ganscale.evaluation.distributions.nearest import (
        features_of,
        nearest_in_features,
        nearest_in_pixels,
    )
    from ganscale.metrics.extractors import EfficientNetLite0
    from ganscale.tracking.console import progress_bars

    # Its features of all training images take minutes on a CPU; those of Inception take hours.
    # One process on the device that was asked for, which `World.detect` would choose itself.
    network, world = EfficientNetLite0(), World(device=device)
    network.to(device)
    reference = _reference(place, num_reference)
    with process_group(world), progress_bars(stderr_console()) as start_task:
        # Pixels first: a reference of another shape is refused before features are extracted.
        by_pixels = nearest_in_pixels(
            images, reference, k, progress=start_task("pixels", len(reference))
        )
        progress = start_task("reference features", len(reference))
        known = FeatureCache().extract(reference, network, world, progress=progress)
    assert known is not None
    by_features = nearest_in_features(features_of(images, network), known.rows, k)
    numbers = known.indices[by_features.indices.numpy()], by_pixels.indices.numpy()
    shown = [reference.read(n.ravel()).unflatten(0, n.shape) for n in numbers]
    return by_features, by_pixels, (shown[0], shown[1])


def _reference(place: str, num_reference: int) -> ImageSet:
    """At most `num_reference` images of a place; a notice says if there are more."""
    from ganscale.evaluation.image_sets import open_images
    from ganscale.evaluation.image_views import Subset

    whole = open_images(place)
    reference = Subset.random(whole, num_reference, seed=0)
    if len(reference) < len(whole):
        searched = f"looking at {len(reference):,} of {len(whole):,} reference images"
        if len(whole) <= _MOST_SEARCHED:
            searched += f" (--num-reference {len(whole)} looks at all)"
        elif num_reference < _MOST_SEARCHED:
            searched += f" (--num-reference {_MOST_SEARCHED} looks at the most that is possible)"
        typer.echo(searched, err=True)
    return reference


def _latent_sampler(path: Path, truncation_psi: float | None, device: str) -> LatentSampler:
    from ganscale.generation.latent_sampler import LatentSampler
    from ganscale.generation.snapshot import load_generator

    generator = load_generator(path, device=device)
    return LatentSampler(generator, pictures=True, truncation_psi=truncation_psi)


def _folded(images: Tensor, frames: int) -> Tensor:
    """A path as rows from one point to the next, ends included: (n, frames + 1, C, H, W)."""
    import torch

    # A loop has no frame at its end, which is its beginning: the last row ends with the first
    # frame.
    whole = images if len(images) % frames == 1 or frames == 1 else torch.cat([images, images[:1]])
    return whole.unfold(0, frames + 1, frames).movedim(-1, 1)


def _sheets(images: Tensor, scale: int) -> Tensor:
    """Frames (rows, frames, C, H, W) with all rows in each: (frames, C, h, w)."""
    import torch

    from ganscale.generation.pictures import lay_out

    frames = images.transpose(0, 1)
    return torch.stack([lay_out(frame[None], scale=scale) for frame in frames])
