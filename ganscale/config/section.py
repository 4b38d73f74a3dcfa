"""What all sections of a configuration have in common.

Frozen, because a configuration is shared by many parts of a run and stands for its identity.
Unknown fields are refused, as a misspelt one would be a default that nobody chose. Infinities and
NaN are refused everywhere, since no setting has a meaning for them.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A frozen section with finite numbers and without unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


def by_name(default: str) -> BeforeValidator:
    """A section of a union by its name alone, or the default one where no name is given."""

    def expand(value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        return {"name": default, **value} if isinstance(value, dict) else value

    return BeforeValidator(expand)
