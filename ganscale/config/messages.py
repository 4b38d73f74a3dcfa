"""What is wrong with a configuration, in a line that names the field and the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

BY_NAME = ("model", "method")
"""Sections whose `name` decides which fields they have."""
_MAX_SHOWN = 120
"""Characters of a value that a message shows."""


def explain(items: Sequence[Any], names: Sequence[str]) -> str:
    """pydantic's errors in one line of our words; `names` are the valid fields."""
    reasons: dict[str, dict[str, None]] = {}
    for item in items:
        subject, reason = _explain_one(item, names)
        # A value that fits no type of a union has an error for each of them.
        reasons.setdefault(subject, {})[reason] = None
    return "; ".join(
        subject + (f": {', or '.join(texts)}" if any(texts) else "")
        for subject, texts in reasons.items()
    )


def _explain_one(item: Any, names: Sequence[str]) -> tuple[str, str]:
    """What is wrong, and the reason; the reason is empty if the first part states it."""
    place = [str(part) for part in item["loc"]]
    kind = ""
    if len(place) > 1 and place[0] in BY_NAME:
        kind = place.pop(1)  # which architecture or method
    name = ".".join(place)
    message: str = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        if kind and name in names:  # others have it
            return f"{place[0]}.name={kind} has no field {place[1]}", ""
        return unknown_field(name, names), ""
    if item["type"] == "union_tag_invalid":
        tag, expected = item["ctx"]["tag"], item["ctx"]["expected_tags"]
        return f"{name}.name={abbreviated(tag)}", f"expected {expected}"
    if item["type"] == "missing":
        return f"{name} is required", ""
    if item["type"] == "value_error" and len(place) < 2 and name not in names:
        return message, ""  # of a section or of the whole: it names its fields itself
    # What follows a field's name is pydantic's: a member of a union, a place in a list.
    ends = [end for end in range(len(place), 0, -1) if ".".join(place[:end]) in names]
    name = ".".join(place[: ends[0]]) if ends else name
    return f"{name}={abbreviated(item['input'])}", f"{message[0].lower()}{message[1:]}"


def unknown_field(name: str, names: Sequence[str]) -> str:
    """A message that there is no such field, with the most similar one."""
    if name in names:  # as a key of a file, where fields stand inside their sections
        section, _, field = name.rpartition(".")
        return f"field {name!r} must stand inside its section: {section}: {{{field}: ...}}"
    return f"unknown field {abbreviated(name)}{nearest(name, names)}"


def abbreviated(value: Any) -> str:
    """The value as Python writes it, on one line, cut off where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def nearest(name: str, valid: Sequence[str]) -> str:
    """ "; did you mean ...?" if some valid name is like this one."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
