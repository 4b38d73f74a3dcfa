"""Files that a reader sees whole or not at all, whatever kills the writer.

A file is written under a temporary name in the same folder and then renamed, which POSIX file
systems do atomically. Temporary names are hidden and different for each writer, so that several
processes may replace one file at the same time: the last one wins. A writer that is killed leaves
its temporary file behind. New files have the permissions that the umask gives.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ganscale.errors import naming_file


@contextmanager
def replacing(path: Path, *, fsync: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of `path` when the block ends without an error.

    Args:
        path: where the file will be; its folder is made if it does not exist.
        fsync: whether the content is on the disk before the file is renamed. Without, the file may
            be empty or cut off after the machine (not only the process) has crashed, which is right
            only for what can be made again.

    An `OSError` of the block names `path`, and nothing but an earlier file is left there. A device
    or a pipe is written to directly, since renaming a file to its name would remove it.
    """
    if path.exists() and not path.is_file():
        with naming_file(path), path.open("wb") as device:
            yield device
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, as only a rename within one file system is atomic.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with naming_file(path):
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                # Before the rename: file systems may write the new name earlier than the content,
                # and a crash between the two leaves an empty file where a good one was. The folder
                # is not fsynced; if the rename is lost, the earlier file is there, whole.
                if fsync:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # an interrupt too: only a kill may leave the temporary file behind
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, data: bytes, *, fsync: bool = True) -> None:
    """Write a file as `replacing` does."""
    with replacing(path, fsync=fsync) as file:
        file.write(data)


def write_text(path: Path, text: str, *, fsync: bool = True) -> None:
    """Write a file in UTF-8 as `replacing` does."""
    write_bytes(path, text.encode(), fsync=fsync)
