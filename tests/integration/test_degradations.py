"""Real images harmed in known ways are put in the right order, by features of a real network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.degradations import Changed, blur, noise
from ganscale.data.shards import ShardSet
from ganscale.evaluation.distributions.evaluate import evaluate
from ganscale.evaluation.distributions.evaluation import Evaluation
from ganscale.evaluation.image_sets import ImageSet, ImagesOfShards
from ganscale.evaluation.image_views import Subset
from ganscale.metrics.extractors import EfficientNetLite0
from ganscale.world import World, process_group

NUM = 360

pytestmark = pytest.mark.slow  # a minute: 2,160 images through EfficientNet


@pytest.fixture(scope="module")
def found(cifar10_shards: Path) -> dict[str, dict[str, float]]:
    """Figures by what was done to real images, without their extractor's name."""
    images = ImagesOfShards(ShardSet.load(cifar10_shards))
    order = np.random.default_rng(0).permutation(len(images))
    reference = Subset(images, order[:NUM])
    rest = Subset(images, order[NUM:])
    assert rest.labels is not None
    real = Subset.random(rest, NUM, seed=1)
    few = Subset(rest, np.flatnonzero(rest.labels < 3)[:NUM])
    cases: dict[str, ImageSet] = {
        "real": real,
        "slight noise": Changed(real, "slight noise", noise(8)),
        "noise": Changed(real, "noise", noise(40)),
        "slight blur": Changed(real, "slight blur", blur(0.7)),
        "blur": Changed(real, "blur", blur(2)),
        "three classes": few,
    }
    extractor, world = EfficientNetLite0(), World()
    figures = {}
    with torch.no_grad(), process_group(world):
        for name, samples in cases.items():
            got = evaluate(samples, reference, extractor, world, metrics=["prdc", "c2st_1nn"])
            assert isinstance(got, Evaluation)
            figures[name] = {
                key.removesuffix(extractor.suffix): value.value
                for key, value in got.metrics.items()
            }
    return figures


@pytest.mark.parametrize("harm", ["noise", "blur"])
def test_precision_and_coverage_fall_with_harm(
    found: dict[str, dict[str, float]], harm: str
) -> None:
    for figure in ("precision", "coverage"):
        whole, slight, strong = (found[name][figure] for name in ("real", f"slight {harm}", harm))
        assert whole > slight > strong, figure
    assert found["real"]["precision"] > 0.7
    assert found[harm]["precision"] < 0.5


def test_recall_falls_and_precision_stays_when_classes_are_dropped(
    found: dict[str, dict[str, float]],
) -> None:
    whole, few = found["real"], found["three classes"]
    assert few["recall"] < whole["recall"] - 0.15
    assert few["coverage"] < whole["coverage"] - 0.15
    assert few["precision"] > whole["precision"] - 0.1


def test_neighbours_tell_harmed_images_from_real_ones(found: dict[str, dict[str, float]]) -> None:
    assert found["real"]["c2st_1nn"] == pytest.approx(0.5, abs=0.06)
    for name in ("noise", "blur", "three classes"):
        assert found[name]["c2st_1nn"] > 0.6, name
