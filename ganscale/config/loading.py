"""Presets, YAML files and `section.field=value` to a validated configuration.

Overrides replace values before anything is validated, so an override may repair what a file has
wrong, and all mistakes of both are reported together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ganscale.config.messages import abbreviated, nearest
from ganscale.config.run import Config, merged, validated
from ganscale.errors import ConfigError, naming_file

PRESET_COLUMNS = (
    "preset",
    "model",
    "resolution",
    "classes",
    "method: losses",
    "D steps x batch",
    "kimg",
)


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("ganscale") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name[-5:] == ".yaml")


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a preset (by name) or a YAML file, apply `section.field=value` overrides, validate.

    A preset's run is called after it unless `name` is set. Raises `ConfigError` with one line.
    """
    text, default_name = _read(source)
    values = read_yaml(text, source)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected sections of fields, got {type(values).__name__}")
    values.setdefault("name", default_name)
    return validated(merged(values, parse_overrides(overrides)))


def preset_rows() -> list[tuple[str, ...]]:
    """A row of texts for each preset, with the columns of `PRESET_COLUMNS`."""
    return [_preset_row(name, load_config(name)) for name in preset_names()]


def read_yaml(text: str, source: str | Path) -> Any:
    """The value of a YAML document; `source` names it in errors.

    Raises `ConfigError` with one line if it is not valid YAML, or if a mapping has a key twice,
    of which YAML would silently take the last.
    """
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except _DuplicateKeyError as error:
        raise ConfigError(f"{source}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML: nested too deeply") from None
    # The constructors of dates and numbers raise ValueError: 2001-99-99, 5,000 digits.
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Turn `["data.source=cifar10", ...]` into `{"data.source": "cifar10", ...}`."""
    changes: dict[str, Any] = {}
    for item in overrides:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"expected section.field=value, got {abbreviated(item)}")
        try:
            changes[name] = yaml.load(value, _UniqueKeyLoader)
        except _DuplicateKeyError as error:
            raise ConfigError(f"{abbreviated(item)}: {error}") from None
        except (yaml.YAMLError, ValueError, RecursionError):  # a path or a name need not be YAML
            changes[name] = value
    return changes


class _DuplicateKeyError(Exception):
    """A key that stands twice in one mapping of a YAML document."""


class _UniqueKeyLoader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here merge keys (<<) are not resolved yet, which may rightly repeat a key.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _DuplicateKeyError(
                    f"{abbreviated(key.value)} stands twice, in lines {lines[key.value]} and "
                    f"{line}: keep one of them"
                )
            lines[key.value] = line
        return node


def _read(source: str | Path) -> tuple[str, str]:
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"no such config file: {path}")
        try:
            with naming_file(path):
                return path.read_text(encoding="utf-8"), path.stem
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not a text file; expected YAML in UTF-8") from None
    if str(source) not in preset_names():
        hint = nearest(str(source), preset_names())
        raise ConfigError(
            f"no preset named {abbreviated(str(source))}{hint}. "
            f"Presets: {', '.join(preset_names())}; or give a path that ends in .yaml"
        )
    preset = resources.files("ganscale") / "presets" / f"{source}.yaml"
    return preset.read_text(encoding="utf-8"), str(source)


def _preset_row(name: str, config: Config) -> tuple[str, ...]:
    training, model = config.training, config.model
    # A method without a discriminator has no steps of one.
    steps = "" if config.method.name == "vae" else f"{training.discriminator_steps} x "
    return (
        name,
        model.name,
        str(model.resolution),
        str(model.num_classes or "-"),
        _losses(config),
        f"{steps}{training.batch_size}",
        f"{training.total_kimg:,.0f}",
    )


def _losses(config: Config) -> str:
    method = config.method.name
    if method == "vae":
        return method
    parts = [f"{method}: {config.objective.name}", *config.penalty.names]
    if config.augment.name != "none":
        parts.append(f"augmentation {config.augment.name}")
    return ", ".join(parts)
