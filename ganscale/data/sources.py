"""Where images come from before they are shards: CIFAR-10, folders, archives, formulas.

A source is a list of PNG-encoded images with keys, labels and class names. It is opened by a
picklable `SourceSpec`, because the shards are built in several processes.
"""

from __future__ import annotations

import io
import os
import socket
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from ganscale.data.procedural import CLASSES, SPLIT_SIZES, procedural_image
from ganscale.errors import ConfigError, DataError

__all__ = ["CIFAR10_ENV", "Source", "SourceSpec", "open_source", "resolve_source"]

Split = Literal["train", "test"]

CIFAR10_ENV = "GANSCALE_CIFAR10"
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_DOWNLOAD_TIMEOUT_SECONDS = 20.0


class Source(Protocol):
    """Images in a fixed order, each with a key, a PNG and a label."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, by label."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[str, bytes, int]:
        """(key, PNG bytes, label) of image `index`."""
        ...


@dataclass(frozen=True)
class SourceSpec:
    """Which source to open: `kind` and, except for the procedural set, where it lies."""

    kind: Literal["procedural", "cifar10_python", "class_folders"]
    path: str = ""
    split: Split = "train"

    def __str__(self) -> str:
        return self.kind if not self.path else f"{self.kind}:{self.path}"


def resolve_source(
    name: str, split: Split, *, download_dir: str | Path
) -> tuple[SourceSpec, str | None]:
    """Find the images that `name` stands for.

    Args:
        name: "cifar10", "procedural", "auto" or a path. CIFAR-10 is looked for in the folder or
            archive named by GANSCALE_CIFAR10, else downloaded by torchvision; "auto" then falls
            back to the procedural set.
        split: "train" or "test".
        download_dir: where torchvision puts a download.

    Returns:
        The source, and a plain message for the user when "auto" fell back to the procedural set.

    Raises:
        DataError: the images are not there.
    """
    if name == "procedural":
        return SourceSpec("procedural", split=split), None
    if name not in ("auto", "cifar10"):
        return _resolve_path(Path(name).expanduser().absolute(), split), None
    location = os.environ.get(CIFAR10_ENV)
    if location:
        return _resolve_path(Path(location).expanduser().absolute(), split), None
    try:
        return _download_cifar10(Path(download_dir).absolute(), split), None
    except (OSError, RuntimeError) as error:
        problem = f"CIFAR-10 could not be downloaded ({' '.join(str(error).split())})"
        if name == "cifar10":
            raise DataError(
                f"{problem}. Set {CIFAR10_ENV} to a local copy, or use source=procedural."
            ) from None
        message = (
            f"{problem} and {CIFAR10_ENV} is not set: using the procedural CIFAR-shaped set. "
            "Its pictures and scores say nothing about CIFAR-10."
        )
        return SourceSpec("procedural", split=split), message


def open_source(spec: SourceSpec) -> Source:
    """Open what `resolve_source` found."""
    if spec.kind == "procedural":
        return _Procedural(spec.split)
    if spec.kind == "cifar10_python":
        return _Cifar10Python(spec.path, spec.split)
    path = Path(spec.path)
    return _ClassFolderZip(path) if path.suffix == ".zip" else _ClassFolders(path)


def _resolve_path(path: Path, split: Split) -> SourceSpec:
    if not path.exists():
        raise DataError(f"no such image source: {path}")
    if path.is_dir():
        for folder in (path, path / "cifar-10-batches-py"):
            if (folder / "data_batch_1").is_file():
                return SourceSpec("cifar10_python", str(folder.parent), split)
        for inside in (path / f"{split}.zip", path / split):
            if inside.exists():
                return SourceSpec("class_folders", str(inside), split)
        return SourceSpec("class_folders", str(path), split)
    if path.suffix == ".zip":
        return SourceSpec("class_folders", str(path), split)
    raise ConfigError(
        f"{path}: expected a folder of class folders, a .zip of them, or CIFAR-10's "
        "cifar-10-batches-py"
    )


def _download_cifar10(folder: Path, split: Split) -> SourceSpec:
    from torchvision.datasets import CIFAR10

    with _socket_timeout(_DOWNLOAD_TIMEOUT_SECONDS):
        CIFAR10(str(folder), download=True)
    return SourceSpec("cifar10_python", str(folder), split)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


class _Procedural:
    def __init__(self, split: Split) -> None:
        self.classes = CLASSES
        self.split = split

    def __len__(self) -> int:
        return SPLIT_SIZES[self.split]

    def read(self, index: int) -> tuple[str, bytes, int]:
        pixels, label = procedural_image(self.split, index)
        return f"{index:06d}", _encode_png(Image.fromarray(pixels)), label


class _Cifar10Python:
    """The published pickles, read (and checked by md5) by torchvision."""

    def __init__(self, root: str, split: Split) -> None:
        from torchvision.datasets import CIFAR10

        try:
            dataset = CIFAR10(root, train=split == "train", download=False)
        except RuntimeError as error:
            raise DataError(f"{root}/cifar-10-batches-py: {error}") from None
        self.classes = CIFAR10_CLASSES
        self._pixels: np.ndarray[Any, np.dtype[np.uint8]] = dataset.data
        self._labels: list[int] = dataset.targets

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[str, bytes, int]:
        image = Image.fromarray(self._pixels[index])
        return f"{index:06d}", _encode_png(image), self._labels[index]


class _ClassFolderTree:
    """`class/name.png` files; classes and files in sorted order. PNGs are passed on untouched."""

    def __init__(self, path: Path, members: list[str]) -> None:
        images = [m for m in members if m.count("/") == 1 and _is_image(m)]
        if not images:
            raise DataError(
                f"{path}: no images in class folders (class/name.png) found; "
                f"looked for {', '.join(_IMAGE_SUFFIXES)}"
            )
        self.path = path
        self.members = sorted(images)
        self.classes = sorted({m.split("/")[0] for m in images})
        self._labels = {name: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> tuple[str, bytes, int]:
        member = self.members[index]
        folder = member.split("/")[0]
        return f"{index:06d}", self._png(member), self._labels[folder]

    def _png(self, member: str) -> bytes:
        data = self._bytes(member)
        if member.lower().endswith(".png"):
            return data
        try:
            with Image.open(io.BytesIO(data)) as image:
                return _encode_png(image)
        except OSError as error:
            raise DataError(f"{self.path}: {member} is not readable: {error}") from None

    def _bytes(self, member: str) -> bytes:
        raise NotImplementedError


class _ClassFolders(_ClassFolderTree):
    def __init__(self, path: Path) -> None:
        members = [f.relative_to(path).as_posix() for f in path.glob("*/*") if f.is_file()]
        super().__init__(path, members)

    def _bytes(self, member: str) -> bytes:
        return (self.path / member).read_bytes()


class _ClassFolderZip(_ClassFolderTree):
    def __init__(self, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
        except zipfile.BadZipFile as error:
            raise DataError(f"{path}: not a readable zip archive: {error}") from None
        super().__init__(path, members)

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def _bytes(self, member: str) -> bytes:
        return self._archive.read(member)


def _is_image(member: str) -> bool:
    return member.lower().endswith(_IMAGE_SUFFIXES) and not member.startswith((".", "__MACOSX"))


def _encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
