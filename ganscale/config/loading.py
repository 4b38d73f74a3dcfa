"""Presets, YAML files and `section.field=value` to a validated configuration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ganscale.config.messages import nearest
from ganscale.config.run import Config, merged, validated
from ganscale.errors import ConfigError

__all__ = ["load_config", "parse_overrides", "preset_names"]


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("ganscale") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name[-5:] == ".yaml")


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a preset (by name) or a YAML file, apply `section.field=value` overrides, validate.

    A preset's run is called after it unless `name` is set. Raises `ConfigError` with one line.
    """
    text, default_name = _read(source)
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected sections of fields, got {type(values).__name__}")
    values.setdefault("name", default_name)
    return validated(merged(values, parse_overrides(overrides)))


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Turn `["data.source=cifar10", ...]` into `{"data.source": "cifar10", ...}`."""
    changes: dict[str, Any] = {}
    for item in overrides:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"expected section.field=value, got {item!r}")
        try:
            changes[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            changes[name] = value
    return changes


def _read(source: str | Path) -> tuple[str, str]:
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"no such config file: {path}")
        try:
            return path.read_text(encoding="utf-8"), path.stem
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not a text file; expected YAML in UTF-8") from None
    if str(source) not in preset_names():
        hint = nearest(str(source), preset_names())
        raise ConfigError(
            f"no preset named {source!r}{hint}. Presets: {', '.join(preset_names())}; "
            "or give a path that ends in .yaml"
        )
    preset = resources.files("ganscale") / "presets" / f"{source}.yaml"
    return preset.read_text(encoding="utf-8"), str(source)
