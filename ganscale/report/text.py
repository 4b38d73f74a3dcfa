"""Numbers and times as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime


def number(value: float | None, digits: int = 4) -> str:
    """A value with so many significant digits; a dash for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if 10**digits <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.{digits - 1}e}"


def kimg(nimg: float | None) -> str:
    """A position in thousands of images."""
    return "–" if nimg is None else f"{nimg / 1000:,.6g} kimg"


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 event, 3 events."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    """Two units at most: 45 s, 5 min 24 s, 3 h 10 min, 2 d 4 h."""
    whole = round(seconds)
    if seconds < 0.05:
        return "less than 0.1 s" if seconds > 0 else "0 s"
    if whole < 60:
        return f"{whole} s" if seconds >= 10 or seconds == whole else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def clock(time: float | None) -> str:
    """A time in seconds since 1970, in UTC."""
    if time is None:
        return "–"
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
