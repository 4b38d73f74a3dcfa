"""A folder of ratings: which questions are asked in it, and what was answered.

`session.json` says what is rated, and nothing else can be rated in that folder later. It also holds
a random key, from which the tokens of images and questions are derived: without the key they reveal
nothing, and they stay valid when the server is restarted.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout

from ganscale.atomic_files import write_text
from ganscale.errors import ConfigError, DataError
from ganscale.rating.answers import Answer, AnswerLog
from ganscale.rating.contestants import Contestant
from ganscale.rating.questions import ANSWERS, REAL, Question, Task, num_needed, questions_for
from ganscale.rating.results import own_errors

SESSION_NAME, ANSWERS_NAME = "session.json", "answers.jsonl"
_MAX_NAME = 64


@dataclass(frozen=True)
class _Asked:
    question: Question
    token: str


class RatingSession:
    """The state behind the page; may be used by any number of threads."""

    def __init__(
        self,
        folder: Path,
        contestants: Sequence[Contestant],
        *,
        task: Task,
        num: int,
        seed: int,
        reveal: bool = False,
    ) -> None:
        """Start or resume the ratings in `folder`.

        Raises `ConfigError` if they are of something else or another process serves them, and
        `DataError` if there are too few images or they differ in shape.
        """
        _check(contestants, task, num)
        folder.mkdir(parents=True, exist_ok=True)
        self._contestants = {contestant.name: contestant for contestant in contestants}
        self._task, self._num, self._seed, self._reveal = task, num, seed, reveal
        # Two servers would each keep the answers in memory and write at the same place of the file.
        self._lock_file = FileLock(folder / f".{SESSION_NAME}.lock")
        try:
            self._lock_file.acquire(timeout=0)
        except Timeout:
            raise ConfigError(f"{folder}: another ganscale rate serves these ratings") from None
        self._key = _key_of(folder / SESSION_NAME, self._definition())
        self.answers = AnswerLog(folder / ANSWERS_NAME)
        self._asked: dict[str, dict[str, _Asked]] = {}
        self._images: dict[str, bytes] = {}
        self._lock = Lock()

    def close(self) -> None:
        """Close the file of answers and release the folder for other processes."""
        self.answers.close()
        self._lock_file.release()

    def state(self, rater: str) -> dict[str, Any]:
        """A rater's progress and next question, which is None after the last."""
        answered = self.answers.of(rater)
        open_ones = (a for a in self._of(rater).values() if a.question.number not in answered)
        asked = next(open_ones, None)
        *_, height, width = next(iter(self._contestants.values())).shape
        return {
            "rater": rater,
            "task": self._task,
            "size": [width, height],
            "num_questions": self._num,
            "num_answered": len(answered),
            "question": None if asked is None else self._shown(rater, asked),
            "result": own_errors(list(answered.values())) if self._reveal and not asked else None,
        }

    def answer(self, rater: str, token: str, answer: str, response_seconds: float) -> None:
        """Store an answer; one to a question that is answered already changes nothing.

        Raises `ValueError` for what is no answer to a question of this rater.
        """
        asked = self._of(rater).get(token)
        if asked is None or answer not in ANSWERS[self._task]:
            raise ValueError("no such question or answer")
        if not 0 <= response_seconds < math.inf:
            raise ValueError("response_seconds is not a duration")
        truth = tuple(picture.contestant for picture in asked.question.pictures)
        row = Answer(
            time=round(time.time(), 3),
            rater=rater,
            question=asked.question.number,
            task=self._task,
            token=token,
            truth=truth,
            answer=answer,
            correct=_correct(truth, answer),
            response_seconds=round(response_seconds, 3),
            seed=self._seed,
            digests=tuple(self._contestants[name].digest for name in truth),
        )
        self.answers.add(row)

    def image(self, token: str) -> bytes | None:
        """A PNG by the token that a question gave for it."""
        return self._images.get(token)

    def _of(self, rater: str) -> dict[str, _Asked]:
        """A rater's questions by token, in their order."""
        with self._lock:
            if rater not in self._asked:
                pools = {name: len(c) for name, c in self._contestants.items()}
                questions = questions_for(
                    rater, task=self._task, num=self._num, seed=self._seed, pools=pools
                )
                tokens = [self._token(rater, question.number) for question in questions]
                rows = zip(tokens, questions, strict=True)
                self._asked[rater] = {token: _Asked(question, token) for token, question in rows}
            return self._asked[rater]

    def _shown(self, rater: str, asked: _Asked) -> dict[str, Any]:
        number = asked.question.number
        tokens = []
        for place, picture in enumerate(asked.question.pictures):
            tokens.append(self._token(rater, number, place))
            # An image can be fetched only once a question has shown it: nobody can look ahead.
            self._images[tokens[-1]] = self._contestants[picture.contestant].pngs[picture.index]
        return {"number": number, "token": asked.token, "images": tokens}

    def _token(self, rater: str, *place: int) -> str:
        message = json.dumps([rater, *place]).encode()
        # Neither the run nor the number of an image can be computed from its token, as from a plain
        # hash.
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:32]

    def _definition(self) -> dict[str, Any]:
        contestants = [
            {"name": c.name, "digest": c.digest, "num_images": len(c), "description": c.description}
            for c in self._contestants.values()
        ]
        settings = {"task": self._task, "num": self._num, "seed": self._seed}
        return {**settings, "contestants": contestants}


def rater_name(text: str) -> str:
    """The name that answers are filed under: without case and surplus blanks.

    Raises `ValueError` for none, or one that is too long or not printable.
    """
    name = " ".join(text.split()).casefold()
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise ValueError(f"a name has 1 to {_MAX_NAME} letters")
    return name


def _check(contestants: Sequence[Contestant], task: Task, num: int) -> None:
    first = contestants[0]
    needed = num_needed([c.name for c in contestants], task=task, num=num)
    for contestant in contestants:
        if contestant.shape != first.shape:
            raise DataError(
                f"{contestant.name} has images of shape {contestant.shape}, {first.name} of "
                f"{first.shape}: that would give them away"
            )
        if len(contestant) < needed[contestant.name]:
            raise DataError(
                f"{contestant.name} has {len(contestant)} images, a rater may need "
                f"{needed[contestant.name]}: lower --num, or raise --pool"
            )


def _key_of(path: Path, definition: dict[str, Any]) -> bytes:
    """The key of the ratings in the file, which is created if it does not exist."""
    if not path.is_file():
        content = {**definition, "key": secrets.token_hex(16)}
        write_text(path, json.dumps(content, indent=2))
    try:
        stored = json.loads(path.read_text())
        key = bytes.fromhex(stored["key"])
        changes = [
            f"{name}: {before} there, {now} now"
            for name in definition
            if (before := _summary(stored[name])) != (now := _summary(definition[name]))
        ]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged; choose another --out") from None
    if changes:
        raise ConfigError(
            f"{path.parent} holds answers about something else ({'; '.join(changes)}): "
            "repeat the options of the first call, or choose another --out"
        )
    return key


def _summary(value: Any) -> str:
    """A setting as it is compared and reported; where images lie does not matter."""
    if not isinstance(value, list):
        return str(value)
    return ", ".join(f"{c['num_images']} of {c['name']} ({c['digest'][:12]})" for c in value)


def _correct(truth: tuple[str, ...], answer: str) -> bool | None:
    if len(truth) == 1:
        return (truth[0] == REAL) == (answer == "real")
    chosen = truth[ANSWERS["preference"].index(answer)]
    return chosen == REAL if REAL in truth else None
