"""Counts by reason, each with an example: what a data set's builder left out or converted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


class Tally:
    """How often each reason occurred, and the first example of it.

    >>> tally = Tally()
    >>> tally.add("hidden files", "cat/.DS_Store")
    >>> str(tally)
    'hidden files: 1, such as cat/.DS_Store'
    """

    def __init__(self, counts: Mapping[str, tuple[int, str]] | None = None) -> None:
        self._counts = {reason: (num, example) for reason, (num, example) in (counts or {}).items()}

    def add(self, reason: str, example: str, num: int = 1) -> None:
        """Count `num` more occurrences; the example of the first call is kept."""
        before, first = self._counts.get(reason, (0, example))
        self._counts[reason] = (before + num, first)

    def __add__(self, other: Tally) -> Tally:
        total = Tally(self._counts)
        for reason, (num, example) in other.items():
            total.add(reason, example, num)
        return total

    def num(self, reason: str) -> int:
        """How often a reason occurred."""
        return self._counts.get(reason, (0, ""))[0]

    def items(self) -> Iterator[tuple[str, tuple[int, str]]]:
        """Pairs of reason and (count, example)."""
        return iter(self._counts.items())

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __str__(self) -> str:
        parts = [f"{reason}: {num}, such as {ex}" for reason, (num, ex) in self._counts.items()]
        return "; ".join(parts)
