"""A run's checkpoints: claim the next attempt, write, find the newest, prune, repair.

Several processes may believe that the run is theirs: a host that was cut off from the network goes
on while its successor trains. Nothing here relies on stopping the old one. An attempt gets its
number by creating a file that can be created only once, and says there which checkpoint it starts
from; from these files `lineage` decides which checkpoints are part of the run. An old attempt that
notices its successor stops writing, and what it writes before it notices is not part of the run.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from ganscale.checkpoint.files import MANIFEST, CheckpointFiles, SavedFiles, SavedState, saved_state
from ganscale.checkpoint.holder import Holder, Session, beat_files
from ganscale.checkpoint.lineage import Attempt, CheckpointName, lineage, prunable
from ganscale.errors import CheckpointError

_ATTEMPTS = "attempts"
_DAMAGED = "damaged"
_CLAIM = re.compile(r"attempts/a([0-9]{4,})\.json")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the newest, and those with the best `best_metric`."""

    keep_last: int = 3
    """At least 2, so that the run can go on if the newest one turns out to be damaged."""
    keep_best: int = 0
    best_metric: str = ""
    lowest_is_best: bool = False


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint failed verification and an older one is used."""


class Superseded(CheckpointError):
    """A newer attempt has taken over the run: this process must not write any more."""


class RunInUse(CheckpointError):
    """Another process that is alive holds the run."""


class CheckpointStore(CheckpointFiles):
    """The checkpoints of one run at a path or URL, and the attempts that write them."""

    @property
    def location(self) -> str:
        """Absolute path or URL."""
        return self.backend.location

    def where(self, name: CheckpointName) -> str:
        """Path or URL of a checkpoint."""
        return f"{self.location}/{name}"

    def names(self) -> list[CheckpointName]:
        """The checkpoints that have a manifest, by position, whether they verify or not.

        One listing and no reads; what is in the files is looked at when one of them is needed.
        """
        folders = [f.rpartition("/") for f in self.backend.files()]
        names = [CheckpointName.parse(path) for path, _, file in folders if file == MANIFEST]
        return sorted(name for name in names if name is not None)

    def attempts(self) -> list[Attempt]:
        """The attempts so far, first to last, without those that nothing readable describes.

        A writer that was killed between creating its claim and filling it leaves an empty file. Its
        number is used up, and as an attempt writes nothing before its claim, nothing is missing.
        """
        return [a for n in self._numbers() if (a := self._attempt(n)) is not None]

    def newest_attempt(self) -> Attempt | None:
        """The last of `attempts`; None without any."""
        numbers = reversed(self._numbers())
        return next((a for n in numbers if (a := self._attempt(n)) is not None), None)

    def lineage(self) -> list[CheckpointName]:
        """The checkpoints that the run may go on from, newest first."""
        return lineage(self.names(), self.attempts())

    def newest(
        self, *, up_to: int | None = None, accept: Callable[[Any], str | None] = lambda _: None
    ) -> SavedFiles | None:
        """The newest checkpoint of the run that verifies and decodes, at most at position `up_to`.

        `accept` may say what is wrong with a state. A warning names each checkpoint that is passed
        over.
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

        Two processes that begin at once get different numbers. The later one chooses again, so it
        goes on from what the earlier one leaves. A caller that tries again after an error passes
        the same `token` each time; a claim whose answer was lost then counts as one rollback, not
        as two. The attempt is held by the holder of `session`, if there is one. Raises `RunInUse`
        if another holder that is alive has begun an attempt since the session began.
        """
        token = token or secrets.token_hex(8)
        while True:
            # Of all claims, also unreadable ones: a number that was given out is never reused.
            number = max(self._numbers(), default=0) + 1
            # Claims with this token are our own earlier tries, whose rollback is this very one.
            last = [attempt for attempt in self.attempts() if attempt.token != token][-1:]
            if session is not None:
                # In each round, since the claim that was ahead of ours may be another holder's.
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
            # A client that sends the request again after a lost answer is refused by its own first
            # one; so the claim that is there is read, and the token tells whether it is ours.
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
        `SILENT_SECONDS`; `report` then gets a message for the user.
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
                "--take-over goes on here, and ends that process without a last checkpoint"
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
        # Numbers are consecutive and claims are never removed, so if any newer attempt has begun,
        # the next number is taken. One small request instead of a listing, before every write.
        if self.backend.exists(_claim(attempt.number + 1)):
            raise Superseded(
                f"attempt {attempt.number} of the run in {self.location} is over: a newer one has "
                "begun, and nothing of this one is written any more"
            )

    def write(self, attempt: Attempt, state: SavedState) -> CheckpointName:
        """Write a checkpoint durably. Raises `Superseded`, `OSError` or `StoreError`."""
        # Asked at the beginning, to save the work, and again before the manifest, as writing may
        # take minutes. What slips in between counts for nothing: `lineage` leaves it out.
        self.check_current(attempt)
        return self.write_files(attempt, state, lambda: self.check_current(attempt))

    def copy_newest(
        self, source: CheckpointStore, meta: dict[str, Any], history: bytes
    ) -> tuple[CheckpointName, CheckpointName]:
        """Take over the newest checkpoint of another run that verifies; returns its name there and
        here.

        It is the first one of a new attempt of this run, which shuts out a process that may still
        write to an older attempt; this run's own checkpoints stay behind it. `meta` replaces parts
        of what is stored with it, and `history` holds this run's own rows. Raises `CheckpointError`
        if no checkpoint verifies.
        """
        files = source.newest()
        if files is None:
            raise CheckpointError(f"{source.location} has no checkpoint that verifies to copy")
        state = saved_state(
            files.name.nimg,
            files.state(),
            {**files.meta, **meta, "copied_from": source.where(files.name)},
            history=history,
            metrics=source.metrics(files.name),
        )
        attempt, _ = self.claim(self.newest)
        return files.name, self.write(attempt, state)

    def prune(
        self, attempt: Attempt, retention: Retention, healthy_nimg: int | None = None
    ) -> list[CheckpointName]:
        """Delete the checkpoints that `lineage.prunable` gives; returns their names.

        The newest one up to `healthy_nimg` is kept too. Folders that writers left unfinished are
        deleted as well, so the attempt must not be writing meanwhile.
        """
        names, line = self.names(), self.lineage()
        special = self._best(line, retention)
        if healthy_nimg is not None:
            special += [name for name in line if name.nimg <= healthy_nimg][:1]
        pruned = prunable(
            names, line, attempt=attempt.number, keep_last=retention.keep_last, special=special
        )
        # After the listing and not before it. A successor whose claim comes later has chosen the
        # newest checkpoint that it saw; `keep_last` keeps it here, unless as many more were written
        # between that choice and its claim, which follows at once.
        self.check_current(attempt)
        for name in pruned:
            self.backend.remove_folder(str(name))
        for folder in self.unfinished():
            if folder.attempt <= attempt.number:
                self.backend.remove_folder(folder.path)
        return pruned

    def repair(self) -> list[str]:
        """Move damaged checkpoints to `damaged/` and remove what killed writers left behind.

        Leaves alone what the latest attempt is writing. Returns a line for each change.
        """
        done = []
        for name in self.names():
            problem = self.verify(name)
            if problem is not None:
                # Not deleted: most of it may be intact, and a person may want to rescue that.
                self.backend.move_folder(str(name), f"{_DAMAGED}/{name}")
                done.append(f"{name} was moved to {_DAMAGED}/: {problem}")
        latest = max(self._numbers(), default=0)
        for folder in self.unfinished():
            if folder.attempt < latest:
                self.backend.remove_folder(folder.path)
                done.append(f"{folder.path} was removed: its writer never finished it")
        return done

    def metrics(self, name: CheckpointName) -> dict[str, float]:
        """The metrics stored with a checkpoint; none if its manifest is unreadable."""
        try:
            metrics: dict[str, float] = self.manifest(name)["metrics"]
        except CheckpointError:
            return {}
        return metrics

    def unfinished(self) -> list[Unfinished]:
        """Folders that are no checkpoints: half written, or half deleted."""
        files = self.backend.files()
        whole = {f.rpartition("/")[0] for f in files if f.endswith(f"/{MANIFEST}")}
        folders = {f.partition("/")[0] for f in files if "/" in f} - {_ATTEMPTS, _DAMAGED}
        unfinished = []
        for path in sorted(folders):
            # The names that the local backend gives: .tmp-NAME while a folder is written, and
            # .tmp-removed-NAME while it is deleted. In an object store it is the plain NAME.
            name = CheckpointName.parse(path.rpartition(".tmp-")[2].removeprefix("removed-"))
            if name is not None and (path.startswith(".tmp-") or path not in whole):
                unfinished.append(Unfinished(path, name.attempt))
        return unfinished

    def _best(self, line: Sequence[CheckpointName], retention: Retention) -> list[CheckpointName]:
        """The `keep_best` with the best metric, of those that have one."""
        if not retention.keep_best:
            return []
        # Until the next measurement checkpoints carry the value of the last one. The first that has
        # a value is the one whose weights were measured.
        measured: dict[float, CheckpointName] = {}
        for name in reversed(line):
            score = self.metrics(name).get(retention.best_metric)
            if score is not None and not math.isnan(score):
                measured.setdefault(score, name)
        best = sorted(measured, reverse=not retention.lowest_is_best)[: retention.keep_best]
        return [measured[score] for score in best]

    def _numbers(self) -> list[int]:
        claims = [_CLAIM.fullmatch(file) for file in self.backend.files()]
        return sorted(int(match[1]) for match in claims if match is not None)

    def _attempt(self, number: int) -> Attempt | None:
        """The attempt as its claim describes it, or else as one of its checkpoints does."""
        try:
            claim = Attempt.from_json(json.loads(self.backend.read(_claim(number))))
            if claim.number == number:
                return claim
        except (ValueError, KeyError, TypeError):
            pass
        # A claim that was damaged later must not cost the attempt's checkpoints. Each manifest
        # repeats it for that.
        for name in self.names():
            if name.attempt == number:
                try:
                    return Attempt.from_json(self.manifest(name)["attempt"])
                except CheckpointError:
                    continue
        return None


@dataclass(frozen=True)
class Unfinished:
    """A folder that is no checkpoint, and the attempt whose writer left it."""

    path: str
    attempt: int


def _claim(number: int) -> str:
    return f"{_ATTEMPTS}/a{number:04d}.json"
