"""The configuration: what may be set, of which type, within which bounds, and from where.

YAML presets or files, then `section.field=value` overrides, validated by pydantic. A configuration
is frozen, and an unknown field is refused with the nearest valid name. Durations are in thousands
of real images (`kimg`) and `batch_size` is global, so a preset means the same training on any
number of workers. No torch is imported here, so that `ganscale --help` and the reports stay quick.
"""

from ganscale.config.loading import load_config, parse_overrides, preset_names
from ganscale.config.methods import (
    EncoderMethod,
    MethodConfig,
    SemiSupervisedMethod,
    VaeGanMethod,
    VaeMethod,
)
from ganscale.config.models import ModelConfig
from ganscale.config.run import Config, field_names
from ganscale.config.schedule import Schedule
from ganscale.config.sections import (
    RENAMED_METRICS,
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    ExtractorName,
    GuardConfig,
    LaunchConfig,
    MetricName,
    ObjectiveConfig,
    OptimizerConfig,
    PenaltyConfig,
    SamplesConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "RENAMED_METRICS",
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EncoderMethod",
    "ExtractorName",
    "GuardConfig",
    "LaunchConfig",
    "MethodConfig",
    "MetricName",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PenaltyConfig",
    "SamplesConfig",
    "Schedule",
    "SemiSupervisedMethod",
    "TrackingConfig",
    "TrainingConfig",
    "VaeGanMethod",
    "VaeMethod",
    "field_names",
    "load_config",
    "parse_overrides",
    "preset_names",
]
