"""A generator as a graph that runs without this package: by torch.export, or as ONNX.

A graph takes latents and, where there are classes, labels, of any number of images, and returns
what the network makes of them. It is computed by other code than the network, so it is run at once
and compared with it; a graph whose images differ is not kept.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ganscale.atomic_files import write_bytes
from ganscale.errors import ConfigError, DataError
from ganscale.generation.export import ImageDifference
from ganscale.generation.latents import seeded_labels, seeded_latents
from ganscale.generation.sampler import SampleableGenerator
from ganscale.generation.snapshot import describe

TORCH_EXPORT_TOLERANCE = 1e-6
"""Largest difference that is allowed, as a part of the range of values. The graph consists of the
operations that the network calls, so there should be none."""
ONNX_TOLERANCE = 1e-4
"""For ONNX, whose operations are computed by other kernels."""

_BATCH_SIZES = (1, 3, 16)
_DESCRIPTION = "ganscale"


class _Graph(nn.Module):
    """The network with inputs by name: z (N, z_dim), and labels (N,) where there are classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        images: Tensor = self.model(z, labels)
        return images


def export_program(
    generator: SampleableGenerator, path: Path, *, about: Mapping[str, Any]
) -> ImageDifference:
    """Write a generator with torch.export, and compare its images.

    Args:
        generator: on the CPU.
        path: the .pt2 file, for `torch.export.load`. The program takes z (N, z_dim), fp32, and with
            classes labels (N,), int64, to images (N, C, H, W), fp32, in which -1 and 1 are the
            lowest and the highest value. Its extra file `ganscale` has the description as JSON.
        about: what people should know of it, as plain values.

    Returns:
        How far its images are from those of the network, for batches of 1, 3 and 16.

    Raises:
        DataError: a value differs by more than `TORCH_EXPORT_TOLERANCE` of the range of values;
            then `path` is left as it was.
    """
    program = _program(generator)
    file = io.BytesIO()
    extra = {_DESCRIPTION: _description(generator, about)}
    torch.export.save(program, file, extra_files=extra)
    file.seek(0)
    loaded = torch.export.load(file).module()
    difference = _checked(generator, lambda inputs: loaded(**inputs), TORCH_EXPORT_TOLERANCE)
    write_bytes(path, file.getvalue())
    return difference


def export_onnx(
    generator: SampleableGenerator, path: Path, *, about: Mapping[str, Any]
) -> ImageDifference:
    """Write a generator as ONNX, run it with ONNX Runtime on the CPU, and compare its images.

    Args:
        generator: on the CPU.
        path: the .onnx file. Inputs and output are those of `export_program`, by the names `z`,
            `labels` and `images`; the model's metadata have the description under `ganscale`.
        about: what people should know of it, as plain values.

    Returns:
        How far its images are from those of the network, for batches of 1, 3 and 16.

    Raises:
        ConfigError: onnx, onnxscript or onnxruntime is not installed.
        DataError: a value differs by more than `ONNX_TOLERANCE` of the range of values; then
            `path` is left as it was.
    """
    try:
        import onnx  # noqa: F401 - the exporter needs it and would fail later and less clearly
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ONNX needs {error.name}: pip install 'ganscale[onnx]'") from None
    with warnings.catch_warnings():
        # Of the exporter about itself, such as operators that torchvision registers.
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            _program(generator), output_names=["images"], dynamo=True, verbose=False
        )
    assert exported is not None
    exported.model.metadata_props[_DESCRIPTION] = _description(generator, about)
    content = exported.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        (images,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(images)

    difference = _checked(generator, run, ONNX_TOLERANCE)
    write_bytes(path, content)
    return difference


def graph_usage(generator: SampleableGenerator, path: Path) -> str:
    """Lines of Python that draw images with an exported graph, for its card."""
    arguments = {"z": f"randn(16, {generator.z_dim})"}
    if generator.num_classes:
        arguments["labels"] = f"randint({generator.num_classes}, (16,))"
    if path.suffix == ".onnx":
        inputs = ", ".join(f'"{name}": torch.{v}.numpy()' for name, v in arguments.items())
        return (
            "import onnxruntime\nimport torch\n\n"
            f'session = onnxruntime.InferenceSession("{path.name}")\n'
            f"(images,) = session.run(None, {{{inputs}}})"
        )
    inputs = ", ".join(f"{name}=torch.{value}" for name, value in arguments.items())
    return (
        "import torch\n\n"
        f'generator = torch.export.load("{path.name}").module()\n'
        f"images = generator({inputs})"
    )


def _program(generator: SampleableGenerator) -> torch.export.ExportedProgram:
    """The graph of the network for any number of images."""
    inputs = _inputs(generator, _BATCH_SIZES[-1])
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        return torch.export.export(
            _Graph(generator.model).eval(),
            (),
            kwargs=inputs,
            dynamic_shapes={name: {0: batch} for name in inputs},
        )


def _inputs(generator: SampleableGenerator, num_images: int) -> dict[str, Tensor]:
    seeds = list(range(num_images))
    inputs = {"z": seeded_latents(seeds, generator.z_dim)}
    if generator.num_classes:
        inputs["labels"] = seeded_labels(seeds, generator.num_classes)
    return inputs


def _description(generator: SampleableGenerator, about: Mapping[str, Any]) -> str:
    return json.dumps(
        describe(
            generator.info["model"],
            nimg=generator.info["nimg"],
            classes=generator.info.get("classes", ()),
            values=generator.values,
            about=about,
        )
    )


@torch.no_grad()
def _checked(
    generator: SampleableGenerator,
    run: Callable[[Mapping[str, Tensor]], Tensor],
    tolerance: float,
) -> ImageDifference:
    """The difference of the graph's images from the network's; `DataError` if it is too large."""
    differences = []
    # Several batches: a graph in which the number of images became a constant would fail here.
    for num_images in _BATCH_SIZES:
        inputs = _inputs(generator, num_images)
        expected = generator.model(inputs["z"], inputs.get("labels"))
        # The range is 2 wide.
        differences.append((run(inputs).double() - expected.double()).abs().flatten() / 2)
    values = torch.cat(differences)
    difference = ImageDifference(
        sum(_BATCH_SIZES), 255 * float(values.max()), 255 * float(values.mean())
    )
    # Negated, so that a value that is not a number is refused as well.
    if not difference.largest <= 255 * tolerance:
        raise DataError(
            f"the exported graph makes other images than the network: {difference}, and at most "
            f"{255 * tolerance:g} is allowed"
        )
    return difference
