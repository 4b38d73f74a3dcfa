"""Every model, objective, penalty and augmentation trains, saves, resumes exactly and samples."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet

import ganscale
from ganscale.config import Config
from ganscale.data.building import build_shards
from ganscale.data.resolve_source import resolve_source
from ganscale.errors import ConfigError
from ganscale.objectives.adversarial import OBJECTIVES
from ganscale.run_directory import RunDirectory
from ganscale.training.loop import train
from ganscale.world import World, process_group
from tests.conftest import MakeConfig, real_source
from tests.support.devices import on_each_device
from tests.support.runs import final_digest, read_rows
from tests.support.small_models import SMALL_MODELS

PENALTIES: dict[str, dict[str, Any]] = {
    "none": {},
    "r1": {"r1": 0.1},
    "lazy r1 and r2": {"r1": 0.1, "r2": 0.1, "interval": 2},
    "finite differences": {"r1": 0.1, "r2": 0.1, "form": "finite_difference"},
    "wgan_gp": {"wgan_gp": 10.0},
    "dragan": {"dragan": 1.0},
    "gradient normalisation": {"gradient_normalisation": True},
    "consistency and lecam": {"consistency": 1.0, "lecam": 0.1},
    "orthogonal": {"orthogonal": 1e-4},
}
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "diffaugment": {"name": "diffaugment", "p": 1},
    "adaptive ada": {"name": "ada", "target": 0.6, "adapt_kimg": 0.1},
    "scheduled": {"name": "r3gan", "p": {"start": 0, "end": 0.5, "kimg": 1, "shape": "cosine"}},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two D steps": {"training.discriminator_steps": 2},
    "top k": {"objective.top_k": 0.5},
    "clipped": {"optimizer.clip_norm": 1.0, "optimizer.clip_value": 0.1},
    "scheduled": {
        "optimizer.lr": {"start": 2e-4, "end": 5e-5, "kimg": 1, "shape": "cosine"},
        "optimizer.beta2": {"start": 0.9, "end": 0.99, "kimg": 1, "shape": "linear"},
        "training.ema_halflife_kimg": {"start": 0, "end": 5, "kimg": 1, "shape": "linear"},
        "training.extra_ema_halflives_kimg": [1, 2],
    },
}


@pytest.fixture(scope="session")
def shards_16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images of 16x16 in 4 shards."""
    root = tmp_path_factory.mktemp("shards") / "16"
    spec, _ = resolve_source(real_source(), "train", download_dir=root)
    build_shards(spec, root, num_shards=4, limit=200, resolution=16)
    return root


@pytest.fixture
def world(device: str) -> Iterator[World]:
    """A world of one, in its group."""
    alone = World(device=device)
    with process_group(alone):
        yield alone


def combination(
    make_config: MakeConfig, shards: Path, model: str, *changes: dict[str, Any], **named: Any
) -> Config:
    """A tiny run; `changes` are dotted fields. Raises `ConfigError` for what cannot work."""
    sections: dict[str, Any] = {}
    for change in changes:
        sections |= change
    base = make_config(model=SMALL_MODELS[model], data__shards=str(shards), **named)
    return base.with_changes(sections)


