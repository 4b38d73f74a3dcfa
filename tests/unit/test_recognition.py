"""The probe against a closed form and sets of known accuracy; sets of images joined and chosen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor, nn

from ganscale.cli.recognise import _kinds_of
from ganscale.config import load_config
from ganscale.errors import ConfigError, DataError
from ganscale.evaluation.image_views import Concatenated, with_classes_of
from ganscale.evaluation.recognition.classifier import ClassifierRecipe
from ganscale.evaluation.recognition.probe import (
    fit_logistic,
    pooled_activations,
    probe,
    scaled_pixels,
)
from ganscale.evaluation.recognition.sample_augmentation import (
    augment_with_samples,
    same_of_each_class,
)
from ganscale.evaluation.recognition.semi_supervised import classifier_of_run, snapshot_accuracy
from ganscale.generation.snapshot import save_snapshot, snapshot_classes
from ganscale.models import build_classifier, build_discriminator, build_generator
from tests.support.small_models import SMALL_MODELS


def test_runs_are_repeats_of_each_other_where_only_their_seeds_differ(tmp_path: Path) -> None:
    base = ["name=a", "training.total_kimg=16"]
    changes: dict[str, list[str]] = {
        "first": [],
        "second": ["seed=1", "name=b", "launch.num_workers=1"],
        "wide": ["seed=2", "model.base_channels=128"],
        "alone": ["method.adversarial=0"],
    }
    for name, more in changes.items():
        config = load_config("semi-supervised-cifar10", [*base, *more])
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(config.to_yaml())
    kinds = _kinds_of([tmp_path / name for name in changes])
    words = "4000 labels and adversarial training, 16 kimg"
    narrow, wide = (f"{words}, model.base_channels={width}" for width in (64, 128))
    assert kinds == [narrow, narrow, wide, "4000 labels alone, 16 kimg"]
    assert _kinds_of([tmp_path / name for name in ("first", "second")]) == [words, words]


@dataclass(frozen=True, eq=False)
class Held:
    """Images in memory."""

    pixels: Tensor
    labels: NDArray[np.int64] | None
    description: str = "held images"
    digest: str = "held"
    classes: tuple[str, ...] = ("dark", "bright")

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: NDArray[np.int64]) -> Tensor:
        return self.pixels[torch.from_numpy(indices)]


def bright_and_dark(num_images: int, seed: int, *, size: int = 16) -> Held:
    """Two classes that the mean brightness tells apart."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, num_images)
    noise = random.integers(0, 100, (num_images, 3, size, size))
    pixels = torch.from_numpy((noise + 120 * labels[:, None, None, None]).astype(np.uint8))
    return Held(pixels, labels)


def test_labels_count_the_classes_of_the_other_set_by_name() -> None:
    """A test set without bees counts cows as 1, and a wrong match would look right."""
    images = Held(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), np.array([0, 1, 1, 2]))
    test = replace(images, classes=("ant", "cow", "dog"))
    train = ("ant", "bee", "cow", "dog")
    matched = with_classes_of(test, train, "train")
    assert matched.labels is not None
    assert matched.labels.tolist() == [0, 2, 2, 3]
    assert tuple(matched.classes) == train
    assert matched.digest != test.digest
    assert with_classes_of(test, test.classes, "train") is test
    with pytest.raises(DataError, match=r"classes that train lacks: cow; .* are ant, bee, dog\."):
        with_classes_of(test, ("ant", "bee", "dog"), "train")
    unused = replace(test, classes=("ant", "cow", "dog", "elk"))
    assert with_classes_of(unused, train, "train").labels is not None
    unlabelled = replace(test, labels=None)
    assert with_classes_of(unlabelled, train, "train") is unlabelled
    # Whether they were lost by an earlier version or the images have none cannot be told.
    with pytest.raises(
        DataError, match=r"no names of classes in train \(images without classes, or"
    ):
        with_classes_of(test, (), "train")


def test_a_probe_matches_classes_by_name() -> None:
    """Accuracy is the same however the test set counts its classes."""
    train, test = bright_and_dark(200, 0), bright_and_dark(80, 1)
    assert test.labels is not None
    other_way = replace(test, classes=("bright", "dark"), labels=1 - test.labels)
    found = [
        probe("pixels", lambda _: scaled_pixels, train, images, num_train=200, seeds=[0])
        for images in (test, other_way)
    ]
    assert found[0].by_seed == found[1].by_seed
    assert found[0].accuracy.value > 0.9


