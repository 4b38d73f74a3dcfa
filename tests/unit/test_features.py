"""Features of image sets: kept by digest, refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ganscale.config import MetricName
from ganscale.data.shards import ShardSet
from ganscale.errors import DataError
from ganscale.evaluation.distributions.evaluate import evaluate
from ganscale.evaluation.distributions.features import FeatureCache, extract, extract_reference
from ganscale.evaluation.image_sets import ImageSet, ImagesOfShards, open_images
from ganscale.evaluation.image_views import Subset
from ganscale.metrics.fid import frechet_distance
from ganscale.metrics.statistics import Moments, RunningMoments
from ganscale.world import World, process_group
from tests.support.small_extractor import SmallExtractor

WORLD = World()


def folder_of(path: Path, num: int, *, seed: int = 0, size: int = 16, mode: str = "RGB") -> Path:
    """PNGs of noise."""
    random = np.random.default_rng(seed)
    path.mkdir()
    for number in range(num):
        pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path / f"{number:03d}.png")
    return path


def opened(path: Path) -> ImageSet:
    return open_images(str(path), scratch=path / "scratch")


def test_features_are_those_of_each_image_alone(tmp_path: Path) -> None:
    images = opened(folder_of(tmp_path / "a", 73))
    with process_group(WORLD):
        found = extract_reference(images, SmallExtractor(), WORLD)
    assert found is not None
    alone = [SmallExtractor().features(images.read(np.array([i])))[0] for i in range(73)]
    torch.testing.assert_close(found.rows, torch.stack(alone))
    torch.testing.assert_close(found.moments.covariance, Moments.of(found.rows).covariance)
    assert found.moments.count == 73


def test_running_moments_are_those_of_all_rows_however_they_come() -> None:
    rows = torch.randn(9000, 5, generator=torch.Generator().manual_seed(0)) + 3
    whole = Moments.of(rows)
    for num_rows in (1, 100, 4096, 9000):
        running = RunningMoments(5)
        for part in rows.split(num_rows):
            running.add(part)
        moments = running.total()
        assert moments.count == 9000
        assert torch.equal(moments.mean, whole.mean)
        assert torch.equal(moments.scatter, whole.scatter)
    covariance = torch.from_numpy(np.cov(rows.numpy().astype(np.float64), rowvar=False))
    torch.testing.assert_close(whole.covariance, covariance, rtol=1e-12, atol=0)


def test_a_reference_is_worked_through_once(tmp_path: Path) -> None:
    images, extractor = opened(folder_of(tmp_path / "a", 20)), SmallExtractor()
    cache = FeatureCache(tmp_path / "cache")
    with process_group(WORLD):
        first = cache.extract(images, extractor, WORLD)
        num_images = extractor.num_images
        second = cache.extract(images, extractor, WORLD)
        assert extractor.num_images == num_images
        other = cache.extract(opened(folder_of(tmp_path / "b", 20, seed=1)), extractor, WORLD)
    assert first is not None
    assert second is not None
    assert other is not None
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.moments.scatter, second.moments.scatter)
    assert not torch.equal(first.rows, other.rows)


def test_damaged_features_are_made_anew(tmp_path: Path) -> None:
    images, extractor = opened(folder_of(tmp_path / "a", 20)), SmallExtractor()
    cache = FeatureCache(tmp_path / "cache")
    with process_group(WORLD):
        first = cache.extract(images, extractor, WORLD)
        (file,) = cache.folder.iterdir()
        file.write_bytes(file.read_bytes()[:500])
        with pytest.warns(UserWarning, match="computed again"):
            second = cache.extract(images, extractor, WORLD)
        third = cache.extract(images, extractor, WORLD)
    assert first is not None
    assert second is not None
    assert third is not None
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.rows, third.rows)


def test_gray_images_are_three_equal_channels(tmp_path: Path) -> None:
    gray = opened(folder_of(tmp_path / "a", 9, mode="L"))
    assert gray.shape == (1, 16, 16)
    with process_group(WORLD):
        found = extract(gray, SmallExtractor(), WORLD)
    assert found is not None
    pixels = gray.read(np.arange(9)).repeat(1, 3, 1, 1)
    torch.testing.assert_close(found.rows, SmallExtractor().features(pixels))


def test_what_cannot_be_compared_is_told_in_one_line(tmp_path: Path) -> None:
    good = opened(folder_of(tmp_path / "good", 30))
    small = opened(folder_of(tmp_path / "small", 30, size=8))
    clear = opened(folder_of(tmp_path / "clear", 30, mode="RGBA"))
    mixed = folder_of(tmp_path / "mixed", 3)
    Image.new("RGB", (9, 16)).save(mixed / "010.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    with process_group(WORLD):
        with pytest.raises(DataError, match=r"shape \(3, 8, 8\).* \(3, 16, 16\): only images of"):
            evaluate(small, good, SmallExtractor(), WORLD)
        with pytest.raises(DataError, match="not images of 4 channels"):
            extract(clear, SmallExtractor(), WORLD)
        with pytest.raises(DataError, match="010.png is 9x16 with 3 channels, the first 16x16"):
            extract(opened(mixed), SmallExtractor(), WORLD)
        with pytest.raises(DataError, match="empty"):
            opened(empty)


def test_a_metric_that_says_nothing_is_skipped_or_an_error(tmp_path: Path) -> None:
    a = opened(folder_of(tmp_path / "a", 40))
    b = opened(folder_of(tmp_path / "b", 40, seed=1))
    with process_group(WORLD):
        found = evaluate(a, b, SmallExtractor(), WORLD)
        with pytest.raises(DataError, match="defined by inception-v3's classes"):
            evaluate(a, b, SmallExtractor(), WORLD, metrics=["inception_score"], required=True)
        with pytest.raises(DataError, match="40 images are too few"):
            evaluate(a, b, SmallExtractor(), WORLD, metrics=["kid"])
    assert found is not None
    assert set(found.skipped) == {"kid", "inception_score", "fid_per_class"}
    assert {"fd_small", "fd_infinity_small", "recall_small"} <= set(found.metrics)
    assert found.row()["metrics/fd_small"] == found.metrics["fd_small"].value
    assert found.protocol.num_samples == 40
    assert found.protocol.extractor == "small"


def test_a_class_is_compared_with_all_its_reference_images(procedural_shards: Path) -> None:
    reference = ImagesOfShards(ShardSet.load(procedural_shards))
    samples, extractor = Subset.random(reference, 70, seed=1), SmallExtractor()
    with process_group(WORLD):
        found = evaluate(samples, reference, extractor, WORLD, metrics=["fid_per_class", "prdc"])
    assert found is not None
    # As many reference images as there are samples are too few of each class.
    assert 70 / len(reference.classes) < extractor.num_features
    distances = []
    for label in range(len(reference.classes)):
        of_class = [
            Moments.of(extractor.features(images.read(np.flatnonzero(images.labels == label))))
            for images in (samples, reference)
        ]
        distances.append(frechet_distance(*of_class))
    value = found.metrics["fd_per_class_small"].value
    assert value == pytest.approx(float(np.mean(distances)), rel=1e-4)
    assert found.protocol.num_reference_rows == 70


def test_of_too_many_samples_the_protocol_names_those_that_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = opened(folder_of(tmp_path / "a", 40))
    b = opened(folder_of(tmp_path / "b", 40, seed=1))
    monkeypatch.setattr("ganscale.evaluation.distributions.evaluate.MAX_ROWS", 30)
    extractor = SmallExtractor()
    with process_group(WORLD):
        found = evaluate(a, b, extractor, WORLD, metrics=["fid"])
        of_part = evaluate(Subset.random(a, 30, seed=0), b, extractor, WORLD, metrics=["fid"])
    assert found is not None
    assert of_part is not None
    assert found.protocol.num_samples == 30
    assert found.protocol.samples.startswith("30 of 40 images of")
    assert found.metrics == of_part.metrics


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("fid", "the reference: 6 images are too few for 8 features"),
        ("fid_infinity", "the samples: 12 images are too few for 8 features"),
        ("kid", "the samples: 12 images are too few for a kernel distance"),
        ("inception_score", "defined by inception-v3's classes"),
        ("prdc", "5 images are too few for 5 neighbours"),
        ("fid_per_class", "needs labels of samples and reference"),
        ("c2st_1nn", "needs at least 20 images of each set"),
    ],
)
def test_what_numbers_and_labels_rule_out_is_told_before_features_are_extracted(
    tmp_path: Path, metric: MetricName, words: str
) -> None:
    samples = opened(folder_of(tmp_path / "a", 12))
    reference = opened(folder_of(tmp_path / "b", 6, seed=1))
    extractor = SmallExtractor()
    rows = 5 if metric == "prdc" else None
    with process_group(WORLD):
        for metrics, required in (([metric], False), (["authenticity", metric], True)):
            with pytest.raises(DataError, match=f"^{metric}: .*{words}"):
                evaluate(
                    samples, reference, extractor, WORLD,
                    metrics=metrics, required=required, num_reference_rows=rows,
                )  # fmt: skip
        assert extractor.num_images == 0
        found = evaluate(
            samples, reference, extractor, WORLD,
            metrics=["authenticity", metric], num_reference_rows=rows,
        )  # fmt: skip
    assert found is not None
    assert list(found.skipped) == [metric]
    assert list(found.metrics) == ["authenticity_small"]


def test_a_decomposition_that_fails_is_a_reason_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = opened(folder_of(tmp_path / "a", 40))

    def fail(matrix: torch.Tensor) -> None:
        raise LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with process_group(WORLD):
        found = evaluate(images, images, SmallExtractor(), WORLD)
        with pytest.raises(DataError, match="fid: failed to converge"):
            evaluate(images, images, SmallExtractor(), WORLD, metrics=["fid"], required=True)
        # The others have been computed by then.
        part = evaluate(
            images, images, SmallExtractor(), WORLD, metrics=["fid", "prdc"], required=True
        )
    assert part is not None
    assert "recall_small" in part.metrics
    with pytest.raises(DataError, match="fid: failed to converge"):
        part.check_complete()
    assert found is not None
    assert found.skipped["fid"] == "failed to converge"
    assert "recall_small" in found.metrics


def test_equal_digests_are_equal_images(tmp_path: Path) -> None:
    a = opened(folder_of(tmp_path / "a", 12))
    again = opened(folder_of(tmp_path / "again", 12))
    other = opened(folder_of(tmp_path / "other", 12, seed=5))
    assert a.digest == again.digest != other.digest
    half = Subset.random(a, 6, seed=0)
    assert len(half) == 6
    assert half.digest == Subset.random(again, 6, seed=0).digest != a.digest
    assert half.digest != Subset.random(a, 6, seed=1).digest
    assert Subset.random(a, 12, seed=0) is a


def test_a_damaged_shard_image_is_named(own_set: object, tmp_path: Path) -> None:
    images = ImagesOfShards(own_set)  # type: ignore[arg-type]
    (span,) = images.shard_set.spans(np.array([3]))
    path = Path(images.shard_set.location) / span.name
    data = bytearray(path.read_bytes())
    data[span.start + span.length // 2] ^= 4
    path.write_bytes(data)
    with process_group(WORLD), pytest.raises(DataError, match="CRC-32 differs"):
        extract(images, SmallExtractor(), WORLD)
