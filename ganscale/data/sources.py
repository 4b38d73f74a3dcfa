"""Where images come from before they are shards: CIFAR, folders, archives, tars, formulas.

A source is a list of encoded images with labels and class names; or of arrays of floats in npy
files. It is opened by a picklable `SourceSpec`, because shards are built in several processes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import socket
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from ganscale.data import spectrograms
from ganscale.data.arrays import encode_npy
from ganscale.data.encodings import NPY, PNG, Encoding
from ganscale.data.file_tree import FolderTree, open_tree
from ganscale.data.labels import check_labels, numbered_classes
from ganscale.data.layout import (
    Layout,
    Split,
    archives_of,
    arrange,
    is_hidden,
    part_of,
    trained_on,
)
from ganscale.data.procedural import CLASSES, SPLIT_SIZES, procedural_image
from ganscale.data.tally import Tally
from ganscale.data.tars import BLOCK_BYTES, TarSample, check_end, scan_tar, tars_in
from ganscale.errors import ConfigError, DataError

__all__ = [
    "CIFAR10_ENV",
    "CIFAR100_ENV",
    "NAMED_SOURCES",
    "Source",
    "SourceSpec",
    "open_source",
    "resolve_source",
    "source_variable",
]

CIFAR10_ENV = "GANSCALE_CIFAR10"
CIFAR100_ENV = "GANSCALE_CIFAR100"
NAMED_SOURCES = ("auto", "cifar10", "cifar100", "procedural", "spectrograms")
"""Every other source is a path."""
_DOWNLOAD_TIMEOUT_SECONDS = 20.0
_ARCHIVE_ENDS = (".tar", ".tar.gz", ".tgz")
_NUM_SHOWN = 4


class Source(Protocol):
    """Encoded images in a fixed order, with labels."""

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

    @property
    def left_out(self) -> Tally:
        """What lies beside the images and is not among them."""
        ...

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """Class of image `index`; -1 where there are no classes."""
        ...

    def name(self, index: int) -> str:
        """The place of image `index`, for messages: its file, or archive and member."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded image `index`. Raises `DataError` that names it."""
        ...


@dataclass(frozen=True)
class SourceSpec:
    """Which source to open: `kind` and, except for the procedural sets, where it lies."""

    kind: Literal["procedural", "spectrograms", "cifar10", "cifar100", "files", "webdataset"]
    path: str = ""
    split: Split = "train"
    layout: Layout = "auto"
    """How the files of a folder or archive are read."""

    def __str__(self) -> str:
        return self.kind if not self.path else f"{self.kind}:{self.path}"


def resolve_source(
    name: str, split: Split, *, download_dir: str | Path, layout: Layout = "auto"
) -> tuple[SourceSpec, str | None]:
    """Find the images that `name` stands for.

    Args:
        name: "cifar10", "cifar100", "procedural", "spectrograms", "auto" or a path. CIFAR is looked
            for in the folder or archive named by GANSCALE_CIFAR10 or GANSCALE_CIFAR100, else
            downloaded by torchvision; "auto" is CIFAR-10, or the procedural set where that is not
            there and cannot be downloaded.
        split: "train" or "test".
        download_dir: where torchvision puts a download, and archives are unpacked.
        layout: how classes are read from the folders of a path.

    Returns:
        The source, and a plain message for the user when "auto" fell back to the procedural set.

    Raises:
        DataError: the images are not there.
    """
    scratch = Path(download_dir).absolute()
    if name == "procedural":
        return SourceSpec("procedural", split=split), None
    if name == "spectrograms":
        return SourceSpec("spectrograms", split=split), None
    if name not in NAMED_SOURCES:
        return _resolve_path(Path(name).expanduser().absolute(), split, scratch, layout), None
    is_cifar100, variable = name == "cifar100", source_variable(name)
    title = "CIFAR-100" if is_cifar100 else "CIFAR-10"
    location = os.environ.get(variable)
    if location:
        return _resolve_path(Path(location).expanduser().absolute(), split, scratch, layout), None
    try:
        return _download_cifar("cifar100" if is_cifar100 else "cifar10", scratch, split), None
    except (OSError, RuntimeError) as error:
        problem = f"{title} could not be downloaded ({' '.join(str(error).split())})"
        if name != "auto":
            raise DataError(
                f"{problem}. Set {variable} to a local copy, or use source=procedural."
            ) from None
        message = (
            f"{problem} and {variable} is not set: using the procedural CIFAR-shaped set. "
            "Its pictures and scores say nothing about CIFAR-10."
        )
        return SourceSpec("procedural", split=split), message


def source_variable(name: str) -> str:
    """The environment variable that names a local copy of CIFAR for a named source; else ""."""
    return {"cifar100": CIFAR100_ENV, "cifar10": CIFAR10_ENV, "auto": CIFAR10_ENV}.get(name, "")


