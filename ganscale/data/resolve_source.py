"""What the name or path of a source stands for: found, unpacked or downloaded.

What a folder holds is decided from the files in it, as people copy data sets around without saying
what they are. Where that can be read in two ways, the error names the options that choose.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Literal

from ganscale.data.file_tree import FolderTree
from ganscale.data.layout import (
    Layout,
    Split,
    archives_of,
    is_hidden,
    part_of,
    trained_on,
)
from ganscale.data.sources import SourceSpec, cifar_class
from ganscale.data.tars import check_end
from ganscale.errors import ConfigError, DataError

CIFAR10_ENV = "GANSCALE_CIFAR10"
CIFAR100_ENV = "GANSCALE_CIFAR100"
NAMED_SOURCES = ("auto", "cifar10", "cifar100", "procedural", "spectrograms")
"""Every other source is a path."""
_DOWNLOAD_TIMEOUT_SECONDS = 20.0
_ARCHIVE_ENDS = (".tar", ".tar.gz", ".tgz")
_NUM_SHOWN = 4


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
    # torchvision raises RuntimeError for a download whose md5 is wrong, OSError for no network.
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
    # The published pickles first, in the folder itself or in the one that their archive has.
    for folder in (path, path / "cifar-10-batches-py"):
        if (folder / "data_batch_1").is_file():
            return SourceSpec("cifar10", str(folder.parent), split)
    for folder in (path, path / "cifar-100-python"):
        if (folder / "meta").is_file() and (folder / "train").is_file():
            return SourceSpec("cifar100", str(folder.parent), split)
    tree = FolderTree(path)
    visible = [member for member in tree.members if not is_hidden(member)]
    archives = archives_of(visible)
    # Archives beside images are refused later, where the images are counted.
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
    # A name that follows from the archive's identity: an archive that was changed is unpacked anew,
    # and one that was not is found again by any later process.
    identity = f"{archive.resolve()} {state.st_size} {state.st_mtime_ns}"
    folder = scratch.absolute() / f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if folder.exists():
        return folder
    scratch.mkdir(parents=True, exist_ok=True)
    # Beside the final place and then renamed, so that a folder of that name is always complete.
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=scratch) as temporary:
        try:
            with _decompressed(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                # The filter refuses members that would be written outside the folder.
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
    # torchvision's download has no timeout of its own; a network that drops packets would hang it.
    with _socket_timeout(_DOWNLOAD_TIMEOUT_SECONDS):
        cifar_class(kind)(str(folder), download=True)
    return SourceSpec(kind, str(folder), split)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
