"""Every training method trains, resumes exactly, and its snapshots hold what it has learnt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ganscale
from ganscale.config import Config
from ganscale.errors import CheckpointError, ConfigError
from ganscale.generation.snapshot import load_classifier, load_encoder
from ganscale.run_directory import RunDirectory
from ganscale.training.loop import train
from ganscale.world import World, process_group
from tests.conftest import MakeConfig
from tests.support.runs import final_digest, read_rows

METHODS: dict[str, dict[str, Any]] = {
    "vae": {},
    "vae-gan": {"training__discriminator_steps": 2},
    "encoder": {},
    "bigan": {"training__extra_ema_halflives_kimg": [1]},
    "labels alone": {"model__num_classes": 10},
    "semi-supervised": {"model__num_classes": 10, "augment": {"name": "diffaugment", "p": 1}},
}


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(World()):
        yield


def configured(make_config: MakeConfig, method: str, **named: Any) -> Config:
    options: dict[str, Any] = {"name": method}
    if method in ("semi-supervised", "labels alone"):
        options = {"name": "semi-supervised", "labels": 20}
    if method == "labels alone":
        options["adversarial"] = 0
    if method == "encoder":
        gan = make_config(name="gan", training__total_kimg=0.032)
        train(gan, World())
        options["generator"] = str(gan.run_dir)
    return make_config(method=options, **(METHODS[method] | named))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_resumes_exactly_and_samples(make_config: MakeConfig, method: str) -> None:
    whole = configured(make_config, method, name="whole", training__total_kimg=0.096)
    first = whole.with_changes({"name": "parts", "training.total_kimg": 0.032})
    train(whole, World())
    train(first, World())
    train(first.with_changes({"training.total_kimg": 0.096}), World())
    resumed = final_digest(first)
    assert resumed == final_digest(whole)
    assert resumed[0] == 96
    rows = read_rows(RunDirectory(whole.run_dir).metrics)
    assert len(rows) == 6
    assert all(math.isfinite(value) for row in rows for value in row.values())
    generator = ganscale.Generator.from_pretrained(whole.run_dir)
    assert generator.num_classes == 0
    images = generator.sample(3)
    assert images.shape == (3, 3, 32, 32)

    encoder, classifier = load_encoder(whole.run_dir), load_classifier(whole.run_dir)
    assert (encoder is None) == (whole.method.name == "semi-supervised")
    assert (classifier is None) == (encoder is not None)
    scaled = images.float() / 127.5 - 1
    if encoder is not None:
        mean, log_variance = encoder(scaled)
        assert mean.shape == log_variance.shape == (3, 16)
    if classifier is not None:
        assert classifier(scaled, classes=True).shape == (3, 10)


def test_a_trained_generator_stays_as_it_is(make_config: MakeConfig) -> None:
    config = configured(make_config, "encoder", training__total_kimg=0.064)
    train(config, World())
    before = ganscale.Generator.from_pretrained(config.run_dir.parent / "gan").model.state_dict()
    after = ganscale.Generator.from_pretrained(config.run_dir).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_encoder_for_another_generator_is_refused(make_config: MakeConfig) -> None:
    config = configured(make_config, "encoder")
    with pytest.raises(ConfigError, match="set model.z_dim=16"):
        train(config.with_changes({"model.z_dim": 8}), World())
    with pytest.raises(CheckpointError, match="no snapshot"):
        train(config.with_changes({"method.generator": "/nowhere"}), World())
