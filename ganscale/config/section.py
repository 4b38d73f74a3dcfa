"""What all sections of a configuration have in common.

Frozen, because a configuration is shared by many parts of a run and stands for its identity.
Unknown fields are refused, as a misspelt one would be a default that nobody chose. Infinities and
NaN are refused everywhere, since no setting has a meaning for them.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Section"]


class Section(BaseModel):
    """A frozen section with finite numbers and without unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
