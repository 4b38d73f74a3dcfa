"""Which settings may change between sessions of a run, and which ones within a session.

The rule is a list of what may change and not of what may not: a new field is protected until
somebody decides that it need not be.
"""

from __future__ import annotations

from typing import Any

from ganscale.config.run import Config

MAY_CHANGE_ON_RESUME = (
    "name",
    "storage",
    "launch.",
    "tracking.",
    "checkpoint.",
    "evaluation.",
    "samples.",
    "guard.",
    "data.shards",
    "data.source",
    "data.cache",
    "data.on_error",
    "data.reader_threads",
    "data.prefetch_batches",
    "data.store_",
    "training.total_kimg",
    "training.cuda_graphs",
    "training.micro_batch_size",
)
"""Beginnings of the names of settings that a run may be resumed with other values of.

They decide where, how fast and how long a run trains, what is observed of it, and what becomes of
damaged samples. All others decide its weights. A run that was renamed or moved is the same run;
that its shards are the same is checked by their digest.
"""

MAY_CHANGE_IN_POPULATION = (
    "optimizer.lr",
    "optimizer.lr_discriminator",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.eps",
    "optimizer.clip_norm",
    "optimizer.clip_value",
    "optimizer.clip_weights",
    "objective.top_k",
    "penalty.r1",
    "penalty.r2",
    "penalty.wgan_gp",
    "penalty.dragan",
    "penalty.consistency",
    "penalty.lecam",
    "penalty.orthogonal",
    "penalty.interval",
    "augment.p",
    "augment.target",
    "augment.adapt_kimg",
    "training.ema_halflife_kimg",
    "method.beta",
    "method.adversarial",
)
"""Settings that population-based training may vary: each step reads them, and no network's shape
depends on them."""


def changed_settings(before: Config, now: Config) -> list[str]:
    """What differs between two configurations such that they are of different runs.

    Returns `NAME: BEFORE -> NOW` for each setting that may not change on resume.
    """
    old, new = settings_by_name(before), settings_by_name(now)
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in {**old, **new}
        if not name.startswith(MAY_CHANGE_ON_RESUME) and old.get(name) != new.get(name)
    ]


def settings_by_name(config: Config) -> dict[str, Any]:
    """Values by dotted names, as they would be written."""
    settings: dict[str, Any] = {}
    for name, value in config.model_dump().items():
        inner = value if isinstance(value, dict) else {}
        # One level only: a schedule is one setting, however it is written.
        settings |= {f"{name}.{field}": v for field, v in inner.items()} or {name: value}
    return settings
