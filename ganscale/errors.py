"""What ganscale raises for users: one readable line that says what is wrong and what to do.

Programming errors are asserts; these are for people. The command line prints the message
alone and maps the class to an exit code.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class GanscaleError(Exception):
    """A failure with a message meant for the user (exit code 1)."""


class ConfigError(GanscaleError, ValueError):
    """A wrong setting or wrong use of a command (exit code 2)."""


class DataError(GanscaleError):
    """A data set is missing, damaged or of the wrong kind (exit code 1)."""


class CheckpointError(GanscaleError):
    """A checkpoint or snapshot is missing or damaged (exit code 1)."""


class TrainingFault(GanscaleError):
    """Training went wrong and `guard.policy` says to end it (exit code 1)."""


def base_class(error: GanscaleError) -> type[GanscaleError]:
    """The class of this module that an error belongs to, which callers know and processes share."""
    return next(kind for kind in type(error).__mro__ if kind.__module__ == __name__)


_REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "the quota is used up; delete files, or write to another disk",
    errno.EROFS: "write to a folder on another file system",
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EEXIST: "remove what is there, or choose another path",
    errno.ENOTDIR: "a file is where a folder should be; remove it, or choose another path",
    errno.EISDIR: "a folder is where a file should be; give the path of a file",
    errno.ENOENT: "check the path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EADDRINUSE: "end the program that uses the port, or choose another port",
    errno.ECONNREFUSED: "check the address, and that the server runs",
}


def describe_os_error(error: OSError) -> str:
    """One line that names the file, says what the system refused, and what to do about it."""
    if error.errno is None:  # a library's own error, which has no number but a message
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    if error.errno == errno.ENOENT and error.filename is None:  # all but getcwd() name a file
        return "the current folder no longer exists: change to another one"
    reason = error.strerror or os.strerror(error.errno)
    remedy = _REMEDIES.get(error.errno)
    # Creating a folder where a file is fails with EEXIST, which says nothing about folders.
    if error.errno == errno.EEXIST and error.filename and Path(error.filename).is_file():
        remedy = _REMEDIES[errno.ENOTDIR]
    subject = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    return f"{subject}{reason[0].lower()}{reason[1:]}" + (f": {remedy}" if remedy else "")


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Let an `OSError` of the block name `path`, which the user knows.

    Opening names the file, but writing to it and closing it do not; a full disk shows only there.
    So does one that names a temporary file of `ganscale.atomic_files` beside `path`.
    """
    try:
        yield
    except OSError as error:
        name = Path(str(error.filename)).name
        is_temporary = name.startswith(f".{path.name}.") and name.endswith(".tmp")
        if error.errno is not None and (error.filename is None or is_temporary):
            error.filename = str(path)
        raise