def open_source(spec: SourceSpec) -> Source:
    """Open what `resolve_source` found."""
    if spec.kind == "procedural":
        return _Procedural(spec.split)
    if spec.kind == "spectrograms":
        return _Spectrograms(spec.split)
    if spec.kind in ("cifar10", "cifar100"):
        return _CifarPickles(spec)
    if spec.kind == "webdataset":
        return _WebDataset(Path(spec.path))
    return _Files(spec)


def _resolve_path(path: Path, split: Split, scratch: Path, layout: Layout) -> SourceSpec:
    if not path.exists():
        raise DataError(f"no such image source: {path}")
    if path.is_dir():
        return _resolve_folder(path, split, scratch, layout)
    name = path.name.lower()
    if name.endswith(".zip"):
        return SourceSpec("files", str(path), split, layout)
    if name.endswith(_ARCHIVE_ENDS):
        return _resolve_folder(_unpacked(path, scratch), split, scratch, layout)
    raise ConfigError(
        f"{path}: expected a folder or archive (.zip, .tar, .tar.gz) of images, or of arrays as "
        ".npy; a folder of WebDataset tars; or CIFAR's cifar-10-batches-py, cifar-100-python or "
        "the archive of one of them"
    )


def _resolve_folder(path: Path, split: Split, scratch: Path, layout: Layout) -> SourceSpec:
    for folder in (path, path / "cifar-10-batches-py"):
        if (folder / "data_batch_1").is_file():
            return SourceSpec("cifar10", str(folder.parent), split)
    for folder in (path, path / "cifar-100-python"):
        if (folder / "meta").is_file() and (folder / "train").is_file():
            return SourceSpec("cifar100", str(folder.parent), split)
    tree = FolderTree(path)
    visible = [member for member in tree.members if not is_hidden(member)]
    archives = archives_of(visible)
    if layout == "tars" or archives and layout == "auto" and not trained_on(visible):
        return _resolve_archives(tree, archives, split, scratch, layout)
    return SourceSpec("files", str(path), split, layout)


def _resolve_archives(
    tree: FolderTree, archives: Sequence[str], split: Split, scratch: Path, layout: Layout
) -> SourceSpec:
    """The set in a folder of archives: WebDataset tars, train.zip and test.zip, or one archive."""
    tars = [member for member in archives if member.lower().endswith(".tar")]
    if not tars and layout == "tars":
        raise DataError(f"{tree.path}: no .tar files, which --layout tars reads")
    if tars and len(tars) < len(archives) and layout != "tars":
        raise DataError(
            f"{tree.path} has .tar files and other archives ({_shown(archives)}): name the archive "
            "by --source, or read the tars by --layout tars"
        )
    if tars:
        prefix = part_of(tree, tars, split, layout, min_depth=0)
        elsewhere = [tar for tar in tars if "/" in tar.removeprefix(prefix)]
        if any(tar.startswith(prefix) for tar in elsewhere):
            raise DataError(
                f"{tree.path} has tars in several folders ({_shown(elsewhere)}): name the folder "
                "of WebDataset tars by --source"
            )
        return SourceSpec("webdataset", str(tree.path / prefix), split)
    parts = [archive for archive in archives if _stem(archive) in ("train", "test")]
    mine = [archive for archive in parts if _stem(archive) == split]
    if parts and not mine:
        raise DataError(f"{tree.path} has {' and '.join(parts)}, but no {split}")
    chosen = mine or archives
    if len(chosen) > 1:
        raise DataError(
            f"{tree.path} has several archives ({_shown(archives)}): name one of them by --source; "
            "WebDataset tars are read uncompressed (gunzip them first)"
        )
    return _resolve_path(tree.path / chosen[0], split, scratch, layout)


def _stem(member: str) -> str:
    return member.rpartition("/")[2].partition(".")[0].lower()


def _shown(members: Sequence[str]) -> str:
    return ", ".join(members[:_NUM_SHOWN]) + (", ..." if len(members) > _NUM_SHOWN else "")


def _unpacked(archive: Path, scratch: Path) -> Path:
    """The archive's content in a folder of its own, unpacked once."""
    state = archive.stat()
    stem = _stem(archive.name)
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


def _download_cifar(kind: Literal["cifar10", "cifar100"], folder: Path, split: Split) -> SourceSpec:
    with _socket_timeout(_DOWNLOAD_TIMEOUT_SECONDS):
        _cifar_class(kind)(str(folder), download=True)
    return SourceSpec(kind, str(folder), split)


