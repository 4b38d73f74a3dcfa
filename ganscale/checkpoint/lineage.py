"""Which checkpoints a run may go on from: a pure function of names and attempts.

An attempt is one start of a run: the first, one after a fault, one at another number of workers, a
rollback. It takes the next number before it writes anything, says which checkpoint it starts from,
and puts its number in the name of each checkpoint it writes. So no two attempts write to one place,
and what an attempt writes after its successor has started (its host was cut off and knows nothing
of it) lies beyond the point where the successor branched off: it is not part of the run. Fencing by
names needs neither a lock nor a clock nor that the old host can be reached.

    a1  ---1000---2000---3000            a1 goes on to 3000, but
                  `-- a2 ---2500---      a2 started from 2000: 2500-a2, 2000-a1, 1000-a1 are the run
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from ganscale.checkpoint.holder import Holder

_NAME = re.compile(r"nimg-(\d{12})-a(\d{4,})")


@dataclass(frozen=True, order=True)
class CheckpointName:
    """A checkpoint's position and the attempt that wrote it."""

    nimg: int
    attempt: int

    def __str__(self) -> str:
        return f"nimg-{self.nimg:012d}-a{self.attempt:04d}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The name that `text` is, if it is one."""
        match = _NAME.fullmatch(text)
        name = None if match is None else cls(int(match[1]), int(match[2]))
        # Written back, so that one checkpoint has one name: "a00001" is not accepted for "a0001".
        return name if str(name) == text else None


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    `num_rollbacks` counts the run's rollbacks so far, this one included. The seed of latents and of
    all other noise depends on it, so training does not repeat the draws that went wrong. `token`
    distinguishes an attempt's own claim from another attempt's with the same number. `holder` is
    the process that started the run; None for an attempt that no process holds.
    """

    number: int
    start: CheckpointName | None
    num_rollbacks: int
    token: str
    reason: Literal["start", "resume", "rollback"]
    holder: Holder | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is written in files."""
        values = {
            "number": self.number,
            "start": None if self.start is None else str(self.start),
            # The files' name for it, kept so that every version reads the claims of the others.
            "salt": self.num_rollbacks,
            "token": self.token,
            "reason": self.reason,
        }
        return values if self.holder is None else {**values, "holder": asdict(self.holder)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises `ValueError`, `KeyError` or `TypeError` on anything but what `to_json` gave."""
        start = values["start"]
        parsed = None if start is None else CheckpointName.parse(start)
        if start is not None and parsed is None:
            raise ValueError(f"{start!r} is no checkpoint")
        holder = values.get("holder")
        return cls(
            number=int(values["number"]),
            start=parsed,
            num_rollbacks=int(values["salt"]),
            token=str(values["token"]),
            reason=values["reason"],
            holder=None if holder is None else Holder(**holder),
        )


def lineage(names: Iterable[CheckpointName], attempts: Sequence[Attempt]) -> list[CheckpointName]:
    """The checkpoints of the run as its latest attempt has it, newest first."""
    names = sorted(names, reverse=True)
    line: list[CheckpointName] = []
    # From the latest attempt backwards, as each start cuts off what older attempts wrote beyond it.
    # The limit only falls: where an attempt went back to before the start of an earlier one,
    # nothing of that earlier one remains.
    limit: int | None = None
    for attempt in sorted(attempts, key=lambda a: a.number, reverse=True):
        line += [
            name
            for name in names
            if name.attempt == attempt.number and (limit is None or name.nimg <= limit)
        ]
        start = 0 if attempt.start is None else attempt.start.nimg
        limit = start if limit is None else min(limit, start)
        # It began the run anew, without any checkpoint; nothing older is part of it.
        if attempt.start is None:
            break
    return line


def prunable(
    names: Iterable[CheckpointName],
    kept_line: Sequence[CheckpointName],
    *,
    attempt: int,
    keep_last: int,
    special: Sequence[CheckpointName] = (),
) -> list[CheckpointName]:
    """What `attempt` may delete: all but the newest `keep_last` of its line and `special` ones.

    Checkpoints of later attempts are never among them. A successor may have begun without this
    attempt knowing. The checkpoint it starts from was then the newest one, so it is among those
    kept.
    """
    keep = {*kept_line[:keep_last], *special}
    return [name for name in names if name.attempt <= attempt and name not in keep]
