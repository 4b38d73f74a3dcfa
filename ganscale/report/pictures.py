"""The pictures of a run that a report shows, and as many of them as its size allows.

They are what training and commands have left in the run's folder. Files are shown as they are and
magnified by the browser. Only where they are too large is a grid cut to its first rows, without a
change to any pixel. Of many sample grids some are chosen, evenly over the run.
"""

from __future__ import annotations

import base64
import io
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ganscale.report.runs import Run
from ganscale.report.text import size

__all__ = ["Album", "Cell", "Frame", "Picture", "Still", "album_of", "evenly"]

_TYPES = {
    ".png": "image/png",
    ".apng": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
}
_FRAME_NAME = re.compile(r"kimg-(\d+\.\d+)\.png")
_NUM_FRAMES = (24, 16, 12, 8)
"""Sample grids that are shown at most, and fewer where each would have less than three rows."""
_ROWS_WANTED = 3
_FRAMES_SHARE = 0.45
"""Part of the budget that is kept for the grids over time; other pictures share the rest."""
_BASE64 = 4 / 3
_BESIDE = 24
"""Real images that are shown, beside as many generated ones."""
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
        "Real beside generated",
        "Images of the training set, right, beside generated ones.",
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
    """An image file in the page."""

    width: int
    height: int
    mime: str
    data: bytes

    @property
    def url(self) -> str:
        """The picture itself as a URL, so that nothing is requested."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"

    @property
    def cost(self) -> float:
        """Bytes that it takes in the page."""
        return _BASE64 * len(self.data)


@dataclass(frozen=True)
class Frame:
    """A sample grid of training."""

    nimg: int
    picture: Picture


@dataclass(frozen=True)
class Cell:
    """Where one image of a grid lies, in the grid's pixels."""

    x: int
    y: int


@dataclass(frozen=True)
class Still:
    """A picture with what it shows; without the picture the command that makes it."""

    kind: str
    title: str
    text: str
    command: str = ""
    name: str = ""
    picture: Picture | None = None
    cells: tuple[Cell, ...] = ()
    """The images of a grid, which the page lays out anew for its width; empty: shown whole."""
    problem: str = ""
    """Why a picture that is there is not shown."""


@dataclass(frozen=True)
class Album:
    """The pictures of a run."""

    frames: list[Frame]
    num_frames: int
    """Grids in the run's folder, shown or not."""
    rows_shown: str
    """Which part of each grid is shown, if not all of it."""
    stills: list[Still]
    resolution: int
    magnification: int

    @property
    def cost(self) -> float:
        """Bytes that the pictures take in the page."""
        pictures = [frame.picture for frame in self.frames]
        pictures += [still.picture for still in self.stills if still.picture is not None]
        return sum(picture.cost for picture in pictures)

    @property
    def fresh(self) -> Still | None:
        """The grid of fresh samples, if its images can be told apart."""
        return next((still for still in self.stills if still.kind == "fresh" and still.cells), None)


def picture_bytes(run: Run) -> int:
    """Size of all pictures that could be shown of a run."""
    paths = [path for _, path in _frame_paths(run.root)]
    paths += [path for _, path in _stills(run) if path is not None]
    return sum(path.stat().st_size for path in paths)


