"""The configuration of a run beside the preset that it comes from, and runs beside each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ganscale.config import Config, load_config, preset_names
from ganscale.config.changes import settings_by_name
from ganscale.report.runs import Run

_PLACES = ("name", "storage", "data.shards")
"""Where a run lies and reads from, which is different for every run and says nothing of it."""


@dataclass(frozen=True)
class Setting:
    """A field, its values side by side, and its sentence of documentation."""

    name: str
    values: tuple[str, ...]
    sentence: str


@dataclass(frozen=True)
class Difference:
    """What a run has set otherwise than a preset."""

    preset: str
    settings: list[Setting]


def difference_from_preset(config: Config) -> Difference:
    """What differs from the preset that is nearest to a configuration.

    A run does not note its preset. That of the same architecture and method with the fewest other
    values is it, or is as good as it.
    """
    mine = _settings(config)
    presets = {name: _settings(load_config(name)) for name in preset_names()}

    def distance(name: str) -> tuple[bool, bool, int, bool]:
        other = presets[name]
        return (
            other["method.name"] != mine["method.name"],
            other["model.name"] != mine["model.name"],
            len(_changed(other, mine)),
            name != config.name,
        )

    nearest = min(presets, key=distance)
    names = _changed(presets[nearest], mine)
    return Difference(nearest, _beside(names, (mine, presets[nearest]), config))


def differences_between(runs: Sequence[Run]) -> list[Setting]:
    """Settings in which some runs differ; runs without a readable configuration are left out."""
    known = [(_settings(run.config) if run.config is not None else {}) for run in runs]
    names = list(dict.fromkeys(name for settings in known for name in settings))
    present = [settings for settings in known if settings]
    differing = [name for name in names if len({_shown(s.get(name)) for s in present}) > 1]
    config = next((run.config for run in runs if run.config is not None), None)
    return [] if config is None else _beside(differing, known, config)


def _settings(config: Config) -> dict[str, Any]:
    values = settings_by_name(config)
    return {name: value for name, value in values.items() if name not in _PLACES}


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in {**now, **before} if before.get(name) != now.get(name)]


def _beside(
    names: Sequence[str], sides: Sequence[Mapping[str, Any]], config: Config
) -> list[Setting]:
    return [
        Setting(
            name,
            tuple(_shown(side[name]) if name in side else "–" for side in sides),
            _sentence(config, name),
        )
        for name in names
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _sentence(config: Config, name: str) -> str:
    """The documentation of a field; empty for one of another architecture or method."""
    section, _, field = name.partition(".")
    owner = type(getattr(config, section)) if field else type(config)
    fields = getattr(owner, "model_fields", {})
    description = fields[field or section].description if (field or section) in fields else None
    return " ".join((description or "").split())
