"""The images that are rated: those of runs and real ones, as PNGs that differ in their pixels only.

The PNGs are not compressed and carry nothing but pixels, so equal shapes have equal sizes in bytes:
the size of a compressed image would tell a rater's browser tools which are real.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ganscale.config import load_config
from ganscale.errors import ConfigError
from ganscale.evaluation.image_sets import GeneratedImages, ImageSet, open_images
from ganscale.evaluation.image_views import Subset
from ganscale.evaluation.run_references import shards_of_run
from ganscale.generation.snapshot import snapshot_file
from ganscale.rating.questions import REAL
from ganscale.run_directory import RunDirectory, containing_run
from ganscale.storage import is_url

_SNAPSHOT = ".safetensors"


@dataclass(frozen=True)
class Contestant:
    """Images of one origin, in memory."""

    name: str
    description: str
    digest: str
    shape: tuple[int, int, int]
    """(channels, height, width)."""
    pngs: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.pngs)


def open_runs(
    places: Sequence[str], *, num_images: int, seed: int, device: str, scratch: Path
) -> list[Contestant]:
    """Draw or read `num_images` of each run: a snapshot, a run's folder, or images in files.

    Names are those of runs, with the snapshot, or of folders; where two would be equal, paths.
    """
    origins = [_snapshot(Path(place).expanduser()) or place for place in places]
    names = _names(origins)
    if len(set(names)) < len(names):
        raise ConfigError(f"the same run is named twice: {', '.join(names)}")
    contestants = []
    for name, origin in zip(names, origins, strict=True):
        if isinstance(origin, Path):
            images: ImageSet = GeneratedImages.of_snapshot(
                origin, num_images, seed=seed, device=device
            )
        else:
            images = open_images(origin, scratch=scratch)
        contestants.append(open_contestant(name, images, num_images=num_images, seed=seed))
    return contestants


def open_contestant(name: str, images: ImageSet, *, num_images: int, seed: int) -> Contestant:
    """`num_images` of a set chosen by the seed, or all if there are no more."""
    chosen = Subset.random(images, num_images, seed=seed)
    pixels = chosen.read(np.arange(len(chosen)))
    pngs = tuple(encode_png(image) for image in pixels)
    channels, height, width = pixels[0].shape
    return Contestant(name, chosen.description, chosen.digest, (channels, height, width), pngs)


def default_reference(places: Sequence[str]) -> str:
    """The location of the images that all the runs were trained on.

    Raises `ConfigError` that asks for --reference if it is unknown, gone, or differs between runs.
    """
    references = {_trained_on(Path(place).expanduser()) for place in places}
    reference = references.pop()
    if references or reference is None:
        raise ConfigError(
            "the runs name no real images, or different ones, or their shards are gone: "
            "name a shard set or a folder of images by --reference"
        )
    return reference


def encode_png(image: Tensor) -> bytes:
    """A uint8 image (C, H, W) as a PNG whose size depends on its shape alone."""
    pixels = image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(
        buffer, format="PNG", compress_level=0
    )
    return buffer.getvalue()


def _snapshot(path: Path) -> Path | None:
    """The snapshot file that a path stands for; None for a path of images."""
    # A folder of images may lie anywhere, so only what holds snapshots is taken for a run or for
    # one of its averages.
    holds_snapshots = RunDirectory(path).snapshots.is_dir() or any(path.glob(f"*{_SNAPSHOT}"))
    return snapshot_file(path) if path.suffix == _SNAPSHOT or holds_snapshots else None


def _names(origins: Sequence[Path | str]) -> list[str]:
    short = [_short_name(origin) for origin in origins]
    # A folder that is called "real" must not be mixed up with the real images.
    taken = [*short, REAL]
    return [
        name if taken.count(name) == 1 else str(Path(origin).expanduser().absolute())
        for name, origin in zip(short, origins, strict=True)
    ]


def _short_name(origin: Path | str) -> str:
    if not isinstance(origin, Path):
        return Path(origin).expanduser().absolute().name
    run = containing_run(origin)
    return f"{run.name}/{origin.stem}" if run else origin.stem


def _trained_on(path: Path) -> str | None:
    snapshot = _snapshot(path)
    run = None if snapshot is None else containing_run(snapshot)
    if run is None:
        return None
    shards = shards_of_run(run)
    if shards is not None and (is_url(shards) or Path(shards).is_dir()):
        return shards
    source = load_config(run.config).data.source
    return None if source == "auto" else source
