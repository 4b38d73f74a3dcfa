"""What is wrong with a configuration, in a line that names the field and the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

__all__ = ["explain", "nearest", "unknown_field"]


def explain(item: Any, names: Sequence[str]) -> str:
    """One of pydantic's errors in our words; `names` are the valid fields."""
    place = [str(part) for part in item["loc"]]
    if len(place) > 1 and place[0] == "model":
        del place[1]  # which architecture
    name = ".".join(place)
    message: str = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return unknown_field(name, names)
    if item["type"] == "union_tag_invalid":
        return f"model.name={item['ctx']['tag']!r}: expected {item['ctx']['expected_tags']}"
    if item["type"] == "value_error" and len(place) < 2:
        return message  # of a section or of the whole: it names its fields itself
    return f"{name}={item['input']!r}: {message[0].lower()}{message[1:]}"


def unknown_field(name: str, names: Sequence[str]) -> str:
    """That there is no such field, and which is like it."""
    return f"unknown field {name!r}{nearest(name, names)}"


def nearest(name: str, valid: Sequence[str]) -> str:
    """ "; did you mean ...?" if some valid name is like this one."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