def rows() -> list[ParameterSet]:
    """Every model, objective and penalty; augmentations and options take turns.

    Some in which each of them occurs run always, the others in the slow form.
    """
    found = []
    pairs = itertools.product(SMALL_MODELS, OBJECTIVES)
    for place, (model, objective) in enumerate(pairs):
        for turn in range(len(PENALTIES)):
            penalty = [*PENALTIES][(place + turn) % len(PENALTIES)]
            if penalty == "orthogonal" and model.startswith("stylegan2"):
                continue
            augmentation = [*AUGMENTATIONS][(place + turn) % len(AUGMENTATIONS)]
            option = [*OPTIONS][(place + place // len(OBJECTIVES) + turn) % len(OPTIONS)]
            marks = [pytest.mark.slow] if turn or place % 5 else []
            found.append(pytest.param(model, objective, penalty, augmentation, option, marks=marks))
    return found


def test_everything_occurs_in_what_runs_always() -> None:
    always = [set(row.values) for row in rows() if not row.marks]
    every = {*SMALL_MODELS, *OBJECTIVES, *PENALTIES, *AUGMENTATIONS, *OPTIONS}
    assert set().union(*always) == every


def made_possible(objective: str, penalty: dict[str, Any]) -> dict[str, Any]:
    """Wasserstein needs a discriminator that cannot be steep."""
    limited = {"wgan_gp", "gradient_normalisation"} & set(penalty)
    needs = objective == "wasserstein" and not limited
    return {"optimizer.clip_weights": 0.05} if needs else {}


@on_each_device
@pytest.mark.parametrize(("model", "objective", "penalty", "augmentation", "option"), rows())
def test_a_combination_trains_resumes_exactly_and_samples(
    make_config: MakeConfig,
    shards_16: Path,
    world: World,
    model: str,
    objective: str,
    penalty: str,
    augmentation: str,
    option: str,
) -> None:
    changes = (
        {"objective.name": objective, "penalty": PENALTIES[penalty]},
        {"augment": AUGMENTATIONS[augmentation]},
        {**OPTIONS[option], **made_possible(objective, PENALTIES[penalty])},
    )
    whole = combination(make_config, shards_16, model, *changes, training__total_kimg=0.048)
    first = whole.with_changes({"name": "parts", "training.total_kimg": 0.032})
    train(whole, world)
    train(first, world)
    train(first.with_changes({"training.total_kimg": 0.048}), world)
    resumed = final_digest(first)
    assert resumed == final_digest(whole)
    assert resumed[0] == 48
    for row in read_rows(RunDirectory(whole.run_dir).metrics):
        assert all(math.isfinite(value) for value in row.values())
        assert row["train/skips_D"] == row["train/skips_G"] == 0
    images = ganscale.Generator.from_pretrained(whole.run_dir).sample(3)
    assert images.shape == (3, 3, 16, 16)
    assert images.float().std() > 0


MICRO_BATCHED: dict[str, tuple[str, dict[str, Any]]] = {
    "r3gan": ("r3gan", {"objective.name": "relativistic", "penalty": {"r1": 0.1, "r2": 0.1}}),
    "semi-supervised": (
        "stylegan2-classes",
        {"method": {"name": "semi-supervised", "labels": 20}, "training.discriminator_steps": 2},
    ),
}


@on_each_device
@pytest.mark.parametrize("case", MICRO_BATCHED)
def test_a_run_in_micro_batches_resumes_exactly_and_in_others(
    make_config: MakeConfig, shards_16: Path, world: World, case: str
) -> None:
    model, changes = MICRO_BATCHED[case]
    split = {**changes, "training.micro_batch_size": 6}  # of batches of 16: 5, 5 and 6
    whole = combination(make_config, shards_16, model, split, training__total_kimg=0.048)
    first = whole.with_changes({"name": "parts", "training.total_kimg": 0.032})
    train(whole, world)
    train(first, world)
    train(first.with_changes({"training.total_kimg": 0.048}), world)
    assert final_digest(first) == final_digest(whole)
    # Another size changes no more than rounding, so a run may go on with it.
    more = {"training.total_kimg": 0.064, "training.micro_batch_size": None}
    train(first.with_changes(more), world)
    assert final_digest(first)[0] == 64


def drawn(seed: int) -> tuple[str, tuple[dict[str, Any], ...]]:
    """A random combination."""
    choose = random.Random(seed).choice
    objective, penalty = choose([*OBJECTIVES]), PENALTIES[choose([*PENALTIES])]
    return choose([*SMALL_MODELS]), (
        {"objective.name": objective, "penalty": penalty},
        {"augment": AUGMENTATIONS[choose([*AUGMENTATIONS])]},
        OPTIONS[choose([*OPTIONS])],
        {"training.precision": choose(["fp32", "bf16", "fp16"])},
        made_possible(objective, penalty) if choose([True, True, False]) else {},
    )


_MANY = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(50)]


@on_each_device
@pytest.mark.parametrize("seed", _MANY)
def test_thirty_steps_of_a_random_combination_stay_finite_or_are_refused(
    make_config: MakeConfig, shards_16: Path, world: World, seed: int
) -> None:
    model, changes = drawn(seed)
    lipschitz = Config().with_changes({"model": SMALL_MODELS[model]}).model.is_lipschitz
    steep = "wasserstein" in changes[0].values() and not lipschitz
    penalty, precision = changes[0]["penalty"], changes[3]["training.precision"]
    is_steep = steep and not changes[-1] and made_possible("wasserstein", penalty)
    refusals = {
        "wasserstein needs": bool(is_steep),
        "penalty.orthogonal": "orthogonal" in penalty and model.startswith("stylegan2"),
        "too coarse": "form" in penalty and precision == "bf16",
    }
    reasons = [reason for reason, holds in refusals.items() if holds]
    if reasons:
        with pytest.raises(ConfigError, match="|".join(reasons)):
            combination(make_config, shards_16, model, *changes)
        return
    length = 0.03 * 16
    config = combination(make_config, shards_16, model, *changes, training__total_kimg=length)
    train(config, world)
    logged = read_rows(RunDirectory(config.run_dir).metrics)
    assert len(logged) == 30
    finite = [row for row in logged if None not in row.values()]  # null: a step that was skipped
    skips = [row["train/skips_D"] + row["train/skips_G"] for row in logged]
    assert len(finite) >= 30 - skips[-1]
    if config.training.precision == "fp16":
        assert skips[-1] == skips[14]  # the scale has found its place
    else:
        assert skips[-1] == 0
    (weights,) = [torch.cat([p.flatten() for p in _newest(config).parameters()])]
    assert torch.isfinite(weights).all()


def _newest(config: Config) -> torch.nn.Module:
    return ganscale.Generator.from_pretrained(config.run_dir).model