def test_logistic_regression_is_that_of_scipy() -> None:
    random = np.random.default_rng(0)
    features = random.normal(2, 3, (60, 4))
    labels = random.integers(0, 3, 60)
    given = (torch.from_numpy(features), torch.from_numpy(labels), 3)
    found = fit_logistic(*given, strength=0.05)
    later = fit_logistic(*given, strength=0.05, start=fit_logistic(*given, strength=1.0))
    torch.testing.assert_close(later.weight, found.weight, rtol=0, atol=1e-4)
    inputs = (features - features.mean(0)) / features.std(0)

    def loss(flat: NDArray[np.float64]) -> float:
        weight, bias = flat[:12].reshape(4, 3), flat[12:]
        logits = inputs @ weight + bias
        chosen = logits[np.arange(60), labels]
        log_sum = np.log(np.exp(logits).sum(1))
        return float((log_sum - chosen).mean() + 0.025 * (weight**2).sum())

    expected = minimize(loss, np.zeros(15), method="BFGS", options={"gtol": 1e-9}).x
    assert found.weight.numpy() == pytest.approx(expected[:12].reshape(4, 3), abs=1e-4)
    logits = torch.from_numpy(inputs @ expected[:12].reshape(4, 3) + expected[12:])
    mine = found.logits(torch.from_numpy(features)).log_softmax(1)
    torch.testing.assert_close(mine, logits.log_softmax(1), rtol=0, atol=1e-3)


def test_a_feature_that_never_changes_does_no_harm() -> None:
    features = torch.cat([torch.randn(30, 2), torch.ones(30, 1)], dim=1)
    found = fit_logistic(features, torch.arange(30) % 2, 2, strength=0.1)
    assert torch.isfinite(found.logits(features)).all()


