"""The files of a folder or of a zip archive, listed and read alike.

A tree lists its members by their path within it, with `/` between folders, whatever the operating
system or the archiver wrote. Which of them are images, and of which class, is decided by
`ganscale.data.layout` from the paths alone.
"""

from __future__ import annotations

import errno
import os
import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Protocol

from ganscale.data.tally import Tally
from ganscale.errors import DataError


class FileTree(Protocol):
    """Files below one place."""

    path: Path
    """The folder or archive."""
    members: dict[str, str]
    """Each file's path in the tree, and a mark that changes when its content does."""
    folders: list[str]
    """Paths of the folders in the tree, empty ones too."""
    left_out: Tally
    """Entries that are no readable files, such as links to nothing."""

    def read(self, member: str) -> bytes:
        """The bytes of a file. Raises `DataError` that names it."""
        ...

    def name(self, member: str) -> str:
        """A file's place, for messages."""
        ...


class FolderTree:
    """The files of a folder and of all folders in it; links are followed.

    Raises `DataError` if a folder cannot be listed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.members: dict[str, str] = {}
        self.folders: list[str] = []
        self.left_out = Tally()
        self._list(path, "", frozenset())

    def _list(self, folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        """Add the entries of `folder`; `above` are the folders that it lies in."""
        state = folder.stat()
        identity = (state.st_dev, state.st_ino)
        if identity in above:  # a link to a folder above would be followed for ever
            self.left_out.add("links to a folder above them", prefix.rstrip("/"))
            return
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder} cannot be listed: {error.strerror}") from None
        for entry in entries:
            member = prefix + entry.name
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise DataError(f"{folder / entry.name}: {error.strerror}") from None
                self.left_out.add("links that lead to themselves", member)
                continue
            if is_folder:
                self.folders.append(member)
                self._list(folder / entry.name, f"{member}/", above | {identity})
            elif is_file:
                # Size and time, which a listing gives: reading thousands of files to hash them
                # would take as long as building the set.
                status = entry.stat()
                self.members[member] = f"{status.st_size} {status.st_mtime_ns}"
            elif entry.is_symlink():
                self.left_out.add("links to nothing", member)
            else:
                self.left_out.add("entries that are no plain files", member)

    def read(self, member: str) -> bytes:
        """The bytes of a file."""
        try:
            return (self.path / member).read_bytes()
        except OSError as error:
            raise DataError(f"{self.name(member)} cannot be read: {error.strerror}") from None

    def name(self, member: str) -> str:
        """The file's path."""
        return str(self.path / member)


class ZipTree:
    """The files of a zip archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.members: dict[str, str] = {}
        self.folders: list[str] = []
        self.left_out = Tally()
        self._names: dict[str, str] = {}
        try:
            entries = self._archive.infolist()
        except zipfile.BadZipFile as error:
            raise DataError(f"{path}: not a readable zip archive: {error}") from None
        for entry in entries:
            member = _with_slashes(entry.filename)
            # Nothing is unpacked, so such a name does no harm here, but it names no file of a set.
            if ".." in member.split("/"):
                self.left_out.add("names that leave the archive", member)
                continue
            if member.endswith("/"):
                self.folders.append(member.rstrip("/"))
                continue
            if member in self.members:
                self.left_out.add("members that a later one of the same name replaces", member)
            self.members[member] = f"{entry.file_size} {entry.CRC}"
            self._names[member] = entry.filename

    # Kept open: its directory lies at the end and takes long to read for many members.
    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def read(self, member: str) -> bytes:
        """The bytes of a member; its CRC is checked."""
        try:
            return self._archive.read(self._names[member])
        except (zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{self.name(member)} is damaged: {error}") from None
        except (RuntimeError, NotImplementedError) as error:  # encrypted, or an unknown compression
            raise DataError(f"{self.name(member)} cannot be read: {error}") from None

    def name(self, member: str) -> str:
        """Archive and member."""
        return f"{self.path}: {member}"


def open_tree(path: Path) -> FileTree:
    """The tree of a folder or of a .zip file."""
    return FolderTree(path) if path.is_dir() else ZipTree(path)


def _with_slashes(name: str) -> str:
    """The name as a relative path.

    Old archivers on Windows write backslashes between folders; some begin names with "./" or "/".
    """
    return (name if "/" in name else name.replace("\\", "/")).removeprefix("./").lstrip("/")
