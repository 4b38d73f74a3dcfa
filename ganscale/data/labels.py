"""Class labels: whole numbers from 0, of all samples of a set or of none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ganscale.errors import ConfigError, DataError

# Below a thousand any label passes, as small subsets of sets such as ImageNet have gaps.
_SPARSE_CLASSES = 1000
_CLASSES_PER_SAMPLE = 10


def check_labels(labels: ArrayLike, place: str, name: Callable[[int], str]) -> None:
    """Refuse labels that some samples lack, or that cannot be class numbers.

    A set has as many classes as its greatest label says, so one stray label, such as a time stamp,
    would make billions of them. A subset of a set of many classes is fine.

    Args:
        labels: integers (N,), -1 where a sample has none.
        place: the set, for the message.
        name: the name of a sample by its number, for the message.

    Raises:
        DataError: labels that are missing for some samples only, or of 1,000 or more and above ten
            times the number of samples.
    """
    values = np.asarray(labels, np.int64)
    missing = np.flatnonzero(values < 0)
    if 0 < len(missing) < len(values):
        raise DataError(
            f"{place}: {len(missing)} of {len(values)} samples have no label, such as "
            f"{name(int(missing[0]))}; label all samples or none"
        )
    limit = max(_SPARSE_CLASSES, _CLASSES_PER_SAMPLE * len(values))
    beyond = np.flatnonzero(values >= limit)
    if len(beyond):
        first = int(beyond[0])
        raise DataError(
            f"{place}: {len(beyond)} of {len(values)} samples have a label of {limit} or more, "
            f"such as {values[first]} of {name(first)}; labels are class numbers that count from 0"
        )


def numbered_classes(labels: ArrayLike) -> tuple[str, ...]:
    """Names for classes that have only numbers ("0", "1", ...); empty where there are no labels."""
    return tuple(str(label) for label in range(int(np.max(np.asarray(labels), initial=-1)) + 1))


def named_classes(classes: Sequence[str], names: Sequence[str] | None) -> tuple[str, ...]:
    """The classes, renamed if `names` are given, one for each class in the order of labels.

    Names may be more than the classes that occur. Raises `ConfigError` if they are fewer, or not
    distinct.
    """
    if names is None:
        return tuple(classes)
    if len(names) < len(classes):
        raise ConfigError(
            f"--class-names has {len(names)} names, the set has {len(classes)} classes"
        )
    if len(set(names)) < len(names) or not all(names):
        raise ConfigError("--class-names has an empty name, or the same name twice")
    return tuple(names)
