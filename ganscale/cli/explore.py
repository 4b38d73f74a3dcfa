"""Verbs that look around in a trained generator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ganscale.cli.app import Device, app, stderr_console
from ganscale.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ganscale.evaluation.distributions.nearest import Nearest
    from ganscale.generation.latent_sampler import LatentSampler

__all__: list[str] = []

_Place = Annotated[Path, typer.Argument(help="Snapshot (.safetensors) or folder of a run.")]
_Psi = Annotated[
    float | None,
    typer.Option(help="With w: 0 to 1, pull to its mean; else: largest |z| element."),
]
_Scale = Annotated[int, typer.Option(min=1, help="Magnify the pixels so many times.")]
_Label = Annotated[int | None, typer.Option(min=0, help="Class of all; else the seed decides it.")]


@app.command(
    epilog="Example: ganscale interpolate runs/quickstart --seeds 1,2,3 --out strip.png    "
    "Animated: ganscale interpolate runs/quickstart --seeds 1,2,3 --loop --out movie.gif"
)
def interpolate(
    path: _Place,
    seeds: Annotated[str, typer.Option(help="Seeds to pass through.")] = "0,1,2",
    frames: Annotated[int, typer.Option(min=1, help="Steps from one to the next.")] = 16,
    mode: Annotated[
        Literal["slerp", "lerp", "class"],
        typer.Option(help="class: each seed goes through --labels instead."),
    ] = "slerp",
    labels: Annotated[str, typer.Option(help="Classes to pass through, for class.")] = "0,1,2",
    label: _Label = None,
    loop: Annotated[bool, typer.Option("--loop", help="And back to the first.")] = False,
    animate: Annotated[bool, typer.Option("--animate", help="An animated .png.")] = False,
    truncation_psi: _Psi = None,
    out: Annotated[
        Path, typer.Option(help=".png: a strip; .gif, .webp or .apng: animated.")
    ] = Path("strip.png"),
    scale: _Scale = 2,
    device: Device = "cpu",
) -> None:
    """Go from image to image through latents, or from class to class."""
    from ganscale.generation.interpolation import class_frames, frames_between, lerp, slerp
    from ganscale.generation.pictures import ANIMATED, lay_out, write_animation, write_picture

    if out.suffix not in {".png", *ANIMATED}:
        raise ConfigError(f"--out {out}: expected .png, {', '.join(ANIMATED)}")
    sampler = _latent_sampler(path, truncation_psi, device)
    chosen = _numbers("--seeds", seeds)
    if mode == "class":
        through = _numbers("--labels", labels)
        images = class_frames(sampler, chosen, through, frames, loop=loop)
    else:
        mix = slerp if mode == "slerp" else lerp
        images = frames_between(sampler, chosen, frames, mix=mix, label=label, loop=loop)[None]
    if animate or out.suffix in ANIMATED:
        write_animation(_sheets(images, scale), out)
    else:
        rows = images if mode == "class" else _folded(images[0], frames)
        write_picture(lay_out(rows, scale=scale), out)
    typer.echo(f"wrote {images.shape[1]} frames to {out}")


@app.command(epilog="Example: ganscale directions runs/quickstart --num 5 --out directions.png")
def directions(
    path: _Place,
    num: Annotated[int, typer.Option(min=1, help="How many, largest effect first.")] = 5,
    seeds: Annotated[str, typer.Option(help="Images to move.")] = "0,1,2",
    extent: Annotated[float, typer.Option(min=0, help="Standard deviations to each side.")] = 3.0,
    steps: Annotated[int, typer.Option(min=2, help="Images of each strip.")] = 7,
    label: _Label = None,
    truncation_psi: _Psi = None,
    out: Annotated[Path, typer.Option(help="A .png: a row for each direction and seed.")] = Path(
        "directions.png"
    ),
    scale: _Scale = 2,
    device: Device = "cpu",
) -> None:
    """Move images along the directions that the weights say change them most (SeFa)."""
    import torch

    from ganscale.generation.directions import directions_of, edited
    from ganscale.generation.pictures import lay_out, write_picture

    sampler = _latent_sampler(path, truncation_psi, device)
    directions = directions_of(sampler, num)
    offsets = torch.linspace(-extent, extent, steps)
    strips = [
        edited(sampler, seed, directions.vectors, offsets, label=label)
        for seed in _numbers("--seeds", seeds)
    ]
    rows = torch.stack(strips, 1).flatten(0, 1)  # the seeds of a direction under each other
    write_picture(lay_out(rows, scale=scale), out)
    typer.echo("direction  eigenvalue")
    for number, value in enumerate(directions.eigenvalues.tolist()):
        typer.echo(f"{number:9d}  {value:10.4g}")
    typer.echo(f"wrote {len(rows)} strips to {out}")


@app.command(epilog="Example: ganscale mix runs/faces --rows 0,1,2 --columns 3,4,5 --layer 2")
def mix(
    path: _Place,
    rows: Annotated[str, typer.Option(help="Seeds of the coarse layers.")] = "0,1,2",
    columns: Annotated[str, typer.Option(help="Seeds of the fine layers.")] = "3,4,5,6",
    layer: Annotated[int, typer.Option(min=0, help="First layer of the column's.")] = 2,
    truncation_psi: _Psi = None,
    out: Annotated[Path, typer.Option(help="A .png; seeds' own images at its edges.")] = Path(
        "mix.png"
    ),
    scale: _Scale = 2,
    device: Device = "cpu",
) -> None:
    """Mix the styles of images, where the generator has them (StyleGAN2)."""
    import torch

    from ganscale.generation.pictures import lay_out, write_picture
    from ganscale.generation.style_mixing import mixed_images

    sampler = _latent_sampler(path, truncation_psi, device)
    left, top = _numbers("--rows", rows), _numbers("--columns", columns)
    mixed = mixed_images(sampler, left, top, layer)
    edge = sampler.sample_seeds(left)[:, None]
    corner = torch.full_like(edge[:1], 255)
    head = torch.cat([corner, sampler.sample_seeds(top)[None]], 1)
    sheet = torch.cat([head, torch.cat([edge, mixed], 1)])
    write_picture(lay_out(sheet, scale=scale), out)
    typer.echo(f"wrote {len(left)} x {len(top)} mixtures to {out}")


@app.command(epilog="Example: ganscale nearest runs/quickstart --reference data/cifar10 --num 16")
def nearest(
    path: _Place,
    reference: Annotated[str, typer.Option(help="Shard set, folder, archive or cifar10.")],
    num: Annotated[int, typer.Option(min=1, help="How many generated images.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first; then +1.")] = 0,
    neighbours: Annotated[int, typer.Option(min=1, help="Of each, by either distance.")] = 4,
    num_reference: Annotated[
        int, typer.Option(min=2, help="Look at so many of the reference at most, at random.")
    ] = 10_000,
    truncation_psi: _Psi = None,
    out: Annotated[Path, typer.Option(help="A .png; a row: image, by features, by pixels.")] = Path(
        "nearest.png"
    ),
    scale: _Scale = 2,
    device: Device = "cpu",
) -> None:
    """Show generated images beside the training images most like them."""
    import torch

    from ganscale.generation.pictures import lay_out, write_picture

    sampler = _latent_sampler(path, truncation_psi, device)
    seeds = list(range(seed, seed + num))
    images = sampler.sample_seeds(seeds)
    by_features, by_pixels, shown = _neighbours(
        images, reference, num_reference, neighbours, device
    )
    gap = torch.full_like(images[:, None], 255)
    write_picture(
        lay_out(torch.cat([images[:, None], gap, shown[0], gap, shown[1]], 1), scale=scale), out
    )
    typer.echo("    seed   features  of typical     pixels  of typical")
    for row, number in enumerate(seeds):
        near = [nearest.distances[row, 0].item() for nearest in (by_features, by_pixels)]
        shares = near[0] / by_features.typical, near[1] / by_pixels.typical
        typer.echo(
            f"{number:8d} {near[0]:10.4g} {shares[0]:11.2f} {near[1]:10.4g} {shares[1]:11.2f}"
        )
    typer.echo(
        f" typical {by_features.typical:10.4g} {1:11.2f} {by_pixels.typical:10.4g} {1:11.2f}   "
        "(a training image to its nearest other; copies have far less)"
    )
    typer.echo(f"wrote {num} images and their neighbours to {out}")


def _neighbours(
    images: Tensor, place: str, num_reference: int, k: int, device: str
) -> tuple[Nearest, Nearest, tuple[Tensor, Tensor]]:
    """By features and by pixels, and the images themselves, (n, k, C, H, W)."""
    from ganscale.cli.duration import announce
    from ganscale.evaluation.distributions.evaluate import Workload
    from ganscale.evaluation.distributions.features import FeatureCache
    from ganscale.evaluation.distributions.nearest import (
        features_of,
        nearest_in_features,
        nearest_in_pixels,
    )
    from ganscale.evaluation.image_sets import open_images
    from ganscale.evaluation.image_views import Subset
    from ganscale.metrics.extractors import EfficientNetLite0
    from ganscale.tracking.console import progress_bars
    from ganscale.world import World, process_group

    # Its features of all training images take minutes on a CPU; those of Inception take hours.
    network, world, cache = EfficientNetLite0(), World.detect(device), FeatureCache()
    network.to(device)
    whole = open_images(place, scratch=cache.folder.parent)
    reference = Subset.random(whole, num_reference, seed=0)
    if len(reference) < len(whole):
        typer.echo(
            f"looking at {len(reference):,} of {len(whole):,} reference images "
            f"(--num-reference {len(whole)} looks at all)",
            err=True,
        )
    with process_group(world), progress_bars(stderr_console()) as start_task:
        by_pixels = nearest_in_pixels(
            images, reference, k, progress=start_task("pixels", len(reference))
        )
        missing = 0 if cache.has(reference, network) else len(reference)
        workload = Workload(len(images), missing, statistics="")
        announce(workload, network=network, shape=reference.shape, world=world)
        progress = start_task("reference features", len(reference))
        known = cache.extract(reference, network, world, progress=progress)
    assert known is not None
    by_features = nearest_in_features(features_of(images, network), known.rows, k)
    numbers = known.indices[by_features.indices.numpy()], by_pixels.indices.numpy()
    shown = [reference.read(n.ravel()).unflatten(0, n.shape) for n in numbers]
    return by_features, by_pixels, (shown[0], shown[1])


def _latent_sampler(path: Path, truncation_psi: float | None, device: str) -> LatentSampler:
    from ganscale.generation.latent_sampler import LatentSampler
    from ganscale.generation.snapshot import load_generator

    generator = load_generator(path, device=device)
    return LatentSampler(generator, pictures=True, truncation_psi=truncation_psi)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: expected numbers, as in 0,1,2") from None


def _folded(images: Tensor, frames: int) -> Tensor:
    """A path as rows from one point to the next, ends included: (n, frames + 1, C, H, W)."""
    import torch

    whole = images if len(images) % frames == 1 or frames == 1 else torch.cat([images, images[:1]])
    return whole.unfold(0, frames + 1, frames).movedim(-1, 1)


def _sheets(images: Tensor, scale: int) -> Tensor:
    """Frames (rows, frames, C, H, W) with all rows in each: (frames, C, h, w)."""
    import torch

    from ganscale.generation.pictures import lay_out

    frames = images.transpose(0, 1)
    return torch.stack([lay_out(frame[None], scale=scale) for frame in frames])
