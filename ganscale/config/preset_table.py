"""The presets in a row each, as the command line and the documentation show them."""

from __future__ import annotations

from ganscale.config.loading import load_config, preset_names
from ganscale.config.run import Config

PRESET_COLUMNS = (
    "preset",
    "model",
    "resolution",
    "classes",
    "method: losses",
    "D steps x batch",
    "kimg",
)

_REQUIRED = {"encoder-cifar10": ("method.generator=runs/dcgan-cifar10",)}
"""Settings without a default that a preset leaves to its user, so that it can be loaded."""


def preset_rows() -> list[tuple[str, ...]]:
    """A row of texts for each preset, with the columns of `PRESET_COLUMNS`."""
    return [_row(name, load_config(name, _REQUIRED.get(name, ()))) for name in preset_names()]


def _row(name: str, config: Config) -> tuple[str, ...]:
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
