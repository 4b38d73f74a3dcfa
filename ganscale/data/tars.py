"""What lies where in a WebDataset tar, with every irregularity an error.

tarfile, and webdataset on top of it, take a damaged header for the end of the archive: half a shard
goes missing without a word. Here an archive must end as archives end, in zeros to the last byte,
and hold plain files with relative names only.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import IO

from ganscale.errors import DataError

__all__ = [
    "ARRAY_SUFFIX",
    "BLOCK_BYTES",
    "IMAGE_SUFFIXES",
    "TarSample",
    "check_end",
    "scan_tar",
    "trained_on",
]

BLOCK_BYTES = tarfile.BLOCKSIZE
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp")
ARRAY_SUFFIX = "npy"
_END_BYTES = 2 * BLOCK_BYTES
_CHUNK_BYTES = 2**20
_MAX_LABEL = 2**31 - 1


@dataclass(frozen=True)
class TarSample:
    """The image of one sample, or its array where it has no image, and its label."""

    key: str
    """Path of the members up to the first dot of the name, as webdataset has it."""
    block: int
    """The image's bytes start at BLOCK_BYTES * block."""
    num_bytes: int
    crc32: int
    label: int
    """From `key.cls`; -1 where the sample has none."""
    is_array: bool = False
    """Whether it is an array of floats (npy) instead."""

    @property
    def row(self) -> tuple[int, int, int, int]:
        """The sample's entry in the index."""
        return self.block, self.num_bytes, self.crc32, self.label


def scan_tar(path: Path) -> Iterator[TarSample]:
    """The samples of a tar in their order: runs of members with the same key.

    Raises `DataError` naming path and member for a truncated or damaged archive, links, names that
    leave the folder, and samples without an image or with a label that is no whole number.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            run: list[tarfile.TarInfo] = []
            num_bytes = os.fstat(file.fileno()).st_size
            for member in tar:
                if not 0 <= member.size <= num_bytes - member.offset_data:
                    raise DataError(f"{path} is truncated or damaged in {member.name}")
                if member.isdir():
                    continue
                _check_member(path, member)
                if run and _key(member) != _key(run[0]):
                    yield _sample(path, file, run)
                    run = []
                run.append(member)
            if run:
                yield _sample(path, file, run)
            check_end(path, file, tar.offset)
    except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
        raise DataError(f"{path} is not a sound tar: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _sample(path: Path, file: IO[bytes], run: list[tarfile.TarInfo]) -> TarSample:
    by_suffix = {_suffix(member): member for member in run}
    images = [run[place] for place in trained_on([_suffix(member) for member in run])]
    if len(images) != 1 or len(by_suffix) != len(run):
        names = ", ".join(member.name for member in run)
        raise DataError(
            f"{path}: sample {_key(run[0])} needs one image, it has {len(images)} ({names})"
        )
    image = images[0]
    label = _label(path, by_suffix["cls"], file) if "cls" in by_suffix else -1
    data = _content(path, image, file)
    return TarSample(
        _key(image),
        image.offset_data // BLOCK_BYTES,
        len(data),
        zlib.crc32(data),
        label,
        is_array=_suffix(image) == ARRAY_SUFFIX,
    )


def trained_on(suffixes: Sequence[str]) -> list[int]:
    """Which of some files are what is trained on: the images; arrays where there are no images."""
    images = [place for place, suffix in enumerate(suffixes) if suffix in IMAGE_SUFFIXES]
    return images or [place for place, suffix in enumerate(suffixes) if suffix == ARRAY_SUFFIX]


def _label(path: Path, member: tarfile.TarInfo, file: IO[bytes]) -> int:
    text = _content(path, member, file).strip()
    if not text.isdigit() or len(text) > 10 or int(text) > _MAX_LABEL:
        raise DataError(f"{path}: {member.name} is {text[:20]!r}, not a class number")
    return int(text)


def _content(path: Path, member: tarfile.TarInfo, file: IO[bytes]) -> bytes:
    data = os.pread(file.fileno(), member.size, member.offset_data)
    if len(data) != member.size:
        raise DataError(f"{path} is truncated in {member.name}")
    return data


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    if not member.isreg() or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "not a plain file"
        raise DataError(f"{path}: {member.name} is {kind}; shards hold plain files only")
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{path}: the name {member.name} leaves the archive's folder")


def check_end(path: Path, file: IO[bytes] | BufferedIOBase, end_of_members: int) -> None:
    """Raise `DataError` unless only zeros follow the members, as many as end an archive.

    tarfile stops without a word at the first header it cannot read.
    """
    file.seek(end_of_members)
    num_zeros = 0
    while chunk := file.read(_CHUNK_BYTES):
        if chunk.strip(b"\0"):
            raise DataError(
                f"{path} is damaged at byte {end_of_members}: no tar header there, yet more follows"
            )
        num_zeros += len(chunk)
    if num_zeros < _END_BYTES:
        raise DataError(f"{path} is truncated: it has no end-of-archive mark")


def _suffix(member: tarfile.TarInfo) -> str:
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def _key(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"
