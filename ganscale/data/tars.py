"""Where each sample lies in a WebDataset tar, with every irregularity an error.

tarfile, and webdataset on top of it, take a damaged header for the end of the archive, and half a
shard goes missing without a word. Here an archive must end as archives end, in zeros to the last
byte, and hold plain files with relative names only. Headers tell all of this; only the CRCs of the
images, which an index has, need a pass over the whole file.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import IO

from ganscale.data.layout import ARRAY_SUFFIX, IMAGE_SUFFIXES, is_hidden
from ganscale.data.tally import Tally
from ganscale.errors import DataError

BLOCK_BYTES = tarfile.BLOCKSIZE
_END_BYTES = 2 * BLOCK_BYTES
_CHUNK_BYTES = 2**20
_MAX_LABEL = 2**31 - 1
_NUM_SHOWN = 4


@dataclass(frozen=True)
class TarSample:
    """The image of one sample, or its array where it has no image, and its label."""

    key: str
    """Path of the members up to the first dot of the name, as webdataset has it."""
    block: int
    """The image's bytes start at BLOCK_BYTES * block."""
    num_bytes: int
    crc32: int
    """0 if the tar was scanned without checksums."""
    label: int
    """From `key.cls`; -1 where the sample has none."""
    is_array: bool = False
    """Whether it is an array of floats (npy) instead."""

    @property
    def row(self) -> tuple[int, int, int, int]:
        """The sample's entry in the index."""
        return self.block, self.num_bytes, self.crc32, self.label


def tars_in(folder: Path) -> list[Path]:
    """The tars of a folder in the order of their names, without hidden ones.

    Raises `DataError` for tars that are compressed: images in them cannot be read by offset.
    """
    names = sorted(path.name for path in folder.iterdir() if not is_hidden(path.name))
    tars = [folder / name for name in names if name.lower().endswith(".tar")]
    compressed = [name for name in names if name.lower().endswith((".tar.gz", ".tgz"))]
    if compressed:
        raise DataError(
            f"{folder}: {compressed[0]} is compressed, and tars are read by offset: "
            "gunzip it (gzip -d), or move it out of the folder"
        )
    return tars


def scan_tar(
    path: Path, left_out: Tally | None = None, *, checksums: bool = True
) -> Iterator[TarSample]:
    """The samples of a tar in their order: runs of members with the same key.

    `left_out`, if given, gets a count of hidden members and of fields beside image and label.
    Without `checksums` no image is read. Raises `DataError` naming path and member for a truncated
    or damaged archive, links, names that leave the folder, and samples without an image or with a
    label that is no whole number.
    """
    left_out = Tally() if left_out is None else left_out
    seen: set[str] = set()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            run: list[tarfile.TarInfo] = []
            num_bytes = os.fstat(file.fileno()).st_size
            for member in tar:
                # tarfile believes the size. A negative one takes it back to where it has been, and
                # one beyond the end of the file is an error that does not name the member.
                if not 0 <= member.size <= num_bytes - member.offset_data:
                    raise DataError(f"{path} is truncated or damaged in {member.name}")
                if member.isdir():
                    continue
                _check_member(path, member)
                if is_hidden(member.name):
                    left_out.add("hidden or system files", f"{path.name}: {member.name}")
                    continue
                if run and _key(member) != _key(run[0]):
                    yield _sample(path, file, run, left_out, seen, checksums=checksums)
                    run = []
                run.append(member)
            if run:
                yield _sample(path, file, run, left_out, seen, checksums=checksums)
            check_end(path, file, tar.offset)
    # Besides its own errors, tarfile lets those of number fields and of encodings through.
    except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
        raise DataError(f"{path} is not a valid tar: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _sample(
    path: Path,
    file: IO[bytes],
    run: list[tarfile.TarInfo],
    left_out: Tally,
    seen: set[str],
    *,
    checksums: bool,
) -> TarSample:
    """The sample of the members `run`; its key joins `seen`, those of earlier samples."""
    by_suffix = {_suffix(member): member for member in run}
    # An image goes before an array: other tools put masks or embeddings beside images as npy.
    images = [member for member in run if _suffix(member) in IMAGE_SUFFIXES]
    images = images or [member for member in run if _suffix(member) == ARRAY_SUFFIX]
    if len(images) != 1 or len(by_suffix) != len(run):
        raise DataError(f"{path}: {_not_one_image(run, len(images), seen)}")
    image = images[0]
    seen.add(_key(image))
    for suffix, member in by_suffix.items():
        if member is not image and suffix != "cls":
            left_out.add(f"fields .{suffix} of samples", f"{path.name}: {member.name}")
    label = _label(path, by_suffix["cls"], file) if "cls" in by_suffix else -1
    return TarSample(
        _key(image),
        image.offset_data // BLOCK_BYTES,
        image.size,
        zlib.crc32(_content(path, image, file)) if checksums else 0,
        label,
        is_array=_suffix(image) == ARRAY_SUFFIX,
    )


def _not_one_image(run: list[tarfile.TarInfo], num_images: int, seen: set[str]) -> str:
    """What is wrong with a sample, and what to do about it."""
    key, names = _key(run[0]), [member.name for member in run]
    shown = ", ".join(names[:_NUM_SHOWN]) + (", ..." if len(names) > _NUM_SHOWN else "")
    problem = f"sample {key} needs one image, it has {num_images} ({shown})"
    if key in seen:
        return f"{problem}: the files of a sample must follow each other (tar --sort=name)"
    if any(name.rpartition(".")[2].lower() in IMAGE_SUFFIXES for name in names) and not num_images:
        return f"{problem}: a key ends at the first dot of a file's name, so rename files with dots"
    return problem


def _label(path: Path, member: tarfile.TarInfo, file: IO[bytes]) -> int:
    text = _content(path, member, file).strip()
    # Length first: int() of thousands of digits takes long, or raises another error.
    if not text.isdigit() or len(text) > 10 or int(text) > _MAX_LABEL:
        raise DataError(f"{path}: {member.name} is {text[:20]!r}, not a class number from 0")
    return int(text)


def _content(path: Path, member: tarfile.TarInfo, file: IO[bytes]) -> bytes:
    # pread leaves the position of the file alone, which tarfile is iterating with.
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
