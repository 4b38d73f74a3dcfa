"""Images of a generator as a set: the same whatever is read together, and none is drawn in vain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ganscale.evaluation.distributions.features import extract
from ganscale.evaluation.image_sets import GeneratedImages
from ganscale.evaluation.image_views import halves
from ganscale.generation.latents import seeded_labels
from ganscale.generation.sampler import SampleableGenerator, rows_per_forward
from ganscale.world import World, process_group
from tests.support.counting_generator import counting_generator
from tests.support.small_extractor import SmallExtractor

_GPU_ROWS = rows_per_forward("cuda", 32)
NUM_IMAGES = 1300


@pytest.fixture(params=[16, _GPU_ROWS])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The rows of a forward on the CPU and on a GPU."""
    num_rows: int = request.param
    monkeypatch.setattr("ganscale.generation.sampler._CPU_ROWS", num_rows)
    return num_rows


def test_any_order_of_reading_gives_the_images_of_the_seeds(rows: int) -> None:
    _, generator = counting_generator()
    images = GeneratedImages(generator, NUM_IMAGES, 7, "fake", "fake")
    expected = generator.sample(NUM_IMAGES, seed=7)
    assert len(expected.flatten(1).unique(dim=0)) == NUM_IMAGES
    random = np.random.default_rng(0)
    reads = [
        np.array([0]),
        np.arange(50),
        np.arange(50, 700),
        np.arange(640, 704),
        np.arange(NUM_IMAGES - 30, NUM_IMAGES + 34) % NUM_IMAGES,
        random.permutation(NUM_IMAGES)[:100],
        np.array([9, 8, 8, 3]),
        np.arange(100)[::-1].copy(),
    ]
    for indices in reads:
        assert torch.equal(images.read(indices), expected[torch.from_numpy(indices)])


@pytest.mark.parametrize("num_read", [1, 50, 64, 100, 600])
def test_images_read_in_order_are_drawn_once(rows: int, num_read: int) -> None:
    network, generator = counting_generator()
    images = GeneratedImages(generator, NUM_IMAGES, 0, "fake", "fake")
    assert images.shape == (3, 8, 8)
    for start in range(0, NUM_IMAGES, num_read):
        images.read(np.arange(start, min(start + num_read, NUM_IMAGES)))
    assert network.num_rows == -(-NUM_IMAGES // rows) * rows


def test_scattered_images_take_no_more_rows_than_fill_forwards(rows: int) -> None:
    network, generator = counting_generator()
    images = GeneratedImages(generator, NUM_IMAGES, 0, "fake", "fake")
    order = np.random.default_rng(0).permutation(NUM_IMAGES)[:600].reshape(6, 100)
    for indices in order:
        images.read(indices)
    assert network.num_rows <= 6 * -(-100 // rows) * rows


def test_features_and_halves_draw_each_image_once(rows: int) -> None:
    network, generator = counting_generator()
    first, second = halves(GeneratedImages(generator, NUM_IMAGES, 0, "fake", "fake"))
    world = World()
    with process_group(world):
        for images in (first, second):
            assert extract(images, SmallExtractor(), world) is not None
    assert network.num_rows == -(-NUM_IMAGES // rows) * rows


class _PaintsLabels(nn.Module):
    """Images whose every pixel is the label."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(1))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return (labels * (2 / 255) - 1)[:, None, None, None].expand(-1, 3, 8, 8) + self.none


def _labelled_images(**info: object) -> GeneratedImages:
    spec = {"resolution": 8, "z_dim": 8, "num_classes": 3}
    generator = SampleableGenerator(_PaintsLabels(), spec=spec, info=info)
    return GeneratedImages(generator, NUM_IMAGES, 0, "fake", "fake")


def test_classes_are_drawn_as_often_as_the_training_set_has_them() -> None:
    images = _labelled_images(class_counts=[900, 0, 100])
    assert images.labels is not None
    # Six standard deviations.
    assert np.bincount(images.labels) / NUM_IMAGES == pytest.approx([0.9, 0, 0.1], abs=0.05)
    pixels = images.read(np.arange(NUM_IMAGES))
    assert np.array_equal(pixels[:, 0, 0, 0].numpy(), images.labels)
    assert images.description.endswith("labels as frequent as in the training set")
    assert images.digest != _labelled_images(class_counts=[100, 0, 900]).digest


def test_equal_or_unknown_frequencies_leave_labels_uniform() -> None:
    balanced, unknown = _labelled_images(class_counts=[7, 7, 7]), _labelled_images()
    expected = seeded_labels(list(range(NUM_IMAGES)), 3).numpy()
    for images in (balanced, unknown):
        assert images.labels is not None
        assert np.array_equal(images.labels, expected)
    assert balanced.digest == unknown.digest
    assert unknown.description.endswith("labels uniform")