def test_activations_are_the_largest_of_each_part_of_the_maps() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 1, 8))
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)

    class ScoringDiscriminator(nn.Module):
        def forward(self, images: Tensor, labels: Tensor | None) -> Tensor:
            logits: Tensor = network(images)
            return logits

        def __init__(self) -> None:
            super().__init__()
            self.network = network

    found = pooled_activations(ScoringDiscriminator())(images)
    assert found.shape == (5, 2 * 16)  # the last map is 1x1
    first = network[0](images.float() / 127.5 - 1)
    expected = first.reshape(5, 2, 4, 2, 4, 2).amax((3, 5)).flatten(1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model", SMALL_MODELS)
def test_features_of_every_discriminator_depend_on_one_image_and_no_label(model: str) -> None:
    spec = {"img_channels": 3, "num_classes": 0, "blocks_per_stage": 1, "mapping_layers": 2}
    spec |= {"residual": False, **SMALL_MODELS[model]}
    torch.manual_seed(0)
    network = build_discriminator(spec).eval()
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    features_of = pooled_activations(network, num_classes=int(spec["num_classes"]))
    found = features_of(images)
    assert found.shape[0] == 4
    torch.testing.assert_close(features_of(images[:1]), found[:1])
    assert torch.isfinite(found).all()
    assert found.std(0).max() > 0


def test_a_probe_finds_what_is_there_and_nothing_where_nothing_is() -> None:
    train, test = bright_and_dark(200, 0), bright_and_dark(400, 1)
    totals: dict[str, int] = {}
    done: dict[str, int] = defaultdict(int)

    def start_task(text: str, total: int) -> Callable[[int], None]:
        totals[text] = total

        def count(number: int) -> None:
            done[text] += number

        return count

    found = probe(
        "pixels", lambda _: scaled_pixels, train, test, num_train=150, start_task=start_task
    )
    assert found.accuracy.value == 1.0
    assert found.num_features == 768
    assert done == totals
    # The same features of test images serve all seeds.
    assert sum("test images" in text for text in totals) == 1
    assert sum("training images" in text for text in totals) == 3
    shuffled = np.random.default_rng(2).permutation(test.labels if test.labels is not None else 0)
    chance = probe(
        "pixels", lambda _: scaled_pixels, train, Held(test.pixels, shuffled), num_train=150
    )
    assert abs(chance.accuracy.value - 0.5) < 0.1


def test_a_probe_needs_labels_images_and_one_shape() -> None:
    train = bright_and_dark(20, 0)
    with pytest.raises(ConfigError, match="have none"):
        probe("p", lambda _: scaled_pixels, Held(train.pixels, None), train, num_train=20)
    with pytest.raises(DataError, match="too few"):
        probe("p", lambda _: scaled_pixels, train, train, num_train=5)
    with pytest.raises(DataError, match="have shape"):
        probe("p", lambda _: scaled_pixels, train, bright_and_dark(20, 0, size=8), num_train=20)


def test_joined_sets_keep_images_and_labels_together() -> None:
    first, second = bright_and_dark(5, 0), bright_and_dark(7, 1)
    joined = Concatenated(first, second)
    numbers = np.array([11, 0, 6, 4, 5])
    whole = torch.cat([first.pixels, second.pixels])
    assert torch.equal(joined.read(numbers), whole[torch.from_numpy(numbers)])
    assert torch.equal(joined.read(np.array([1, 2])), first.pixels[1:3])
    assert first.labels is not None
    assert second.labels is not None
    assert joined.labels is not None
    assert joined.labels.tolist() == [*first.labels, *second.labels]
    assert Concatenated(first, Held(second.pixels, None)).labels is None


def test_images_are_chosen_evenly_over_the_classes() -> None:
    images = bright_and_dark(100, 0)
    chosen = same_of_each_class(images, 21, seed=3)
    assert chosen.labels is not None
    assert np.bincount(chosen.labels).tolist() == [11, 10]
    assert len(set(chosen.indices.tolist())) == 21
    with pytest.raises(DataError, match="of class 0, 500 are needed"):
        same_of_each_class(images, 1000, seed=3)


@pytest.mark.slow
def test_more_images_of_the_same_kind_help() -> None:
    """Of four images brightness is all that differs; two hundred stand for generated ones."""

    def noisy(num_images: int, seed: int) -> Held:
        random = np.random.default_rng(seed)
        labels = random.integers(0, 2, num_images)
        brightness = random.normal(128, 40, (num_images, 1, 1, 1))
        pixels = brightness + random.normal(0, 30, (num_images, 3, 8, 8))
        pixels[:, :, :, :4] += 12 * (2 * labels - 1)[:, None, None, None]
        return Held(torch.from_numpy(np.clip(pixels, 0, 255).astype(np.uint8)), labels)

    recipe = ClassifierRecipe(num_passes=3000, crop_and_flip=False, width=8)
    found = augment_with_samples(
        noisy(50, 0), noisy(200, 1), noisy(300, 2), 4, recipe=recipe, seeds=(0, 1)
    )
    assert found.num_real == 4
    assert found.num_generated == 200
    assert found.gain.value == pytest.approx(found.both.value - found.real.value)
    assert found.gain.value > 0


def test_the_classifier_of_a_run_is_tested_as_it_is(tmp_path: Path) -> None:
    spec = {**SMALL_MODELS["dcgan"], "img_channels": 3, "num_classes": 0}
    torch.manual_seed(0)
    classifier = build_classifier({**spec, "num_classes": 2})
    generator = build_generator(spec)
    path = tmp_path / "nimg-1.safetensors"
    names = ("dark", "bright")
    others = {"classifier": classifier}
    save_snapshot(path, generator, spec=spec, nimg=1, classes=names, others=others)
    assert snapshot_classes(path) == names
    images = bright_and_dark(70, 0)
    loaded = classifier_of_run(path)
    found = snapshot_accuracy(loaded, images.classes, images)
    logits = classifier(images.pixels.float() / 127.5 - 1, classes=True)
    assert images.labels is not None
    assert found == (logits.argmax(1).numpy() == images.labels).mean()
    counted_otherwise = replace(images, classes=("bright", "dark"), labels=1 - images.labels)
    assert snapshot_accuracy(loaded, names, counted_otherwise) == found
    with pytest.raises(DataError, match="lacks: dim"):
        snapshot_accuracy(loaded, names, replace(images, classes=("dark", "dim")))
    save_snapshot(path, generator, spec=spec, nimg=1)
    with pytest.raises(ConfigError, match="has no classifier"):
        classifier_of_run(path)
