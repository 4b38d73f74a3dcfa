"""A run's checkpoints: claim the next attempt, write, verify, load, prune.

A checkpoint is a folder `nimg-POSITION-aATTEMPT` with

    state.safetensors  all tensors               meta.json      for people: config, versions
    state.json         everything else           metrics.jsonl  the rows logged so far
    manifest.json      sizes, sha256, attempt

It counts when its manifest does and every byte is as the manifest says. What is loaded is what was
verified: the files are read once, hashed in memory, and decoded from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ganscale.checkpoint.encoding import decode, flatten, tensor_file, tree_file
from ganscale.checkpoint.holder import Holder, Session, beat_files
from ganscale.checkpoint.lineage import Attempt, CheckpointName, lineage, prunable
from ganscale.checkpoint.storage_backends import Folder, open_backend
from ganscale.errors import CheckpointError

__all__ = [
    "CheckpointStore",
    "DamagedCheckpointWarning",
    "Retention",
    "RunInUse",
    "SavedFiles",
    "SavedState",
    "Superseded",
]

_TENSORS, _TREE, _META, _HISTORY = "state.safetensors", "state.json", "meta.json", "metrics.jsonl"
_FILES = (_TENSORS, _TREE, _META, _HISTORY)
_MANIFEST = "manifest.json"
_ATTEMPTS = "attempts"
_DAMAGED = "damaged"
_CLAIM = re.compile(r"attempts/a([0-9]{4,})\.json")
_FORMAT = 2

Bytes = bytes | memoryview


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the newest, and those with the best `best_metric`."""

    keep_last: int = 3
    keep_best: int = 0
    best_metric: str = ""
    lowest_is_best: bool = False


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint failed verification and an older one is used."""


class Superseded(CheckpointError):
    """A newer attempt has taken over the run: this process must not write any more."""


class RunInUse(CheckpointError):
    """Another process that is alive holds the run."""


@dataclass(frozen=True)
class SavedState:
    """What is written: a state as a tree and tensors on the CPU, and what goes with it."""

    nimg: int
    tree: Any
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]
    history: bytes = b""
    metrics: Mapping[str, float] | None = None
    """Values of metrics at this position, by which the best checkpoints are told."""
    healthy_nimg: int | None = None
    """The newest checkpoint up to here is kept, as one to go back to."""


@dataclass(frozen=True)
class SavedFiles:
    """A checkpoint that has been read and verified."""

    name: CheckpointName
    tree: bytes
    tensors: bytes
    meta: dict[str, Any]
    history: bytes

    def state(self) -> Any:
        """The state, on the CPU. Raises `CheckpointError` if the files are not of one state."""
        return decode(self.tree, self.tensors)


class CheckpointStore:
    """The checkpoints of one run at a path or URL; see the module's docstring."""

    def __init__(self, location: str | Path) -> None:
        self.backend = open_backend(location)

    @property
    def location(self) -> str:
        """Absolute path or URL."""
        return self.backend.location

    def where(self, name: CheckpointName) -> str:
        """Path or URL of a checkpoint."""
        return f"{self.location}/{name}"

    def names(self) -> list[CheckpointName]:
        """The checkpoints that have a manifest, by position, whether they verify or not."""
        folders = [f.rpartition("/") for f in self.backend.files()]
        names = [CheckpointName.parse(path) for path, _, file in folders if file == _MANIFEST]
        return sorted(name for name in names if name is not None)

    def attempts(self) -> list[Attempt]:
        """The attempts so far, first to last; one whose claim is unreadable wrote nothing else."""
        return [a for n in self._numbers() if (a := self._attempt(n)) is not None]

    def newest_attempt(self) -> Attempt | None:
        """The last of `attempts`; None without any."""
        numbers = reversed(self._numbers())
        return next((a for n in numbers if (a := self._attempt(n)) is not None), None)

    def lineage(self) -> list[CheckpointName]:
        """The checkpoints that the run may go on from, newest first."""
        return lineage(self.names(), self.attempts())

    def verify(self, name: CheckpointName) -> str | None:
        """What is wrong with a checkpoint, in a few words; None if every byte is as written."""
        try:
            manifest = self._manifest(name)
            for file in _FILES:
                digest = hashlib.sha256()
                num_bytes = 0
                for chunk in self._chunks(name, file):
                    digest.update(chunk)
                    num_bytes += len(chunk)
                _compare(file, num_bytes, digest.hexdigest(), manifest["files"][file])
        except CheckpointError as error:
            return str(error)
        return None

    def read(self, name: CheckpointName) -> SavedFiles:
        """The files of a checkpoint. Raises `CheckpointError` if it does not verify."""
        data = self._read(name, _FILES)
        return SavedFiles(name, data[_TREE], data[_TENSORS], _meta(data), data[_HISTORY])

    def describe(self, name: CheckpointName) -> tuple[dict[str, Any], bytes]:
        """The `meta` and `history` of `read`, without the state that goes with them."""
        data = self._read(name, (_META, _HISTORY))
        return _meta(data), data[_HISTORY]

    def newest(
        self, *, up_to: int | None = None, accept: Callable[[Any], str | None] = lambda _: None
    ) -> SavedFiles | None:
        """The newest checkpoint of the run that verifies and decodes, at most at position `up_to`.

        `accept` may say what is wrong with a state. A checkpoint that is passed over is warned of
        by name.
        """
        for name in self.lineage():
            if up_to is not None and name.nimg > up_to:
                continue
            try:
                files = self.read(name)
                problem = accept(files.state())
            except CheckpointError as error:
                problem = str(error)
            if problem is None:
                return files
            warnings.warn(
                f"checkpoint {self.where(name)} is damaged: {problem}; trying an older one",
                DamagedCheckpointWarning,
                stacklevel=2,
            )
        return None

    def claim(
        self,
        choose: Callable[[], SavedFiles | None],
        *,
        reason: Literal["resume", "rollback"] = "resume",
        token: str | None = None,
        session: Session | None = None,
    ) -> tuple[Attempt, SavedFiles | None]:
        """Begin an attempt from the checkpoint that `choose` finds.

        Two that begin at once get different numbers, and the later one chooses again, so that it
        goes on from what the earlier one leaves. Whoever asks again after an error gives the same
        `token` each time: a claim whose answer was lost then does not count as a rollback more.
        The attempt is held by the holder of `session`, if there is one. Raises `RunInUse` if
        another holder that is alive has begun an attempt since the session began.
        """
        token = token or secrets.token_hex(8)
        while True:
            number = max(self._numbers(), default=0) + 1
            last = [attempt for attempt in self.attempts() if attempt.token != token][-1:]
            if session is not None:
                self.require_free(session.holder, session.newest_attempt)
                # Before the claim, as an attempt whose holder has no such file is free.
                session.holder.beat(self.backend)
            files = choose()
            attempt = Attempt(
                number=number,
                start=None if files is None else files.name,
                num_rollbacks=(last[0].num_rollbacks if last else 0) + (reason == "rollback"),
                token=token,
                reason=reason if files is not None or reason == "rollback" else "start",
                holder=None if session is None else session.holder,
            )
            data = json.dumps(attempt.to_json(), indent=1).encode()
            if self.backend.create(_claim(number), data) or self._attempt(number) == attempt:
                if session is not None:
                    self._forget_other_holders(session.holder)
                return attempt, files

    def require_free(
        self,
        holder: Holder,
        newest_known: int = 0,
        report: Callable[[str], None] = lambda text: None,
    ) -> int:
        """The number of the newest attempt, 0 without any, if `holder` may begin another.

        Raises `RunInUse` if another holder began it and is alive, unless its number is at most
        `newest_known`: then the caller has decided that already. Finding out may take
        `SILENT_SECONDS`; `report` is told then.
        """
        attempt = self.newest_attempt()
        if attempt is None:
            return 0
        other = attempt.holder
        if attempt.number <= newest_known or other is None or other.session == holder.session:
            return attempt.number
        if other.is_alive(self.backend, report):
            raise RunInUse(
                f"the run in {self.location} is in use by {other}: wait for its end or stop it; "
                "--take-over goes on here, and ends that one without a last checkpoint"
            )
        return attempt.number

    def _forget_other_holders(self, holder: Holder) -> None:
        """Remove the files of holders that are dead or have just lost the run."""
        with suppress(Exception):  # a file that stays says nothing: its attempt is not the newest
            for file in beat_files(self.backend.files()):
                if file != holder.beat_file:
                    self.backend.remove(file)

    def check_current(self, attempt: Attempt) -> None:
        """Raise `Superseded` if another attempt has begun since."""
        if self.backend.exists(_claim(attempt.number + 1)):
            raise Superseded(
                f"attempt {attempt.number} of the run in {self.location} is over: a newer one has "
                "begun, and nothing of this one is written any more"
            )

    def write(self, attempt: Attempt, state: SavedState) -> CheckpointName:
        """Write a checkpoint durably. Raises `Superseded`, `OSError` or the store's own error."""
        self.check_current(attempt)
        name = CheckpointName(state.nimg, attempt.number)
        described: dict[str, dict[str, Any]] = {}

        def add(folder: Folder, file: str, pieces: Iterable[Bytes]) -> None:
            digest, num_bytes = hashlib.sha256(), 0

            def measured() -> Iterable[Bytes]:
                nonlocal num_bytes
                for piece in pieces:
                    digest.update(piece)
                    num_bytes += len(piece)
                    yield piece

            folder.add(file, measured())
            described[file] = {"num_bytes": num_bytes, "sha256": digest.hexdigest()}

        with self.backend.new_folder(str(name)) as folder:
            add(folder, _TENSORS, tensor_file(state.tensors))
            add(folder, _TREE, [tree_file(state.tree)])
            # The digest of the tensors is there for people who compare two runs by eye.
            meta = {**state.meta, "tensors_sha256": described[_TENSORS]["sha256"]}
            add(folder, _META, [json.dumps(meta, indent=2).encode()])
            add(folder, _HISTORY, [state.history])
            manifest = {
                "format": _FORMAT,
                "nimg": state.nimg,
                "attempt": attempt.to_json(),
                "metrics": dict(state.metrics or {}),
                "files": described,
            }
            self.check_current(attempt)
            folder.add(_MANIFEST, [_sealed(manifest)])
        return name

    def prune(
        self, attempt: Attempt, retention: Retention, healthy_nimg: int | None = None
    ) -> list[CheckpointName]:
        """Delete what need not be kept, as `lineage.prunable` says; returns what was deleted.

        The newest up to `healthy_nimg` is kept too. What writers left unfinished goes as well, so
        the attempt must not be writing meanwhile.
        """
        names, line = self.names(), self.lineage()
        special = self._best(line, retention)
        if healthy_nimg is not None:
            special += [name for name in line if name.nimg <= healthy_nimg][:1]
        pruned = prunable(
            names, line, attempt=attempt.number, keep_last=retention.keep_last, special=special
        )
        # After the choice: what a newer attempt starts from was the newest one then.
        self.check_current(attempt)
        for name in pruned:
            self.backend.remove_folder(str(name))
        for folder in self.unfinished():
            if folder.attempt <= attempt.number:
                self.backend.remove_folder(folder.path)
        return pruned

    def repair(self) -> list[str]:
        """Put damaged checkpoints aside in `damaged/`, remove what killed writers left behind.

        Leaves alone what the latest attempt is writing. Returns what was done, a line each.
        """
        done = []
        for name in self.names():
            problem = self.verify(name)
            if problem is not None:
                self.backend.move_folder(str(name), f"{_DAMAGED}/{name}")
                done.append(f"{name} put aside in {_DAMAGED}/: {problem}")
        latest = max(self._numbers(), default=0)
        for folder in self.unfinished():
            if folder.attempt < latest:
                self.backend.remove_folder(folder.path)
                done.append(f"{folder.path} removed: its writer never finished it")
        return done

    def metrics(self, name: CheckpointName) -> dict[str, float]:
        """The metrics noted with a checkpoint; none if its manifest is unreadable."""
        try:
            metrics: dict[str, float] = self._manifest(name)["metrics"]
        except CheckpointError:
            return {}
        return metrics

    def unfinished(self) -> list[Unfinished]:
        """Folders that writers which are gone left behind."""
        files = self.backend.files()
        whole = {f.rpartition("/")[0] for f in files if f.endswith(f"/{_MANIFEST}")}
        folders = {f.partition("/")[0] for f in files if "/" in f} - {_ATTEMPTS, _DAMAGED}
        unfinished = []
        for path in sorted(folders):
            name = CheckpointName.parse(path.rpartition(".tmp-")[2].removeprefix("removed-"))
            if name is not None and (path.startswith(".tmp-") or path not in whole):
                unfinished.append(Unfinished(path, name.attempt))
        return unfinished

    def _best(self, line: Sequence[CheckpointName], retention: Retention) -> list[CheckpointName]:
        """The `keep_best` with the best metric, of those that have one."""
        if not retention.keep_best:
            return []
        scores = {name: self.metrics(name).get(retention.best_metric) for name in line}
        scored = [
            (score, name)
            for name, score in scores.items()
            if score is not None and not math.isnan(score)
        ]
        scored.sort(reverse=not retention.lowest_is_best)
        return [name for _, name in scored[: retention.keep_best]]

    def _numbers(self) -> list[int]:
        claims = [_CLAIM.fullmatch(file) for file in self.backend.files()]
        return sorted(int(match[1]) for match in claims if match is not None)

    def _attempt(self, number: int) -> Attempt | None:
        """What a claim says; if it is unreadable, what a checkpoint of that attempt says of it."""
        try:
            claim = Attempt.from_json(json.loads(b"".join(self.backend.chunks(_claim(number)))))
            if claim.number == number:
                return claim
        except (ValueError, KeyError, TypeError):
            pass
        for name in self.names():
            if name.attempt == number:
                try:
                    return Attempt.from_json(self._manifest(name)["attempt"])
                except CheckpointError:
                    continue
        return None

    def _chunks(self, name: CheckpointName, file: str) -> Iterable[bytes]:
        try:
            yield from self.backend.chunks(f"{name}/{file}")
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing") from None
        except IsADirectoryError:
            raise CheckpointError(f"{file} is a directory") from None

    def _read(self, name: CheckpointName, files: Sequence[str]) -> dict[str, bytes]:
        """Some of a checkpoint's files, verified."""
        manifest = self._manifest(name)
        data = {}
        for file in files:
            data[file] = b"".join(self._chunks(name, file))
            digest = hashlib.sha256(data[file]).hexdigest()
            _compare(file, len(data[file]), digest, manifest["files"][file])
        return data

    def _manifest(self, name: CheckpointName) -> dict[str, Any]:
        data = b"".join(self._chunks(name, _MANIFEST))
        try:
            manifest: dict[str, Any] = json.loads(data)
            seal = manifest.pop("sha256")
            if seal != _seal(manifest) or data != _sealed(manifest):
                raise CheckpointError(f"{_MANIFEST} has the wrong sha256")
            attempt = Attempt.from_json(manifest["attempt"])
            if (manifest["nimg"], attempt.number) != (name.nimg, name.attempt):
                raise CheckpointError(f"{_MANIFEST} is that of another checkpoint")
            if set(manifest["files"]) != set(_FILES) or manifest["format"] != _FORMAT:
                raise CheckpointError(f"{_MANIFEST} does not list {', '.join(_FILES)}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{_MANIFEST} is unreadable ({type(error).__name__})") from None
        return manifest


@dataclass(frozen=True)
class Unfinished:
    """A folder that is no checkpoint, and the attempt whose writer left it."""

    path: str
    attempt: int


def saved_state(nimg: int, state: Any, meta: Mapping[str, Any], **more: Any) -> SavedState:
    """A state as it is written, from nested containers of tensors on the CPU."""
    tree, tensors = flatten(state)
    return SavedState(nimg, tree, tensors, meta, **more)


def _meta(data: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads(data[_META])
    except ValueError as error:
        raise CheckpointError(f"{_META} is unreadable ({type(error).__name__})") from None
    return meta


def _claim(number: int) -> str:
    return f"{_ATTEMPTS}/a{number:04d}.json"


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps({**manifest, "sha256": _seal(manifest)}, indent=2).encode()


def _compare(file: str, num_bytes: int, sha256: str, expected: Mapping[str, Any]) -> None:
    if num_bytes != expected["num_bytes"]:
        raise CheckpointError(f"{file} has {num_bytes} bytes, expected {expected['num_bytes']}")
    if sha256 != expected["sha256"]:
        raise CheckpointError(f"{file} has the wrong sha256")