def _cifar_class(kind: str) -> Any:
    from torchvision.datasets import CIFAR10, CIFAR100

    return CIFAR100 if kind == "cifar100" else CIFAR10


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
    left_out = Tally()

    def __init__(self, split: Split) -> None:
        self.classes = CLASSES
        self.split = split
        self.fingerprint = f"procedural {split}"

    def __len__(self) -> int:
        return SPLIT_SIZES[self.split]

    def label(self, index: int) -> int:
        return index % len(CLASSES)

    def name(self, index: int) -> str:
        return f"procedural {self.split}: image {index}"

    def read(self, index: int) -> bytes:
        return _encode_png(Image.fromarray(procedural_image(self.split, index)[0]))


class _Spectrograms:
    encoding = NPY
    left_out = Tally()

    def __init__(self, split: Split) -> None:
        self.classes = spectrograms.CLASSES
        self.split = split
        self.fingerprint = f"spectrograms {split}"

    def __len__(self) -> int:
        return spectrograms.SPLIT_SIZES[self.split]

    def label(self, index: int) -> int:
        return index % len(spectrograms.CLASSES)

    def name(self, index: int) -> str:
        return f"spectrograms {self.split}: array {index}"

    def read(self, index: int) -> bytes:
        return encode_npy(spectrograms.spectrogram(self.split, index)[0])


class _CifarPickles:
    """The published pickles of CIFAR-10 or CIFAR-100, read and checked by md5 by torchvision."""

    encoding = PNG
    left_out = Tally()

    def __init__(self, spec: SourceSpec) -> None:
        kind = _cifar_class(spec.kind)
        try:
            dataset = kind(spec.path, train=spec.split == "train")
        except RuntimeError:  # torchvision has compared the md5 of every file
            raise DataError(
                f"{Path(spec.path) / kind.base_folder} is damaged or incomplete: its files' md5 "
                "are not the published ones. Copy it again, or remove it to download it again"
            ) from None
        self.classes: Sequence[str] = dataset.classes
        self._spec = spec
        self._pixels: np.ndarray[Any, np.dtype[np.uint8]] = dataset.data
        self._labels: list[int] = dataset.targets
        self.fingerprint = f"{spec.kind} {spec.split}, checked by md5"

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        return f"{self._spec}: {self._spec.split} image {index}"

    def read(self, index: int) -> bytes:
        return _encode_png(Image.fromarray(self._pixels[index]))


class _Files:
    """The images, or arrays, of a folder or zip archive, in the order of their paths."""

    def __init__(self, spec: SourceSpec) -> None:
        self._tree = open_tree(Path(spec.path))
        arrangement = arrange(self._tree, spec.split, spec.layout)
        self.encoding = NPY if arrangement.are_arrays else PNG
        self.classes: Sequence[str] = arrangement.classes
        self.left_out = arrangement.left_out
        self._members = arrangement.members
        self._labels = arrangement.labels
        marks = [
            (member, label, self._tree.members[member])
            for member, label in zip(self._members, self._labels, strict=True)
        ]
        self.fingerprint = hashlib.sha256(repr((marks, self.classes)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._members)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        return self._tree.name(self._members[index])

    def read(self, index: int) -> bytes:
        return self._tree.read(self._members[index])


class _WebDataset:
    """The samples of a folder of WebDataset tars, in the order of the tars' names.

    The tars are read when their samples are asked for; the fingerprint needs their sizes and times.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tars = tars_in(path)
        self.left_out = Tally()
        states = [(tar.name, tar.stat()) for tar in self._tars]
        marks = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
        self.fingerprint = hashlib.sha256(repr(marks).encode()).hexdigest()

    @cached_property
    def _samples(self) -> list[tuple[Path, TarSample]]:
        samples = [(tar, one) for tar in self._tars for one in scan_tar(tar, self.left_out)]
        if not samples:
            raise DataError(f"{self._path}: the tars hold no samples")
        if len({sample.is_array for _, sample in samples}) > 1:
            raise DataError(f"{self._path}: some samples are images and some are arrays of floats")
        return samples

    @cached_property
    def classes(self) -> Sequence[str]:
        labels = [sample.label for _, sample in self._samples]
        check_labels(labels, str(self._path), self.name)
        return numbered_classes(labels)

    @property
    def encoding(self) -> Encoding:
        return NPY if self._samples[0][1].is_array else PNG

    def __len__(self) -> int:
        return len(self._samples)

    def label(self, index: int) -> int:
        return self._samples[index][1].label

    def name(self, index: int) -> str:
        tar, sample = self._samples[index]
        return f"{tar}: {sample.key}"

    def read(self, index: int) -> bytes:
        tar, sample = self._samples[index]
        with tar.open("rb") as file:
            file.seek(BLOCK_BYTES * sample.block)
            return file.read(sample.num_bytes)


def _encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
