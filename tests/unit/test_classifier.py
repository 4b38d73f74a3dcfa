"""The small classifier, and the two scores that train it: two-sample test, accuracy score."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ganscale.data.labels import numbered_classes
from ganscale.errors import ConfigError, DataError
from ganscale.evaluation.gan_metrics.two_sample import (
    mean_neighbour_accuracy,
    network_two_sample,
)
from ganscale.evaluation.image_sets import ImageSet
from ganscale.evaluation.image_views import Subset, halves
from ganscale.evaluation.recognition.accuracy_score import (
    classification_accuracy_score,
    paired_difference,
    unpaired_difference,
)
from ganscale.evaluation.recognition.classifier import (
    Classifier,
    ClassifierRecipe,
    _crop_and_flip,
    predict,
    train_classifier,
)
from ganscale.metrics.intervals import wilson_interval

RECIPE = ClassifierRecipe(num_passes=1500, crop_and_flip=False, width=8, batch_size=32)


class Pixels:
    """An image set in memory."""

    def __init__(self, pixels: Tensor, labels: NDArray[np.int64] | None) -> None:
        self._pixels = pixels
        self.labels = labels
        self.classes = () if labels is None else numbered_classes(labels)
        self.description = f"{len(pixels)} test images"
        self.digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        self.shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, indices: NDArray[np.int64]) -> Tensor:
        return self._pixels[torch.from_numpy(indices)]


def noise(number: int, *, seed: int, shape: tuple[int, int, int] = (3, 8, 8)) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, *shape), generator=draws, dtype=torch.uint8)


def striped(number: int, *, seed: int, shape: tuple[int, int, int] = (3, 8, 8)) -> Pixels:
    """Noise in three classes: as it is, with dark rows, with dark columns."""
    pixels, labels = noise(number, seed=seed, shape=shape), np.arange(number) % 3
    pixels[1::3, :, ::2] //= 4
    pixels[2::3, :, :, ::2] //= 4
    return Pixels(pixels, labels)


def trained(images: ImageSet, recipe: ClassifierRecipe = RECIPE, *, seed: int = 0) -> Classifier:
    assert images.labels is not None
    return train_classifier(images, images.labels, 3, recipe=recipe, seed=seed)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 13)])
@pytest.mark.parametrize("crop_and_flip", [False, True])
def test_classes_that_can_be_told_apart_are(
    shape: tuple[int, int, int], crop_and_flip: bool
) -> None:
    recipe = dataclasses.replace(RECIPE, crop_and_flip=crop_and_flip, num_passes=2000)
    model = trained(striped(300, seed=0, shape=shape), recipe)
    fresh = striped(90, seed=1, shape=shape)
    assert (predict(model, fresh) == fresh.labels).all()


def test_labels_without_meaning_are_guessed() -> None:
    def meaningless(seed: int) -> Pixels:
        labels = np.random.default_rng(seed).integers(0, 3, 600)
        return Pixels(noise(600, seed=seed), labels)

    fresh = meaningless(1)
    hits = predict(trained(meaningless(0)), fresh) == fresh.labels
    chance = wilson_interval(int(hits.sum()), len(hits))
    assert chance.low is not None
    assert chance.high is not None
    assert chance.low < 1 / 3 < chance.high


@pytest.mark.parametrize("crop_and_flip", [False, True])
def test_a_seed_decides_every_bit(crop_and_flip: bool) -> None:
    recipe = dataclasses.replace(RECIPE, crop_and_flip=crop_and_flip, num_passes=320)
    images = striped(50, seed=0)
    torch.manual_seed(1)
    one = trained(images, recipe).state_dict()
    torch.manual_seed(2)
    again = trained(images, recipe).state_dict()
    other = trained(images, recipe, seed=1).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_training_leaves_the_callers_randomness_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trained(striped(50, seed=0), dataclasses.replace(RECIPE, num_passes=64))
    assert torch.equal(torch.rand(3), expected)


def test_a_verdict_does_not_depend_on_the_images_beside_it() -> None:
    model = trained(striped(60, seed=0), dataclasses.replace(RECIPE, num_passes=320))
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images[:1]), model(images)[:1])


@pytest.mark.parametrize(("size", "last"), [(8, 1), (32, 4), (63, 8), (64, 4), (256, 4)])
def test_large_images_get_more_stages(size: int, last: int) -> None:
    model = Classifier((1, size, size), 2, width=8, blocks=1)
    assert model.body(torch.zeros(2, 1, size, size)).shape == (2, 32, last, last)


def test_cropping_moves_whole_images_and_flips_half() -> None:
    pixels = noise(400, seed=0, shape=(2, 16, 8)) // 2 + 1
    moved = _crop_and_flip(pixels, torch.Generator().manual_seed(0))
    assert moved.shape == pixels.shape
    found = [moves_of(image, after) for image, after in zip(pixels, moved, strict=True)]
    assert all(len(moves) == 1 for moves in found)
    seen = {moves[0] for moves in found}
    assert {down for down, _, _ in seen} == set(range(-2, 3))
    assert {right for _, right, _ in seen} == {-1, 0, 1}
    assert 0.4 < np.mean([moves[0][2] for moves in found]) < 0.6


def moves_of(image: Tensor, after: Tensor) -> list[tuple[int, int, bool]]:
    """The shifts and mirrorings of an image, zeros coming in, that give the other."""
    padded = torch.nn.functional.pad(image, (1, 1, 2, 2))
    return [
        (down, right, mirrored)
        for down in range(-2, 3)
        for right in (-1, 0, 1)
        for mirrored in (False, True)
        if torch.equal(
            after, mirror(padded[:, 2 + down : 18 + down, 1 + right : 9 + right], mirrored)
        )
    ]


def mirror(image: Tensor, mirrored: bool) -> Tensor:
    return image.flip(-1) if mirrored else image


def test_progress_counts_the_passes() -> None:
    counts: list[int] = []
    images, recipe = striped(60, seed=0), dataclasses.replace(RECIPE, num_passes=130)
    network_two_sample(
        *halves(images), num_images=20, seeds=(0, 1), recipe=recipe, progress=counts.append
    )
    # Batches are of 20 images here, all there are to train on.
    assert counts == 2 * [*6 * [20], 10]
    counts.clear()
    classification_accuracy_score(images, images, images, recipe=recipe, progress=counts.append)
    assert counts == 2 * [*4 * [32], 2]


def test_images_that_differ_are_told_apart_by_the_network() -> None:
    real, fake = Pixels(noise(200, seed=0), None), Pixels(noise(250, seed=1) // 2, None)
    report = network_two_sample(real, fake, seeds=(0, 1), recipe=RECIPE)
    assert report.num_images == 200
    assert [repeat.accuracy.value for repeat in report.repeats] == [1.0] * 2
    assert report.p_value < 1e-9
    assert report.to_json()["accuracy"]["value"] == 1.0


def test_halves_of_one_set_are_not_told_apart_by_the_network() -> None:
    first, second = halves(Pixels(noise(600, seed=0), None))
    report = network_two_sample(first, second, seeds=range(5), recipe=RECIPE)
    contained = [
        repeat.accuracy.low <= 0.5 <= repeat.accuracy.high  # type: ignore[operator]
        for repeat in report.repeats
    ]
    assert sum(contained) >= 4
    assert report.p_value > 0.05
    assert len({repeat.accuracy for repeat in report.repeats}) > 1


def test_a_report_is_the_same_for_the_same_seeds() -> None:
    first, second = halves(Pixels(noise(100, seed=0), None))
    recipe = dataclasses.replace(RECIPE, num_passes=320)
    reports = [
        network_two_sample(first, second, num_images=40, seeds=(0, 7), recipe=recipe)
        for _ in range(2)
    ]
    assert reports[0] == reports[1]


def test_halves_are_disjoint() -> None:
    whole = Pixels(noise(31, seed=0), None)
    first, second = halves(whole)
    assert len(first) == len(second) == 15
    assert not set(first.indices) & set(second.indices)


def test_neighbours_are_of_other_images_for_each_seed() -> None:
    draws = torch.Generator().manual_seed(0)
    real, fake = torch.randn(300, 2, generator=draws), torch.randn(200, 2, generator=draws) + 2
    found = [mean_neighbour_accuracy(real, fake, num_images=100, seeds=(n,)) for n in (0, 1, 2)]
    assert len(set(found)) > 1
    # Cover and Hart 1967 for densities whose means are 2 sqrt(2) apart: 0.884 with many points.
    assert all(0.8 < one.value < 1 for one in found)
    mean = mean_neighbour_accuracy(real, fake, num_images=100, seeds=(0, 1, 2))
    assert mean.value == pytest.approx(np.mean([one.value for one in found]))


def test_a_two_sample_test_says_what_it_lacks() -> None:
    real, other = Pixels(noise(40, seed=0), None), Pixels(noise(40, seed=1), None)
    large = Pixels(noise(40, seed=1, shape=(3, 9, 9)), None)
    few = Pixels(noise(19, seed=1), None)
    with pytest.raises(DataError, match="at least 20 images of each set, got 40 and 19"):
        network_two_sample(real, few, recipe=RECIPE)
    with pytest.raises(DataError, match="at least 20 images of each set"):
        mean_neighbour_accuracy(torch.zeros(40, 2), torch.zeros(19, 2))
    with pytest.raises(DataError, match=r"40 test images have shape \(3, 8, 8\), .* one shape"):
        network_two_sample(real, large, recipe=RECIPE)
    with pytest.raises(DataError, match="compared with themselves"):
        network_two_sample(real, real, recipe=RECIPE)
    with pytest.raises(ConfigError, match="at least one seed"):
        network_two_sample(real, other, seeds=(), recipe=RECIPE)


def test_a_classifier_says_what_it_lacks() -> None:
    small = Pixels(noise(9, seed=0, shape=(3, 7, 12)), np.arange(9) % 3)
    with pytest.raises(DataError, match="needs 8x8 pixels or more, these are 12x7"):
        trained(small)
    with pytest.raises(DataError, match="at least 2 images"):
        trained(striped(1, seed=0))
    with pytest.raises(DataError, match="at least 2 classes"):
        train_classifier(striped(9, seed=0), np.zeros(9, dtype=np.int64), 1, recipe=RECIPE, seed=0)


def test_good_samples_teach_what_real_images_do() -> None:
    samples, train, test = (striped(number, seed=number) for number in (240, 210, 90))
    score = classification_accuracy_score(samples, train, test, recipe=RECIPE)
    for part in (score.gan_train, score.gan_test, score.real):
        assert part.accuracy.value > 0.95
        assert len(part.by_class) == 3
    assert score.to_json()["gan_train"]["accuracy"]["value"] == score.gan_train.accuracy.value


def test_samples_that_lack_a_class_do_not_teach_it() -> None:
    train, test, whole = (striped(210, seed=seed) for seed in range(3))
    samples = Subset(whole, np.flatnonzero(np.asarray(whole.labels) != 2))
    score = classification_accuracy_score(samples, train, test, recipe=RECIPE)
    assert score.gan_test.by_class[2] is None
    assert score.gan_test.accuracy.value > 0.95
    taught = [estimate.value for estimate in score.gan_train.by_class if estimate is not None]
    assert taught[2] == 0
    assert score.gan_train.accuracy.value == pytest.approx(np.mean(taught))
    assert score.train_gap.value == pytest.approx(
        score.real.accuracy.value - score.gan_train.accuracy.value
    )
    assert score.train_gap.low is not None
    assert score.train_gap.low > 0.2


def test_an_accuracy_score_says_what_it_lacks() -> None:
    images = striped(60, seed=0)
    unlabelled = Pixels(noise(60, seed=0), None)
    large = striped(60, seed=0, shape=(3, 9, 9))
    unknown = Pixels(noise(60, seed=0), np.arange(60) % 5)
    for three in ((unlabelled, images, images), (images, images, unlabelled)):
        with pytest.raises(ConfigError, match="needs labels, and 60 test images have none"):
            classification_accuracy_score(*three, recipe=RECIPE)
    with pytest.raises(DataError, match="needs one shape"):
        classification_accuracy_score(large, images, images, recipe=RECIPE)
    with pytest.raises(DataError, match="60 test images lacks: 3, 4"):
        classification_accuracy_score(unknown, images, images, recipe=RECIPE)
    one_class = Pixels(noise(60, seed=0), np.zeros(60, dtype=np.int64))
    with pytest.raises(DataError, match="at least 2 classes"):
        classification_accuracy_score(one_class, one_class, one_class, recipe=RECIPE)
    with pytest.raises(DataError, match="needs images"):
        classification_accuracy_score(
            Subset(images, np.empty(0, dtype=np.int64)), images, images, recipe=RECIPE
        )


def test_a_paired_gaps_interval_is_that_of_the_differences() -> None:
    # McNemar's table: 30 only the first is right about, 10 only the second, of 100.
    hits = np.repeat([True, True, False, False], [40, 30, 10, 20])
    other = np.repeat([True, False, True, False], [40, 30, 10, 20])
    gap = paired_difference(hits, other)
    spread = math.sqrt((30 + 10 - (30 - 10) ** 2 / 100) / 100**2)
    assert gap.value == pytest.approx(0.2)
    assert gap.low == pytest.approx(0.2 - 1.959964 * spread)
    assert gap.high == pytest.approx(0.2 + 1.959964 * spread)


def test_an_independent_gaps_interval_is_newcombes() -> None:
    # Newcombe 1998, table II (a): 56/70 and 48/80, method 10 without continuity correction.
    gap = unpaired_difference(np.arange(70) < 56, np.arange(80) < 48)
    assert gap.value == pytest.approx(0.2)
    assert gap.low == pytest.approx(0.0524, abs=5e-5)
    assert gap.high == pytest.approx(0.3339, abs=5e-5)
