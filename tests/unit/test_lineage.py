"""Which checkpoints belong to a run, told from names and attempts alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganscale.checkpoint.lineage import Attempt, CheckpointName, lineage, prunable


def name(text: str) -> CheckpointName:
    """1000-a1 in the short form of these tests."""
    nimg, attempt = text.split("-a")
    return CheckpointName(int(nimg), int(attempt))


def names(text: str) -> list[CheckpointName]:
    return [name(word) for word in text.split()]


def begun(*starts: str | None) -> list[Attempt]:
    """Attempts 1, 2, ... that start from these checkpoints."""
    return [
        Attempt(number, None if start is None else name(start), 0, str(number), "resume")
        for number, start in enumerate(starts, start=1)
    ]


@pytest.mark.parametrize(
    ("starts", "there", "line"),
    [
        ([], "", ""),
        ([None], "", ""),
        ([None], "1000-a1 3000-a1 2000-a1", "3000-a1 2000-a1 1000-a1"),
        # The example of the module's docstring.
        ([None, "2000-a1"], "1000-a1 2000-a1 3000-a1 2500-a2", "2500-a2 2000-a1 1000-a1"),
        # The successor has written nothing yet.
        ([None, "2000-a1"], "1000-a1 2000-a1 3000-a1", "2000-a1 1000-a1"),
        # Several that ended before they wrote anything.
        ([None, "1000-a1", "1000-a1", "1000-a1"], "1000-a1 2000-a1 2000-a2", "1000-a1"),
        # A rollback goes behind the start of the attempt before: nothing of that one is left.
        ([None, "2000-a1", "1000-a1"], "1000-a1 2000-a1 3000-a2 1500-a3", "1500-a3 1000-a1"),
        # A rollback to a checkpoint of an attempt in the middle, with zombies before and after.
        (
            [None, "1000-a1", "3000-a2", "2000-a2"],
            "1000-a1 9000-a1 2000-a2 3000-a2 8000-a2 4000-a3 2500-a4",
            "2500-a4 2000-a2 1000-a1",
        ),
        # A position that two attempts wrote is the newer one's.
        ([None, "1000-a1"], "1000-a1 2000-a1 2000-a2", "2000-a2 1000-a1"),
        # A fresh start, since no checkpoint was of use, ends the run before.
        ([None, "1000-a1", None], "1000-a1 2000-a2", ""),
        ([None, None], "1000-a1 2000-a1 500-a2", "500-a2"),
        # Where a line starts need not be there any more.
        ([None, "2000-a1"], "1000-a1 4000-a2", "4000-a2 1000-a1"),
        # Of an attempt that nothing is known of.
        ([None], "1000-a1 2000-a7", "1000-a1"),
    ],
)
def test_the_line_of_a_run(starts: list[str | None], there: str, line: str) -> None:
    assert lineage(names(there), begun(*starts)) == names(line)
    assert lineage(reversed(names(there)), begun(*starts)[::-1]) == names(line)


@pytest.mark.parametrize(
    ("keep_last", "special", "gone"),
    [
        (1, "", "1000-a1 3000-a1 2000-a1"),
        (2, "", "1000-a1 3000-a1"),
        (9, "", "3000-a1"),
        (1, "1000-a1", "3000-a1 2000-a1"),
        (1, "3000-a1", "1000-a1 2000-a1"),
    ],
)
def test_all_but_the_newest_and_special_ones_may_go(
    keep_last: int, special: str, gone: str
) -> None:
    there = names("1000-a1 3000-a1 2000-a1 2500-a2 9000-a3")
    line = names("2500-a2 2000-a1 1000-a1")
    found = prunable(there, line, attempt=2, keep_last=keep_last, special=names(special))
    assert found == names(gone)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[CheckpointName], list[Attempt]]:
    """Attempts that start anywhere, and each of which writes on at any time, superseded or not."""
    attempts: list[Attempt] = []
    reached: list[int] = []
    there: list[CheckpointName] = []
    for number in range(1, draw(st.integers(1, 5)) + 1):
        start = draw(st.sampled_from([None, *there]))
        attempts.append(Attempt(number, start, 0, "", "resume"))
        reached.append(0 if start is None else start.nimg)
        for index in draw(st.lists(st.integers(0, number - 1), max_size=4)):
            reached[index] += draw(st.integers(1, 3))
            there.append(CheckpointName(reached[index], index + 1))
    return draw(st.permutations(there)), attempts


@given(histories())
def test_nothing_beyond_where_a_successor_branched_off_is_in_the_line(
    history: tuple[list[CheckpointName], list[Attempt]],
) -> None:
    there, attempts = history
    line = lineage(there, attempts)
    for written in there:
        within = all(
            later.start is not None and written.nimg <= later.start.nimg
            for later in attempts
            if later.number > written.attempt
        )
        assert (written in line) == within
    assert len(set(line)) == len(line)
    assert positions(line) == sorted(positions(line), reverse=True)
    last = attempts[-1]
    assert not line or line[0].attempt == last.number or last.start is not None


def positions(line: list[CheckpointName]) -> list[int]:
    return [written.nimg for written in line]


@given(histories(), st.data(), st.integers(1, 4))
def test_the_newest_of_the_line_and_what_later_attempts_wrote_is_never_doomed(
    history: tuple[list[CheckpointName], list[Attempt]], data: st.DataObject, keep_last: int
) -> None:
    there, attempts = history
    number = data.draw(st.integers(1, len(attempts)))
    known = attempts[: data.draw(st.integers(number, len(attempts)))]
    line = lineage(there, known)
    special = data.draw(st.lists(st.sampled_from(line), max_size=2)) if line else []
    gone = prunable(there, line, attempt=number, keep_last=keep_last, special=special)
    assert all(pruned.attempt <= number for pruned in gone)
    assert not {*line[:keep_last], *special} & {*gone}
    left = [written for written in there if written not in gone]
    assert lineage(left, known)[:keep_last] == line[:keep_last]
    assert all(kept in (*line[:keep_last], *special) for kept in left if kept.attempt <= number)


@given(st.integers(0, 10**12 - 1), st.integers(0, 10**6))
def test_a_name_is_read_as_it_is_printed(nimg: int, attempt: int) -> None:
    printed = CheckpointName(nimg, attempt)
    assert CheckpointName.parse(str(printed)) == printed


def test_a_name_as_it_is_printed() -> None:
    assert str(CheckpointName(50_000_000, 3)) == "nimg-000050000000-a0003"
    assert str(CheckpointName(0, 12_345)) == "nimg-000000000000-a12345"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nimg-000000000007",
        "nimg-7-a1",
        "nimg-000000000007-a1",
        "nimg-000000000007-a00001",
        "nimg-000000000007-a0001/",
        "nimg-000000000007-a0001\n",
        ".tmp-nimg-000000000007-a0001",
        "nimg-00000000000\u0667-a0001",
        "nimg--00000000007-a0001",
    ],
)
def test_what_is_no_name(text: str) -> None:
    assert CheckpointName.parse(text) is None


@pytest.mark.parametrize("start", [None, "1000-a1"])
def test_an_attempt_comes_back_from_json(start: str | None) -> None:
    attempt = Attempt(2, None if start is None else name(start), 3, "ab12", "rollback")
    assert Attempt.from_json(json.loads(json.dumps(attempt.to_json()))) == attempt


def test_an_attempt_in_json() -> None:
    assert Attempt(2, name("1000-a1"), 1, "ab12", "resume").to_json() == {
        "number": 2,
        "start": "nimg-000000001000-a0001",
        "salt": 1,
        "token": "ab12",
        "reason": "resume",
    }


@pytest.mark.parametrize(
    "change",
    [{"start": "nimg-7"}, {"start": 7}, {"number": None}, {"salt": "one"}, {"number": []}],
    ids=str,
)
def test_what_is_no_attempt(change: dict[str, Any]) -> None:
    values = {**Attempt(1, None, 0, "", "start").to_json(), **change}
    with pytest.raises((ValueError, TypeError)):
        Attempt.from_json(values)
    for key in values:
        with pytest.raises(KeyError):
            Attempt.from_json({k: v for k, v in begun(None)[0].to_json().items() if k != key})
