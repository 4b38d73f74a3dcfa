"""answers.jsonl: one line for each answer, on the disk before the rater sees the next question.

A rater answers a question once: a second answer, by a double click or from another tab, changes
nothing. Half a line left by a killed process was never confirmed to its rater, so it is cut off.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ganscale.errors import DataError
from ganscale.json_lines import encode_line
from ganscale.rating.questions import ANSWERS


@dataclass(frozen=True)
class Answer:
    """One row of the file; the fields are its keys."""

    time: float
    """Seconds since 1970."""
    rater: str
    question: int
    """The number of the question, from 1."""
    task: str
    token: str
    truth: tuple[str, ...]
    """Name of the run of each image, from the left; `REAL` for a real one."""
    answer: str
    """real or fake, left or right."""
    correct: bool | None
    """None where nothing is right or wrong: a preference between two runs."""
    response_seconds: float
    seed: int
    digests: tuple[str, ...]
    """Digests of the image sets that `truth` names, so that rows can be checked later."""

    @property
    def chosen(self) -> str:
        """The contestant that was preferred."""
        return self.truth[ANSWERS["preference"].index(self.answer)]


class AnswerLog:
    """The answers of a folder, for one process that adds to them from many threads."""

    def __init__(self, path: Path) -> None:
        """Raises `DataError` for a file with a line that is no answer."""
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        # The size of the whole lines is kept here and not asked of the file: after a failed write
        # the file is cut back to it.
        answers, self._size = _whole_lines(path)
        os.ftruncate(self._file, self._size)
        self._answers = {(a.rater, a.question): a for a in answers}
        self._lock = threading.Lock()

    def add(self, answer: Answer) -> None:
        """Append, unless this rater has answered this question; on the disk when it returns.

        Raises `OSError` when it cannot be stored; then the file is as it was.
        """
        with self._lock:
            if (answer.rater, answer.question) in self._answers:
                return
            self._append(encode_line(asdict(answer)))
            self._answers[answer.rater, answer.question] = answer

    def of(self, rater: str) -> dict[int, Answer]:
        """A rater's answers by question."""
        with self._lock:
            return {number: a for (name, number), a in self._answers.items() if name == rater}

    def all(self) -> list[Answer]:
        """All answers in the order in which they were given."""
        with self._lock:
            return list(self._answers.values())

    def close(self) -> None:
        """Nothing is added after this."""
        os.close(self._file)

    def _append(self, line: bytes) -> None:
        try:
            # At its place and not by appending, so that a retry overwrites what a failed write
            # left.
            written = os.pwrite(self._file, line, self._size)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)


def read_answers(path: Path) -> list[Answer]:
    """The answers so far, also while a server adds more; none if there is no file.

    Raises `DataError` that names the line which is no answer.
    """
    return _whole_lines(path)[0] if path.is_file() else []


def _whole_lines(path: Path) -> tuple[list[Answer], int]:
    """The answers, and the bytes that they take."""
    data = path.read_bytes()
    # A line counts when it has its end; -1 becomes 0 for a file without one.
    size = data.rfind(b"\n") + 1
    return list(_parsed(path, data[:size].splitlines())), size


def _parsed(path: Path, lines: Iterable[bytes]) -> Iterable[Answer]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            values = {field.name: row[field.name] for field in fields(Answer)}
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{path}: line {number} is not an answer; remove or repair it"
            ) from None
        lists = {name: tuple(values[name]) for name in ("truth", "digests")}
        yield Answer(**{**values, **lists})
