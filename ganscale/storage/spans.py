"""Bytes of a file that are asked for, and the error where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ganscale.errors import DataError


class Span(NamedTuple):
    """Bytes of a file of a store."""

    name: str
    start: int
    length: int


class MissingData(DataError):
    """A file that is not in the store, or ends before the bytes that were asked for."""

    @classmethod
    def cut_short(cls, where: str | Path, span: Span, num_bytes: int) -> MissingData:
        """Of a file that ended after `num_bytes` of a span."""
        return cls(
            f"{where} is truncated: it ends at byte {span.start + num_bytes} of a sample that "
            f"reaches to byte {span.start + span.length}"
        )
