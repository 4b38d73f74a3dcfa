"""Where images come from before they are shards: CIFAR, folders, archives, tars, formulas.

A source is a list of encoded images, or of arrays of floats in npy files, with labels and class
names. It is opened by a picklable `SourceSpec`, because shards are built in several processes. Its
order is fixed: the shards, and so the order of training, follow from it.
"""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from ganscale.data import spectrograms
from ganscale.data.arrays import encode_npy
from ganscale.data.encodings import NPY, PNG, Encoding
from ganscale.data.file_tree import open_tree
from ganscale.data.labels import check_labels, numbered_classes
from ganscale.data.layout import (
    Layout,
    Split,
    arrange,
)
from ganscale.data.procedural import CLASSES, SPLIT_SIZES, procedural_image
from ganscale.data.tally import Tally
from ganscale.data.tars import BLOCK_BYTES, TarSample, scan_tar, tars_in
from ganscale.errors import DataError


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
        """What lies beside the images and is not used, counted by reason."""
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

    def part(self, indices: Sequence[int]) -> Source | None:
        """Some images, under their numbers, as a source that can be sent to another process.

        None for sources that are opened there by their spec as quickly.
        """
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


def cifar_class(kind: str) -> Any:
    """torchvision's class of the set: "cifar100" is CIFAR-100, every other kind CIFAR-10."""
    # Imported here: torchvision takes seconds to load, which no other source should wait for.
    from torchvision.datasets import CIFAR10, CIFAR100

    return CIFAR100 if kind == "cifar100" else CIFAR10


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

    def part(self, indices: Sequence[int]) -> None:
        return None


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

    def part(self, indices: Sequence[int]) -> None:
        return None


class _CifarPickles:
    """The published pickles of CIFAR-10 or CIFAR-100, read and checked by md5 by torchvision."""

    encoding = PNG
    left_out = Tally()

    def __init__(self, spec: SourceSpec) -> None:
        kind = cifar_class(spec.kind)
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
        # Nothing of the files: torchvision has compared them with the published md5.
        self.fingerprint = f"{spec.kind} {spec.split}, checked by md5"

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        return f"{self._spec}: {self._spec.split} image {index}"

    def read(self, index: int) -> bytes:
        return _encode_png(Image.fromarray(self._pixels[index]))

    def part(self, indices: Sequence[int]) -> None:
        return None


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
        # Labels too: a changed dataset.json gives other shards of the same files.
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

    def part(self, indices: Sequence[int]) -> None:
        return None


class _WebDataset:
    """The samples of a folder of WebDataset tars, in the order of the tars' names.

    Their headers are read when samples are asked for; the fingerprint needs their sizes and times.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tars = tars_in(path)
        self.left_out = Tally()
        states = [(tar.name, tar.stat()) for tar in self._tars]
        marks = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
        self.fingerprint = hashlib.sha256(repr(marks).encode()).hexdigest()

    # Scanned when it is first needed: it takes a pass over the headers of all tars, and whether
    # shards have to be built at all is decided by the fingerprint.
    @cached_property
    def _samples(self) -> dict[int, tuple[Path, TarSample]]:
        samples = [
            (tar, sample)
            for tar in self._tars
            for sample in scan_tar(tar, self.left_out, checksums=False)
        ]
        if not samples:
            raise DataError(f"{self._path}: the tars hold no samples")
        if len({sample.is_array for _, sample in samples}) > 1:
            raise DataError(f"{self._path}: some samples are images and some are arrays of floats")
        return dict(enumerate(samples))

    @cached_property
    def classes(self) -> Sequence[str]:
        labels = [sample.label for _, sample in self._samples.values()]
        check_labels(labels, str(self._path), self.name)
        return numbered_classes(labels)

    @property
    def encoding(self) -> Encoding:
        _, first = next(iter(self._samples.values()))
        return NPY if first.is_array else PNG

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

    def part(self, indices: Sequence[int]) -> Source:
        # So that no other process has to scan all tars again.
        part = copy.copy(self)
        part._samples = {index: self._samples[index] for index in indices}
        return part


def _encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
