"""Where images come from before they are shards: CIFAR-10, folders, archives, tars, formulas.

A source is a list of encoded images with keys, labels and class names; or of arrays of floats in
npy files. It is opened by a picklable `SourceSpec`, because shards are built in several processes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import socket
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from ganscale.data import spectrograms
from ganscale.data.arrays import encode_npy
from ganscale.data.encodings import NPY, PNG, Encoding
from ganscale.data.procedural import CLASSES, SPLIT_SIZES, procedural_image
from ganscale.data.tars import (
    ARRAY_SUFFIX,
    BLOCK_BYTES,
    IMAGE_SUFFIXES,
    check_end,
    scan_tar,
    trained_on,
)
from ganscale.errors import ConfigError, DataError

__all__ = ["CIFAR10_ENV", "NAMED_SOURCES", "Source", "SourceSpec", "open_source", "resolve_source"]

Split = Literal["train", "test"]

CIFAR10_ENV = "GANSCALE_CIFAR10"
NAMED_SOURCES = ("auto", "cifar10", "procedural", "spectrograms")
"""All else is a path."""
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_DOWNLOAD_TIMEOUT_SECONDS = 20.0


class Source(Protocol):
    """Images in a fixed order, each with a key, its encoded bytes and a label."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, by label."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for sources that hold the same images, as far as names and sizes tell."""
        ...

    @property
    def encoding(self) -> Encoding:
        """Whether they are images or arrays of floats."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[str, bytes, int]:
        """(key, encoded image, label or -1) of image `index`."""
        ...


@dataclass(frozen=True)
class SourceSpec:
    """Which source to open: `kind` and, except for the procedural sets, where it lies."""

    kind: Literal["procedural", "spectrograms", "cifar10_python", "class_folders", "webdataset"]
    path: str = ""
    split: Split = "train"

    def __str__(self) -> str:
        return self.kind if not self.path else f"{self.kind}:{self.path}"


def resolve_source(
    name: str, split: Split, *, download_dir: str | Path
) -> tuple[SourceSpec, str | None]:
    """Find the images that `name` stands for.

    Args:
        name: "cifar10", "procedural", "spectrograms", "auto" or a path. CIFAR-10 is looked for in
            the folder or archive named by GANSCALE_CIFAR10, else downloaded by torchvision; "auto"
            then falls back to the procedural set.
        split: "train" or "test".
        download_dir: where torchvision puts a download, and archives are unpacked.

    Returns:
        The source, and a plain message for the user when "auto" fell back to the procedural set.

    Raises:
        DataError: the images are not there.
    """
    if name == "procedural":
        return SourceSpec("procedural", split=split), None
    if name == "spectrograms":
        return SourceSpec("spectrograms", split=split), None
    if name not in ("auto", "cifar10"):
        return _resolve_path(Path(name).expanduser().absolute(), split, download_dir), None
    location = os.environ.get(CIFAR10_ENV)
    if location:
        return _resolve_path(Path(location).expanduser().absolute(), split, download_dir), None
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


@lru_cache(maxsize=1)
def open_source(spec: SourceSpec) -> Source:
    """Open what `resolve_source` found."""
    if spec.kind == "procedural":
        return _Procedural(spec.split)
    if spec.kind == "spectrograms":
        return _Spectrograms(spec.split)
    if spec.kind == "cifar10_python":
        return _Cifar10Python(spec.path, spec.split)
    path = Path(spec.path)
    if spec.kind == "webdataset":
        return _WebDataset(path)
    return _ImageZip(path) if path.suffix == ".zip" else _ImageFolder(path)


def _resolve_path(path: Path, split: Split, scratch: str | Path) -> SourceSpec:
    if not path.exists():
        raise DataError(f"no such image source: {path}")
    if path.is_dir():
        return _resolve_folder(path, split)
    if path.suffix == ".zip":
        return SourceSpec("class_folders", str(path), split)
    if path.name.endswith((".tar", ".tar.gz", ".tgz")):
        return _resolve_folder(_unpacked(path, Path(scratch)), split)
    raise ConfigError(
        f"{path}: expected a folder or archive (.zip, .tar, .tar.gz) of images, or of arrays as "
        ".npy, in class folders, a folder of WebDataset tars, or CIFAR-10's cifar-10-batches-py or "
        "cifar-10-python.tar.gz"
    )


