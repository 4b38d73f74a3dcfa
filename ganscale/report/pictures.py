"""The pictures of a run that a report shows.

They are what training and commands have left in the run's folder. Files are shown as they are and
magnified by the browser; only large ones are made smaller. Of many sample grids some are chosen,
evenly over the run.
"""

from __future__ import annotations

import base64
import io
import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ganscale.report.runs import Run
from ganscale.run_directory import RunDirectory

_TYPES = {
    ".png": "image/png",
    ".apng": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
}
_NUM_FRAMES = 12
"""Sample grids that are shown at most."""
_MAX_SIDE = 1024
"""Pixels of a picture that is made smaller."""
_MAGNIFIED = 256
"""Generated images are shown four times as large, unless they would be larger than this."""


_MAX_CLASSES = 20
_KINDS = (
    (
        "fresh",
        "Fresh samples",
        "Generated images of latents that training did not show.",
        "ganscale sample {run} --num 64 --seed 1000 --out {run}/grid.png",
        ("grid.*", "samples.*", "fresh*"),
    ),
    (
        "classes",
        "By class",
        "A column for each class: {names}. A row for each latent.",
        "ganscale interpolate {run} --mode class --labels {labels} --seeds 0,1,2,3,4,5,6,7 "
        "--frames 1 --out {run}/classes.png",
        ("class*",),
    ),
    (
        "real",
        "Real images",
        "Images of the training set, as fresh samples should look.",
        "ganscale shards show {shards} --num 64 --out {run}/real.png",
        ("real*",),
    ),
    (
        "nearest",
        "Nearest training images",
        "Each row: a generated image, its nearest training images by features, then by pixels. A "
        "copy would stand beside its original.",
        "ganscale nearest {run} --reference {shards} --num 8 --out {run}/nearest.png",
        ("nearest*",),
    ),
    (
        "interpolation",
        "Interpolation",
        "Images on the way from one latent to the next. Smooth ways say that the generator has not "
        "learnt images one by one.",
        "ganscale interpolate {run} --seeds 1,2,3,4,5 --frames 8 --out {run}/strip.png",
        ("strip*", "interpol*", "movie*", "*.gif", "*.webp", "*.apng"),
    ),
    ("other", "Reconstructions", "Made by a command, as its name says.", "", ("*/grid.png",)),
    ("other", "Other pictures", "Made by a command, as their names say.", "", ("*",)),
)
"""Kind, title, what it shows, the command that draws it, and the names of its files."""


@dataclass(frozen=True)
class Picture:
    """An image file in the page, and the size of the picture before it was made smaller."""

    width: int
    height: int
    mime: str
    data: bytes

    @property
    def url(self) -> str:
        """The picture itself as a URL, so that nothing is requested."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Frame:
    """A sample grid of training."""

    nimg: int
    picture: Picture


@dataclass(frozen=True)
class Still:
    """A picture with what it shows; without the picture the command that makes it."""

    kind: str
    title: str
    text: str
    command: str = ""
    name: str = ""
    picture: Picture | None = None
    """None where the file cannot be read, too."""


@dataclass(frozen=True)
class Album:
    """The pictures of a run."""

    frames: list[Frame]
    num_frames: int
    """Grids in the run's folder, shown or not."""
    stills: list[Still]
    magnification: int


def album_of(run: Run, limit: int) -> Album:
    """Choose pictures; files of more than `limit` bytes are made smaller."""
    paths = [*RunDirectory(run.root).sample_grids().items()]
    chosen = paths
    if len(paths) > _NUM_FRAMES:  # the first and the last one included
        at = [i * (len(paths) - 1) / (_NUM_FRAMES - 1) for i in range(_NUM_FRAMES)]
        chosen = [paths[round(i)] for i in at]
    frames = [
        Frame(nimg, picture) for nimg, path in chosen if (picture := _open(path, limit)) is not None
    ]
    resolution = 32 if run.config is None else run.config.model.resolution
    magnification = max(1, min(4, _MAGNIFIED // resolution))
    return Album(frames, len(paths), _stills(run, limit), magnification)


def _open(path: Path, limit: int) -> Picture | None:
    """The picture in a file; None if it is damaged, or so large that Pillow refuses it."""
    damages = (OSError, UnidentifiedImageError, ValueError, SyntaxError)
    with suppress(*damages, Image.DecompressionBombError):
        data, mime = path.read_bytes(), _TYPES[path.suffix.lower()]
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            image.load()
            # An animation would lose what it shows.
            if len(data) > limit and not getattr(image, "is_animated", False):
                small = image.convert("RGB")
                small.thumbnail((_MAX_SIDE, _MAX_SIDE))
                written = io.BytesIO()
                small.save(written, "WEBP", quality=85)
                data, mime = written.getvalue(), "image/webp"
        return Picture(width, height, mime, data)
    return None


def _stills(run: Run, limit: int) -> list[Still]:
    """What a report shows besides the grids of training, in order."""
    files = sorted(
        path
        for path in [*run.root.glob("*"), *run.root.glob("*/grid.png"), *_compared(run.root)]
        if path.suffix.lower() in _TYPES and not path.name.startswith(".")
    )
    listed: list[Still] = []
    for still, patterns in _kinds(run):
        mine = [p for p in files if any(fnmatch(str(p.relative_to(run.root)), t) for t in patterns)]
        files = [path for path in files if path not in mine]
        listed += [replace(still, name=p.name, picture=_open(p, limit)) for p in mine]
        if not mine and still.command:
            listed.append(still)
    return listed


def _compared(root: Path) -> list[Path]:
    """Pictures in folders of `ganscale compare`, which has written its results beside them."""
    folders = [path.parent for path in root.glob("*/figures.json")]
    return [path for folder in folders for path in folder.glob("*.png") if path.name != "grid.png"]


def _kinds(run: Run) -> list[tuple[Still, tuple[str, ...]]]:
    """What a run may have, with the commands for it, and the names of the files."""
    names = run.classes[:_MAX_CLASSES]
    values = {
        "run": shlex.quote(run.place),
        "shards": shlex.quote(run.shards or "SHARDS"),
        "labels": ",".join(map(str, range(len(names)))),
        "names": ", ".join(names),
    }
    kinds: list[tuple[Still, tuple[str, ...]]] = []
    for kind, title, text, command, patterns in _KINDS:
        if kind == "classes" and not names:
            continue
        # Without a generator nothing can be drawn, and a command that cannot succeed helps nobody.
        is_possible = bool(run.snapshots) or kind == "real"
        line = command.format(**values) if is_possible else ""
        kinds.append((Still(kind, title, text.format(**values), line), patterns))
    return kinds
