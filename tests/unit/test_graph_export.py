"""Generators as graphs of torch.export and ONNX: other code, the same images, or no file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from ganscale.errors import ConfigError, DataError
from ganscale.generation import graph_export
from ganscale.generation.graph_export import (
    ONNX_TOLERANCE,
    TORCH_EXPORT_TOLERANCE,
    export_onnx,
    export_program,
    graph_usage,
)
from ganscale.generation.sampler import SampleableGenerator
from tests.support.small_models import SMALL_MODELS, small_generator

ABOUT = {"licence": "CC0-1.0"}


def slow_but(*quick: str) -> list[Any]:
    """Every model; those that are not named are slow, since tracing one takes seconds."""
    marks = pytest.mark.slow
    return [name if name in quick else pytest.param(name, marks=marks) for name in SMALL_MODELS]


def inputs_of(generator: SampleableGenerator, num_images: int) -> dict[str, Tensor]:
    """Other latents and labels than those that the export itself compares."""
    random = torch.Generator().manual_seed(1)
    inputs = {"z": torch.randn(num_images, generator.z_dim, generator=random)}
    if generator.num_classes:
        inputs["labels"] = torch.randint(generator.num_classes, (num_images,), generator=random)
    return inputs


@torch.no_grad()
def images_of(generator: SampleableGenerator, inputs: dict[str, Tensor]) -> Tensor:
    images: Tensor = generator.model(inputs["z"], inputs.get("labels"))
    return images


@pytest.mark.parametrize("name", slow_but("dcgan"))
def test_a_program_makes_the_images_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    generator, path = small_generator(name), tmp_path / "small.pt2"
    difference = export_program(generator, path, about=ABOUT)
    assert difference.largest <= 255 * TORCH_EXPORT_TOLERANCE
    extra = {"ganscale": ""}
    program = torch.export.load(path, extra_files=extra).module()
    for num_images in (2, 5):
        inputs = inputs_of(generator, num_images)
        torch.testing.assert_close(
            program(**inputs), images_of(generator, inputs), rtol=0, atol=2 * TORCH_EXPORT_TOLERANCE
        )
    check_description(json.loads(extra["ganscale"]), generator)
    monkeypatch.chdir(tmp_path)
    check_usage(generator, path)


# With classes where it knows any; ONNX is made from the program.
@pytest.mark.parametrize("name", slow_but("dcgan", "sngan-classes", "r3gan"))
def test_onnx_makes_the_images_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    generator, path = small_generator(name), tmp_path / "small.onnx"
    difference = export_onnx(generator, path, about=ABOUT)
    assert difference.largest <= 255 * ONNX_TOLERANCE
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == ["images"]
    for num_images in (2, 5):
        inputs = inputs_of(generator, num_images)
        (images,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        torch.testing.assert_close(
            torch.from_numpy(images),
            images_of(generator, inputs),
            rtol=0,
            atol=2 * ONNX_TOLERANCE,
        )
    metadata = session.get_modelmeta().custom_metadata_map
    check_description(json.loads(metadata["ganscale"]), generator)
    monkeypatch.chdir(tmp_path)
    check_usage(generator, path)


def check_description(info: dict[str, Any], generator: SampleableGenerator) -> None:
    assert info["model"] == generator.info["model"]
    assert (info["nimg"], info["about"]) == (5000, ABOUT)


def check_usage(generator: SampleableGenerator, path: Path) -> None:
    """The lines on the card draw images in the folder of the file."""
    names: dict[str, Any] = {}
    exec(graph_usage(generator, path), names)
    assert tuple(names["images"].shape) == (16, 3, 16, 16)


@pytest.mark.parametrize("export", [export_program, export_onnx])
def test_a_graph_with_other_images_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Any
) -> None:
    """The network changes between the export and the comparison, as if the graph were wrong."""
    generator, path = small_generator("dcgan"), tmp_path / "small.file"
    original = graph_export._program

    def changing(generator: SampleableGenerator) -> Any:
        program = original(generator)
        # A graph shares its weights with the network: others in their place.
        broken = small_generator("dcgan", seed=1)
        generator.model = broken.model
        return program

    monkeypatch.setattr(graph_export, "_program", changing)
    path.write_bytes(b"an earlier export")
    with pytest.raises(DataError, match="makes other images than the network"):
        export(generator, path, about={})
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"an earlier export"


def test_without_onnx_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"onnxruntime: pip install 'ganscale\[onnx\]'"):
        export_onnx(small_generator("dcgan"), tmp_path / "a.onnx", about={})