def _resolve_folder(path: Path, split: Split) -> SourceSpec:
    for folder in (path, path / "cifar-10-batches-py"):
        if (folder / "data_batch_1").is_file():
            return SourceSpec("cifar10_python", str(folder.parent), split)
    parts = [
        name for name in ("train", "test") for end in ("", ".zip") if (path / (name + end)).exists()
    ]
    if parts and split not in parts:
        raise DataError(f"{path} has {' and '.join(parts)}, but no {split}")
    if (path / f"{split}.zip").is_file():
        return SourceSpec("class_folders", str(path / f"{split}.zip"), split)
    if (path / split).is_dir():
        return _resolve_folder(path / split, split)
    inner = [item for item in path.iterdir() if not item.name.startswith((".", "__MACOSX"))]
    if len(inner) == 1 and any(item.is_dir() for item in inner[0].glob("*/")):
        return _resolve_folder(inner[0], split)  # an archive of one top folder
    if any(path.glob("*.tar")):
        return SourceSpec("webdataset", str(path), split)
    return SourceSpec("class_folders", str(path), split)


def _unpacked(archive: Path, scratch: Path) -> Path:
    """The archive's content in a folder of its own, unpacked once."""
    state = archive.stat()
    stem = archive.name.partition(".tar")[0].removesuffix(".tgz")
    identity = f"{archive.resolve()} {state.st_size} {state.st_mtime_ns}"
    folder = scratch.absolute() / f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if folder.exists():
        return folder
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=scratch) as temporary:
        try:
            with _decompressed(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                tar.extractall(f"{temporary}/content", filter="data")
                check_end(archive, file, tar.offset)
        except (
            tarfile.TarError,
            EOFError,
            OverflowError,
            ValueError,
            zlib.error,
            OSError,
        ) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise DataError(f"{archive} cannot be unpacked: {reason}") from None
        try:
            Path(temporary, "content").rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return folder


def _decompressed(archive: Path) -> BufferedIOBase:
    """The tar's bytes; gzip's own checksum is compared when they are read to the end."""
    file = archive.open("rb")
    if file.peek(2)[:2] != b"\x1f\x8b":
        return file
    file.close()
    return gzip.open(archive, "rb")


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
    encoding = PNG

    def __init__(self, split: Split) -> None:
        self.classes = CLASSES
        self.split = split
        self.fingerprint = f"procedural {split}"

    def __len__(self) -> int:
        return SPLIT_SIZES[self.split]

    def read(self, index: int) -> tuple[str, bytes, int]:
        pixels, label = procedural_image(self.split, index)
        return f"{index:06d}", _encode_png(Image.fromarray(pixels)), label


class _Spectrograms:
    encoding = NPY

    def __init__(self, split: Split) -> None:
        self.classes = spectrograms.CLASSES
        self.split = split
        self.fingerprint = f"spectrograms {split}"

    def __len__(self) -> int:
        return spectrograms.SPLIT_SIZES[self.split]

    def read(self, index: int) -> tuple[str, bytes, int]:
        array, label = spectrograms.spectrogram(self.split, index)
        return f"{index:06d}", encode_npy(array), label


class _Cifar10Python:
    """The published pickles, read (and checked by md5) by torchvision."""

    encoding = PNG

    def __init__(self, root: str, split: Split) -> None:
        from torchvision.datasets import CIFAR10

        try:
            dataset = CIFAR10(root, train=split == "train", download=False)
        except RuntimeError as error:
            raise DataError(f"{root}/cifar-10-batches-py: {error}") from None
        self.classes = CIFAR10_CLASSES
        self._pixels: np.ndarray[Any, np.dtype[np.uint8]] = dataset.data
        self._labels: list[int] = dataset.targets
        self.fingerprint = f"cifar10 {split}, checked by md5"

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[str, bytes, int]:
        image = Image.fromarray(self._pixels[index])
        return f"{index:06d}", _encode_png(image), self._labels[index]


class _ImageTree:
    """`class/name.png` files, or `name.png` without classes, in sorted order, as they are.

    Where there are no images, `.npy` files take their place.
    """

    def __init__(self, path: Path, members: dict[str, str]) -> None:
        """Args: path of the tree; members: each file's path in it and a mark of its content."""
        shown = [member for member in members if not _is_hidden(member)]
        images = [shown[place] for place in trained_on([_suffix(member) for member in shown])]
        classified = [member for member in images if member.count("/") == 1]
        self.members = sorted(classified or (m for m in images if "/" not in m))
        if not self.members:
            raise DataError(
                f"{path}: no images found (class/name.png, or name.png without classes); "
                f"looked for {', '.join(IMAGE_SUFFIXES)}, and {ARRAY_SUFFIX}"
            )
        self.encoding = NPY if _suffix(self.members[0]) == ARRAY_SUFFIX else PNG
        self.path = path
        self.classes = sorted({m.split("/")[0] for m in classified})
        marks = [(member, members[member]) for member in self.members]
        self.fingerprint = hashlib.sha256(repr(marks).encode()).hexdigest()
        self._labels = {name: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> tuple[str, bytes, int]:
        member = self.members[index]
        return f"{index:06d}", self._bytes(member), self._labels.get(member.split("/")[0], -1)

    def _bytes(self, member: str) -> bytes:
        raise NotImplementedError


class _ImageFolder(_ImageTree):
    def __init__(self, path: Path) -> None:
        files = [f for pattern in ("*/*", "*") for f in path.glob(pattern) if f.is_file()]
        super().__init__(path, {f.relative_to(path).as_posix(): _mark(f) for f in files})

    def _bytes(self, member: str) -> bytes:
        return (self.path / member).read_bytes()


class _ImageZip(_ImageTree):
    def __init__(self, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                members = {m.filename: f"{m.file_size} {m.CRC}" for m in archive.infolist()}
        except zipfile.BadZipFile as error:
            raise DataError(f"{path}: not a readable zip archive: {error}") from None
        super().__init__(path, members)

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def _bytes(self, member: str) -> bytes:
        try:
            return self._archive.read(member)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{self.path}: {member} is damaged: {error}") from None
        except RuntimeError as error:  # encrypted, or compressed in an unknown way
            raise DataError(f"{self.path}: {member} cannot be read: {error}") from None


class _WebDataset:
    """The samples of a folder of WebDataset tars, in the order of the tars' names."""

    def __init__(self, path: Path) -> None:
        tars = sorted(path.glob("*.tar"))
        self._samples = [(tar, sample) for tar in tars for sample in scan_tar(tar)]
        if not self._samples:
            raise DataError(f"{path}: the tars hold no samples")
        num_classes = 1 + max(sample.label for _, sample in self._samples)
        self.classes = [str(label) for label in range(num_classes)]
        if len({sample.is_array for _, sample in self._samples}) > 1:
            raise DataError(f"{path}: some samples are images and some are arrays of floats")
        self.encoding = NPY if self._samples[0][1].is_array else PNG
        rows = [(tar.name, sample.row) for tar, sample in self._samples]
        self.fingerprint = hashlib.sha256(repr(rows).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> tuple[str, bytes, int]:
        tar, sample = self._samples[index]
        with tar.open("rb") as file:
            file.seek(BLOCK_BYTES * sample.block)
            return f"{index:06d}", file.read(sample.num_bytes), sample.label


def _suffix(member: str) -> str:
    return member.lower().rpartition(".")[2]


def _is_hidden(member: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in member.split("/"))


def _mark(file: Path) -> str:
    state = file.stat()
    return f"{state.st_size} {state.st_mtime_ns}"


def _encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
