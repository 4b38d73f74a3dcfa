"""The configuration: what may be set, of which type, within which bounds, and from where.

YAML presets or files, then `section.field=value` overrides, validated by pydantic: frozen, and an
unknown field is refused with the nearest valid name. Durations are in thousands of real images
(`kimg`), `batch_size` is global. No torch here: `ganscale --help` and the reports stay quick.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ganscale.errors import ConfigError

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LaunchConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "SamplesConfig",
    "TrackingConfig",
    "TrainingConfig",
    "field_names",
    "load_config",
    "preset_names",
]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class DataConfig(_Section):
    """Which images, and the order they come in."""

    shards: str | None = None
    """Path or URL (s3://, http://) of a shard set; null builds one from `source` first."""
    source: str = "auto"
    """auto, cifar10, procedural, or a path to images; used only to build missing shards."""
    shuffle_window: int = Field(1024, ge=1)
    """Samples of one stream that are shuffled together."""
    cache: Literal["auto", "none", "ram", "device"] = "auto"
    """Where decoded images are kept: auto is device or ram for sets that fit with ease."""
    cache_dir: str | None = None
    """Local folder for a remote set's shards, shared by a node's workers; null reads ranges."""
    cache_limit_gb: float | None = Field(None, gt=0)
    """Gigabytes that may lie in cache_dir; the shards used longest ago are removed first."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a damaged sample does: end the run, or be left out of its batch and counted."""
    reader_threads: int = Field(2, ge=1)
    """Batches that a worker reads at once."""
    prefetch_batches: int = Field(2, ge=0)
    """Batches that wait for the worker."""
    store_deadline_seconds: float = Field(300.0, gt=0)
    """How long a remote store is asked again before it counts as gone."""
    store_timeout_seconds: float = Field(30.0, gt=0)
    """How long one request (at most a megabyte) may take before it is sent again."""


class ModelConfig(_Section):
    """The two players."""

    name: Literal["dcgan"] = "dcgan"
    """Architecture."""
    resolution: int = Field(32, ge=16, le=256)
    """Height and width of the images in pixels, a power of two."""
    img_channels: int = Field(3, ge=1, le=4)
    """Channels of the images."""
    z_dim: int = Field(100, ge=1)
    """Size of the latent."""
    base_channels: int = Field(64, ge=1)
    """Channels next to the image; they double with every halving of the resolution."""

    @model_validator(mode="after")
    def _power_of_two(self) -> ModelConfig:
        if self.resolution & (self.resolution - 1):
            raise ValueError(f"model.resolution must be a power of two, got {self.resolution}")
        return self


class ObjectiveConfig(_Section):
    """What the players minimise."""

    name: Literal["nonsaturating", "minimax", "least_squares", "hinge", "relativistic"] = (
        "nonsaturating"
    )
    """minimax is the original, whose generator saturates; relativistic pairs real with fake."""


class OptimizerConfig(_Section):
    """Adam, for both players."""

    lr: float = Field(2e-4, gt=0)
    """Learning rate."""
    beta1: float = Field(0.5, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""


class TrainingConfig(_Section):
    """How long, how much at once, how precise."""

    batch_size: int = Field(128, ge=1)
    """Global batch: real images a step over all workers."""
    total_kimg: float = Field(2500.0, gt=0)
    """Length of the run in thousands of real images."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is fp16 with gradient scaling on CUDA and fp32 on CPU."""
    ema_halflife_kimg: float = Field(10.0, ge=0)
    """Half-life of the averaged generator's weights; 0 follows the generator at once."""


class CheckpointConfig(_Section):
    """What is kept so that nothing is lost."""

    every_kimg: float = Field(50.0, gt=0)
    """Distance between checkpoints; one more is written at the end."""
    keep_last: int = Field(3, ge=1)
    """Checkpoints kept; an older one goes only after a newer one is durable."""
    snapshot_every_kimg: float = Field(250.0, gt=0)
    """Distance between snapshots (generators for inference); one more at the end."""


class SamplesConfig(_Section):
    """The sample grids drawn during training, of the averaged generator."""

    every_kimg: float = Field(50.0, gt=0)
    """Distance between grids; one more at the end."""
    num_images: int = Field(64, ge=1, le=1024)
    """Images in a grid, always from the same latents."""


class TrackingConfig(_Section):
    """Who is told what happens. metrics.jsonl and events.jsonl are always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online where an API key is known, else offline."""
    project: str = "ganscale"
    """W&B project."""
    log_every_kimg: float = Field(2.0, gt=0)
    """Distance between rows of metrics."""


class LaunchConfig(_Section):
    """Where the workers run."""

    backend: Literal["ray", "inprocess"] = "ray"
    """ray starts DDP workers through Ray Train; inprocess trains right here (or under torchrun)."""
    num_workers: int = Field(1, ge=1)
    """DDP workers."""
    use_gpu: bool = False
    """One CUDA device a worker."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs that Ray reserves for a worker."""
    threads_per_worker: int = Field(1, ge=1)
    """Threads of a worker's CPU kernels; more of them spin against each other on small machines."""
    ray_address: str | None = None
    """Address of a running cluster; null uses RAY_ADDRESS, else starts Ray on this machine."""
    max_failures: int = Field(3, ge=-1)
    """Restarts of the worker group after a fault, each from the newest checkpoint; -1 no limit."""
    timeout_seconds: float = Field(600.0, gt=0)
    """How long a collective may wait for a silent worker before it counts as a fault."""


class Config(_Section):
    """Everything that defines a run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    storage: str = "runs"
    """Folder that holds the runs."""
    seed: int = Field(0, ge=0)
    """Decides the order of the samples, the latents and the initial weights."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SamplesConfig = SamplesConfig()
    tracking: TrackingConfig = TrackingConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if self.training.batch_size < 2 * self.launch.num_workers:
            raise ValueError(
                f"training.batch_size={self.training.batch_size} is too small for "
                f"launch.num_workers={self.launch.num_workers}: give each worker at least 2 images"
            )
        if self.training.batch_size > 1000 * self.training.total_kimg:
            raise ValueError(
                f"training.total_kimg={self.training.total_kimg} is less than one batch of "
                f"{self.training.batch_size} images"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """Absolute path of the run's folder."""
        return Path(self.storage).expanduser().absolute() / self.name

    @property
    def total_nimg(self) -> int:
        """Length of the run in real images, a whole number of batches."""
        steps = -(-round(1000 * self.training.total_kimg) // self.training.batch_size)
        return steps * self.training.batch_size

    def to_yaml(self) -> str:
        """The resolved configuration in the order of its fields."""
        text: str = yaml.safe_dump(self.model_dump(), sort_keys=False)
        return text

    def with_changes(self, changes: Mapping[str, Any]) -> Config:
        """A validated copy; `changes` maps dotted field names to values."""
        return _validate(_merge(self.model_dump(), changes))


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("ganscale") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name[-5:] == ".yaml")


def field_names(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields that can be set."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from field_names(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


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
    return _validate(_merge(values, parse_overrides(overrides)))


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
        hint = _nearest(str(source), preset_names())
        raise ConfigError(
            f"no preset named {source!r}{hint}. Presets: {', '.join(preset_names())}; "
            "or give a path that ends in .yaml"
        )
    preset = resources.files("ganscale") / "presets" / f"{source}.yaml"
    return preset.read_text(encoding="utf-8"), str(source)


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for name, value in changes.items():
        section, dot, field = name.partition(".")
        if not dot:
            merged[section] = value
            continue
        if section not in Config.model_fields:
            raise ConfigError(_unknown_field(name))
        target = merged.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(_unknown_field(name))
        target[field] = value
    return merged


def _validate(values: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        messages = [_explain(item) for item in error.errors()]
        raise ConfigError("; ".join(messages)) from None


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return _unknown_field(name)
    message: str = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return message
    return f"{name}={item['input']!r}: {message[0].lower()}{message[1:]}"


def _unknown_field(name: str) -> str:
    return f"unknown field {name!r}{_nearest(name, list(field_names()))}"


def _nearest(name: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
