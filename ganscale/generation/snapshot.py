"""Snapshot files: how trained networks are written for inference, and how they are loaded.

A snapshot is one safetensors file: the averaged generator's weights, those of its encoder if it has
one, and as JSON metadata the model's description, the sha256 of the weights and, where images are
arrays of floats, which values -1 and 1 stand for. Weights in half precision are loaded as fp32.
Loading executes no stored code, and refuses weights that do not have their sha256; snapshots of
earlier versions have none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import ganscale
from ganscale.atomic_files import write_bytes
from ganscale.data.values import PIXELS, ValueRange
from ganscale.errors import CheckpointError
from ganscale.generation.sampler import SampleableGenerator
from ganscale.models import build_classifier, build_encoder, build_generator
from ganscale.models.classifying import ClassifyingDiscriminator
from ganscale.run_directory import RunDirectory

OTHERS = ("encoder", "classifier")
"""Networks that a snapshot may hold besides the generator."""

FOLDER_FILE = "model.safetensors"
"""The snapshot in a folder that `Generator.save_pretrained` has written."""

_METADATA_KEY = "ganscale"


def save_snapshot(
    path: Path,
    model: nn.Module,
    *,
    spec: dict[str, Any],
    nimg: int,
    classes: Sequence[str] = (),
    class_counts: Sequence[int] = (),
    others: Mapping[str, nn.Module] | None = None,
    values: ValueRange = PIXELS,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a generator, its description and other networks to `path`, atomically.

    Args:
        path: the file.
        model: the generator, usually an average of the trained one.
        spec: the `model` section that it was built from.
        nimg: the number of real images that it was trained on.
        classes: names of the training set's classes by label.
        class_counts: the number of its images of each class, if it is known; evaluations draw
            labels by it.
        others: further networks, by their names in `OTHERS`.
        values: the values of the generator's images.
        about: what people should know of it, as plain values: licence, figures, date.

    Returns:
        The description that was written.
    """
    info = describe(
        spec, nimg=nimg, classes=classes, class_counts=class_counts, values=values, about=about
    )
    state = dict(model.state_dict())
    for kind, network in (others or {}).items():
        assert kind in OTHERS
        # No parameter of a generator has a slash in its name, so loaders tell networks apart by it.
        state |= {f"{kind}/{name}": tensor for name, tensor in network.state_dict().items()}
    weights = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    info["sha256"] = weights_digest(weights)
    # `save_file` of safetensors would make a file that nobody else may read.
    write_bytes(path, save(weights, metadata={_METADATA_KEY: json.dumps(info)}))
    return info


def save_generator(
    path: Path, generator: SampleableGenerator, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a loaded generator again, alone, as `save_snapshot` does."""
    return save_snapshot(
        path,
        generator.model,
        spec=generator.info["model"],
        nimg=generator.info["nimg"],
        classes=generator.info.get("classes", ()),
        class_counts=generator.info.get("class_counts", ()),
        values=generator.values,
        about=about,
    )


def describe(
    spec: dict[str, Any],
    *,
    nimg: int,
    classes: Sequence[str],
    class_counts: Sequence[int] = (),
    values: ValueRange,
    about: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The description of a generator as plain values; the arguments are those of `save_snapshot`.

    It is the `info` of a loaded generator, and goes into every file that one is exported to.
    """
    info: dict[str, Any] = {"model": spec, "nimg": nimg, "version": ganscale.__version__}
    info["classes"] = list(classes)
    if class_counts:
        info["class_counts"] = list(class_counts)
    if (stored_values := values.to_json()) is not None:
        info["values"] = stored_values
    if about:
        info["about"] = dict(about)
    return info


def load_generator(path: str | Path, *, device: str = "cpu") -> SampleableGenerator:
    """Load a snapshot: a .safetensors file, or the one that `snapshot_file` finds in a folder.

    Raises `CheckpointError` when there is none or it cannot be read.
    """
    with _opened(path) as (info, weights):
        model = build_generator(info["model"])
        model.load_state_dict({name: t for name, t in weights.items() if "/" not in name})
        values = ValueRange.parse(info.get("values"))
    # Outside the block, whose errors are reported as those of the snapshot: a failure to move to
    # the device is not one.
    return SampleableGenerator(model.to(device), spec=info["model"], info=info, values=values)


def load_encoder(path: str | Path, *, device: str = "cpu") -> nn.Module | None:
    """The encoder of a snapshot, in evaluation mode; None if it has none.

    It takes images (N, C, H, W) in [-1, 1] and returns mean and log-variance of their latents, each
    (N, z_dim). Raises `CheckpointError` when there is no snapshot or it cannot be read.
    """
    with _opened(path) as (info, weights):
        state = _of("encoder", weights)
        if not state:
            return None
        model = build_encoder(info["model"])
        model.load_state_dict(state)
    return model.to(device).eval().requires_grad_(False)


def load_classifier(path: str | Path, *, device: str = "cpu") -> ClassifyingDiscriminator | None:
    """The classifier of a snapshot, in evaluation mode; None if it has none.

    With `classes=True` it takes images (N, C, H, W) in [-1, 1] to logits (N, classes). Raises
    `CheckpointError` when there is no snapshot or it cannot be read.
    """
    with _opened(path) as (info, weights):
        state = _of("classifier", weights)
        if not state:
            return None
        # The generator of a semi-supervised run is unconditional, so the description of its model
        # says 0 classes; the head's weights say how many there are.
        model = build_classifier(info["model"] | {"num_classes": len(state["head.weight"])})
        model.load_state_dict(state)
    return model.to(device).eval().requires_grad_(False)


def snapshot_classes(path: str | Path) -> tuple[str, ...]:
    """Names of the classes, by label, of the set that a snapshot was trained on.

    Raises `CheckpointError` when there is no snapshot, or it has no names.
    """
    with _opened(path) as (info, _):
        return tuple(info["classes"])


def _of(kind: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{kind}/"
    return {k.removeprefix(prefix): t for k, t in weights.items() if k.startswith(prefix)}


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Yield description and weights of a snapshot; errors in the block are `CheckpointError`s."""
    file = snapshot_file(Path(path).expanduser())
    try:
        with safe_open(file, framework="pt") as stored:
            info = json.loads((stored.metadata() or {})[_METADATA_KEY])
            weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        # safetensors checks its header alone: a flipped bit in the weights would load and give poor
        # images.
        if info.get("sha256", expected := weights_digest(weights)) != expected:
            raise ValueError("its weights do not have the sha256 that they were written with")
        yield info, weights
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file} is not a readable snapshot: {reason}") from None


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The sha256 of names, types, shapes and bytes of tensors, independent of their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def snapshot_file(path: Path) -> Path:
    """The snapshot that a path means: the file itself, or the newest of a run's folder.

    The folder of one of the run's averages, such as RUN/snapshots/ema-100, means that average's
    newest; one of `Generator.save_pretrained` means its only one. Raises `CheckpointError` when
    there is none.
    """
    if path.is_file():
        return path
    # Names contain the position with leading zeros, so the last name is the newest.
    snapshots = sorted(RunDirectory(path).snapshots.glob("*.safetensors"))
    if not snapshots and path.parent.name == RunDirectory(path).snapshots.name:
        snapshots = sorted(path.glob("*.safetensors"))
    if not snapshots and (path / FOLDER_FILE).is_file():
        snapshots = [path / FOLDER_FILE]
    if not snapshots:
        raise CheckpointError(
            f"no snapshot at {path}: expected a .safetensors file, the folder of a run that has "
            "written one, or a folder of save_pretrained"
        )
    return snapshots[-1]
