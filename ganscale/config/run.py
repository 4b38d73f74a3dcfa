"""A run's whole configuration: its sections, and what follows from them.

The configuration is the run's identity: it is written into the run's folder and into every
checkpoint, and a run is resumed only with settings that mean the same weights (`changes`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from ganscale.config.combinations import impossible
from ganscale.config.messages import BY_NAME, abbreviated, explain, unknown_field
from ganscale.config.methods import GanMethod, MethodConfig
from ganscale.config.models import SHARED_FIELDS, DcganModel, ModelConfig
from ganscale.config.schedule import Schedule
from ganscale.config.section import Section
from ganscale.config.sections import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GuardConfig,
    LaunchConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PenaltyConfig,
    SamplesConfig,
    TrackingConfig,
    TrainingConfig,
)
from ganscale.errors import ConfigError


def _valid_name(name: str) -> str:
    # It becomes a folder, a prefix in an object store and a name in W&B, so it has to be valid as
    # all of them, and must not be "..", an option or a hidden file.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise ValueError(
            "expected at most 128 letters, digits, '.', '_' and '-', of which the first is a "
            "letter or a digit"
        )
    return name


class Config(Section):
    """Everything that defines a run."""

    name: Annotated[str, AfterValidator(_valid_name)] = "run"
    """Name of the run and of its folder: letters, digits, `.`, `_` and `-`, at most 128."""
    storage: str = "runs"
    """Folder that holds the runs."""
    seed: int = Field(0, ge=0)
    """Decides the order of the samples, the latents and the initial weights."""
    data: DataConfig = DataConfig()
    model: ModelConfig = DcganModel()
    method: MethodConfig = GanMethod()
    objective: ObjectiveConfig = ObjectiveConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    guard: GuardConfig = GuardConfig()
    samples: SamplesConfig = SamplesConfig()
    tracking: TrackingConfig = TrackingConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        # The first one only: one mistake often causes several of them.
        for problem in impossible(self):
            raise ValueError(problem)
        return self

    @property
    def run_dir(self) -> Path:
        """Absolute path of the run's folder."""
        return Path(self.storage).expanduser().absolute() / self.name

    @property
    def checkpoints(self) -> str:
        """Absolute path or URL of the run's checkpoints."""
        location = self.checkpoint.location
        if location is None:
            return str(self.run_dir / "checkpoints")
        if "://" in location:
            return f"{location.rstrip('/')}/{self.name}"
        return str(Path(location).expanduser().absolute() / self.name)

    @property
    def generator_spec(self) -> dict[str, Any]:
        """The `model` section as generators and their snapshots know it."""
        spec = self.model.model_dump()
        # There the labels are the discriminator's alone; the generator is one without classes.
        return spec | {"num_classes": 0} if self.method.name == "semi-supervised" else spec

    @property
    def total_nimg(self) -> int:
        """Length of the run in real images, a whole number of batches."""
        # Rounded up, so that the run has at least the length that was asked for. `round` before it,
        # as 1000 times a decimal fraction is not always a whole number in floating point.
        steps = -(-round(1000 * self.training.total_kimg) // self.training.batch_size)
        return steps * self.training.batch_size

    def to_yaml(self) -> str:
        """The resolved configuration in the order of its fields."""
        text: str = yaml.safe_dump(self.model_dump(), sort_keys=False)
        return text

    def with_changes(self, changes: Mapping[str, Any]) -> Config:
        """A validated copy; `changes` maps dotted field names to values.

        They mean what they mean on the command line: a mapping changes the fields that it names and
        no others of its section, and another `model.name` or `method.name` brings its own defaults.
        """
        values = self.model_dump(exclude_unset=True)
        for section in BY_NAME:
            if section in values:  # where it was made by its class, its name was not set
                values[section]["name"] = getattr(self, section).name
        return validated(merged(values, changes))


def field_names(section: Any = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields that can be set, each once."""
    names: dict[str, None] = {}
    for name, field in section.model_fields.items():
        # A schedule is set as one value, by a number or a mapping; its fields are not settings. The
        # architectures and the methods have many fields in common, which are listed once.
        inner = [kind for kind in _sections_in(field.annotation) if kind is not Schedule]
        for kind in inner:
            names |= dict.fromkeys(field_names(kind, f"{prefix}{name}."))
        if not inner:
            names[f"{prefix}{name}"] = None
    yield from names


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _sections_in(part)]


def by_field(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes by dotted field names, in which a section may be given as a mapping or a name."""
    fields: dict[str, Any] = {}
    for name, value in changes.items():
        if name in Config.model_fields and isinstance(value, Mapping):
            fields |= {f"{name}.{field}": inner for field, inner in value.items()}
        else:
            fields[f"{name}.name" if name in BY_NAME and isinstance(value, str) else name] = value
    return fields


def merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with fields set, each by its dotted name or in a mapping of its section.

    Another architecture or method does not take over the fields of the one before, which are of
    another size or mean something else: the images' fields of `model` stay, and what else `changes`
    does not set has its default. Raises `ConfigError` on an unknown section.
    """
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    changes = by_field(changes)
    for section in BY_NAME:
        target, name = merged.get(section, {}), changes.get(f"{section}.name")
        before = Config.model_fields[section].default.name
        if isinstance(target, dict) and name not in (None, target.get("name", before)):
            kept = SHARED_FIELDS if section == "model" else ()
            merged[section] = {field: target[field] for field in kept if field in target}
    for name, value in changes.items():
        section, dot, field = name.partition(".")
        if not dot:  # a field of the run itself, or a section as an object
            merged[section] = value
            continue
        if section not in Config.model_fields:
            raise ConfigError(unknown_field(name, list(field_names())))
        target = merged.setdefault(section, {})
        if section in BY_NAME and isinstance(target, str):
            target = merged[section] = {"name": target}
        if not isinstance(target, dict):
            raise ConfigError(
                f"{section}={abbreviated(target)} is no section of fields, of which {name} is one"
            )
        target[field] = value
    return merged


def validated(values: dict[str, Any]) -> Config:
    """The configuration of some values. Raises `ConfigError` with one line for all mistakes."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error.errors(), list(field_names()))) from None