def album_of(run: Run, budget: float) -> Album:
    """Choose pictures that take at most `budget` bytes of the page."""
    resolution = 32 if run.config is None else run.config.model.resolution
    stills, spent = [], 0.0
    for still, path in _stills(run):
        chosen = still
        if path is not None:
            chosen = _loaded(still, path, resolution, (1 - _FRAMES_SHARE) * budget - spent)
            spent += 0.0 if chosen.picture is None else chosen.picture.cost
        stills.append(chosen)
    paths = _frame_paths(run.root)
    frames, rows_shown = _frames(paths, resolution, budget - spent)
    magnification = max(1, min(4, _MAGNIFIED // resolution))
    return Album(frames, len(paths), rows_shown, stills, resolution, magnification)


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers below `count`, evenly spaced, the first and last included."""
    if count <= wanted:
        return list(range(count))
    if wanted == 1:
        return [count - 1]
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def _frame_paths(root: Path) -> list[tuple[int, Path]]:
    """The sample grids of training with their positions."""
    matches = [(_FRAME_NAME.fullmatch(path.name), path) for path in (root / "samples").glob("*")]
    return sorted((round(1000 * float(m[1])), path) for m, path in matches if m is not None)


def _frames(
    paths: Sequence[tuple[int, Path]], resolution: int, budget: float
) -> tuple[list[Frame], str]:
    """Grids for the slider, and which part of them is shown if not all."""
    paths = [(nimg, path) for nimg, path in paths if path.stat().st_size]
    if not paths:
        return [], ""
    num_rows = _num_rows(paths[-1][1], resolution)
    for wanted in _NUM_FRAMES:
        chosen = [paths[i] for i in evenly(len(paths), wanted)]
        cost = _BASE64 * sum(path.stat().st_size for _, path in chosen)
        rows = int(num_rows * min(1.0, budget / cost))
        if rows >= min(num_rows, _ROWS_WANTED):
            break
    # How well rows compress differs, so it is tried; in the end only few grids are left.
    while True:
        frames = [
            Frame(nimg, picture)
            for nimg, path in chosen
            if (picture := _open(path, resolution, max(1, rows))) is not None
        ]
        if sum(frame.picture.cost for frame in frames) <= budget or len(chosen) <= 1:
            break
        if rows > 1:
            rows -= 1
        else:
            chosen = [chosen[i] for i in evenly(len(chosen), len(chosen) // 2)]
    if sum(frame.picture.cost for frame in frames) > budget:
        return [], ""
    return frames, "" if rows >= num_rows else f"the first {max(1, rows)} of {num_rows} rows"


def _num_rows(path: Path, resolution: int) -> int:
    """Rows of images in a grid; 1 where it is none, which is then not cut."""
    picture = _open(path, resolution, None)
    if picture is None or not _is_grid(picture, resolution):
        return 1
    return (picture.height - 1) // (resolution + 1)


def _is_grid(picture: Picture, resolution: int) -> bool:
    """Whether images of a resolution, with a pixel between them, fill the picture."""
    period = resolution + 1
    sides = (picture.width - 1, picture.height - 1)
    return all(side >= period and side % period == 0 for side in sides)


def _open(path: Path, resolution: int, rows: int | None) -> Picture | None:
    """The picture in a file, a grid cut to its first rows; None if it is damaged.

    A grid that was magnified is shown as it was before: the browser magnifies as well.
    """
    with suppress(OSError, UnidentifiedImageError, ValueError, SyntaxError):
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            image.verify()
        scale = _scale(width, height, resolution)
        picture = Picture(width // scale, height // scale, _TYPES[path.suffix.lower()], data)
        end = picture.height if rows is None else rows * (resolution + 1) + 1
        is_cut = end < picture.height and _is_grid(picture, resolution)
        if scale == 1 and not is_cut:
            return picture
        with Image.open(io.BytesIO(data)) as image:
            small = image.resize((picture.width, picture.height), Image.Resampling.NEAREST)
            if is_cut:
                small = small.crop((0, 0, picture.width, end))
            written = io.BytesIO()
            small.save(written, "PNG")
        return Picture(*small.size, "image/png", written.getvalue())
    return None


def _scale(width: int, height: int, resolution: int) -> int:
    """How many times a grid of images of a resolution was magnified; 1 for another picture."""
    for scale in range(2, 17):
        if width % scale == 0 and height % scale == 0:
            picture = Picture(width // scale, height // scale, "", b"")
            if _is_grid(picture, resolution):
                return scale
    return 1


def _loaded(still: Still, path: Path, resolution: int, budget: float) -> Still:
    """A still with its picture, cut to what the budget allows if it is a grid."""
    values = vars(still) | {"name": path.name}
    picture = _open(path, resolution, None)
    if picture is None:
        return Still(**values | {"problem": f"{path.name} cannot be read."})
    cells: tuple[Cell, ...] = ()
    if still.kind in ("fresh", "real") and _is_grid(picture, resolution):
        rows = (picture.height - 1) // (resolution + 1)
        if still.kind == "real":
            rows = -(-_BESIDE // ((picture.width - 1) // (resolution + 1)))
            picture = _open(path, resolution, rows)
        while picture is not None and picture.cost > budget and rows > 1:
            rows = min(rows - 1, int(rows * budget / picture.cost) or 1)
            picture = _open(path, resolution, rows)
        assert picture is not None
        cells = _cells(picture, resolution)[: _BESIDE if still.kind == "real" else None]
    if picture.cost > budget:
        problem = f"{path.name} ({size(path.stat().st_size)}) is too large for this report."
        return Still(**values | {"problem": problem})
    return Still(**values | {"picture": picture, "cells": cells})


def _cells(picture: Picture, resolution: int) -> tuple[Cell, ...]:
    """The places of a grid's images, without the empty ones at its end."""
    period = resolution + 1
    cells = [
        Cell(x, y)
        for y in range(1, picture.height - 1, period)
        for x in range(1, picture.width - 1, period)
    ]
    with Image.open(io.BytesIO(picture.data)) as image:
        # Padding is black; an image whose every value is 0 would be left out as well.
        pixels = image.convert("RGB")
        while len(cells) > 1:
            x, y = cells[-1].x, cells[-1].y
            if pixels.crop((x, y, x + resolution, y + resolution)).getbbox() is not None:
                break
            cells.pop()
    return tuple(cells)


def _stills(run: Run) -> list[tuple[Still, Path | None]]:
    """What a report shows besides the grids of training, in order, with the files if there are."""
    files = sorted(
        path
        for path in [*run.root.glob("*"), *run.root.glob("*/grid.png"), *_compared(run.root)]
        if path.suffix.lower() in _TYPES and not path.name.startswith(".")
    )
    listed: list[tuple[Still, Path | None]] = []
    for still, patterns in _kinds(run):
        mine = [p for p in files if any(fnmatch(str(p.relative_to(run.root)), t) for t in patterns)]
        files = [path for path in files if path not in mine]
        listed += [(still, path) for path in mine]
        if not mine and still.command:
            listed.append((still, None))
    return listed


def _compared(root: Path) -> list[Path]:
    """Pictures in folders of `ganscale compare`, which has written its results beside them."""
    folders = [path.parent for path in root.glob("*/figures.json")]
    return [path for folder in folders for path in folder.glob("*.png") if path.name != "grid.png"]


def _kinds(run: Run) -> list[tuple[Still, tuple[str, ...]]]:
    """What a run may have, with the commands for it, and the names of the files."""
    names = run.classes[:_MAX_CLASSES]
    shards = "SHARDS" if run.config is None else run.config.data.shards or "SHARDS"
    values = {
        "run": shlex.quote(run.place),
        "shards": shlex.quote(shards),
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
