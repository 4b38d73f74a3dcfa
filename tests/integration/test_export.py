"""`ganscale export`: the file, its images, its card, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ganscale
from ganscale.config import Config
from ganscale.errors import DataError
from ganscale.generation.export import export_generator, image_difference
from ganscale.generation.sampler import SampleableGenerator
from ganscale.generation.snapshot import save_snapshot
from ganscale.models import build_generator
from ganscale.run_directory import RunDirectory
from tests.conftest import MakeConfig, Verb
from tests.support.small_models import SMALL_MODELS, small_generator


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_every_architecture_is_exported_and_draws_the_same_to_the_eye(
    tmp_path: Path, name: str
) -> None:
    generator, path = small_generator(name), tmp_path / "small.safetensors"
    difference = export_generator(generator, path, about={"licence": "CC0-1.0"}, num_images=40)
    loaded = ganscale.Generator.from_pretrained(path)
    pixels = (generator.sample(40).int() - loaded.sample(40).int()).abs()
    assert difference.largest == pytest.approx(int(pixels.max()))
    assert difference.mean == pytest.approx(float(pixels.double().mean()))
    assert loaded.info["about"] == {"licence": "CC0-1.0"}
    stored = load_file(path)
    assert {t.dtype for t in stored.values() if t.ndim > 1} == {torch.float16}
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())
    original = generator.model.state_dict()
    for key, tensor in stored.items():
        # Half precision has 11 significant bits; vectors are not rounded at all.
        tolerance = 2.0**-11 if tensor.ndim > 1 else 0.0
        torch.testing.assert_close(
            tensor.double(), original[key].double(), rtol=tolerance, atol=2.0**-24
        )


class Scaled(nn.Module):
    """The latent as an image, times a matrix of one number."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[weight]]))

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (z * self.weight)[:, :, None, None]


def test_the_difference_is_that_of_the_values() -> None:
    spec = {"resolution": 1, "z_dim": 1, "num_classes": 0}
    dark, bright = (
        SampleableGenerator(Scaled(weight), spec=spec, info={}) for weight in (0.0, 9e9)
    )
    difference = image_difference(dark, bright, 50)
    # Every pixel is 128 in one and 0 or 255 in the other.
    assert difference.largest == 128
    assert 127 <= difference.mean <= 128


def test_a_generator_that_rounding_changes_is_refused_and_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ganscale.generation.export._MAX_DIFFERENCE", -1)
    path = tmp_path / "a.safetensors"
    generator = small_generator("dcgan")
    path.write_bytes(b"an earlier export")
    with pytest.raises(DataError, match="half precision changes this generator's images"):
        export_generator(generator, path, about={})
    assert path.read_bytes() == b"an earlier export"
    first = next(p for p in generator.model.parameters() if p.ndim > 1)
    first.data.flatten()[0] = 1e6
    with pytest.raises(DataError, match="beyond the range of half precision"):
        export_generator(generator, path, about={})
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"an earlier export"


@pytest.fixture
def run(make_config: MakeConfig) -> Config:
    """A run of a conditional SNGAN with a snapshot of random weights."""
    config = make_config(model=SMALL_MODELS["sngan-classes"])
    run_dir = RunDirectory(config.run_dir)
    run_dir.root.mkdir(parents=True)
    run_dir.config.write_text(config.to_yaml())
    torch.manual_seed(0)
    spec = config.model.model_dump()
    classes = [f"kind {n}" for n in range(10)]
    path = run_dir.snapshot(160)
    save_snapshot(path, build_generator(spec), spec=spec, nimg=160, classes=classes)
    return config


def test_the_card_says_what_the_run_measured_and_how(
    verb: Verb, run: Config, tmp_path: Path
) -> None:
    run_dir = RunDirectory(run.run_dir)
    protocol = {
        "extractor": "inception-v3",
        "extractor_digest": "abc",
        "num_samples": 50000,
        "reference": "somewhere",
        "num_reference": 50000,
        "reference_statistics": "extracted",
    }
    metrics = {"fid": {"value": 12.345678, "low": 12.0, "high": 12.6}}
    event = {"time": 1.0, "event": "evaluation", "attempt": 1, "nimg": 160}
    event |= {"protocol": protocol, "metrics": metrics}
    run_dir.events.write_text(json.dumps(event) + "\n")
    out = tmp_path / "given" / "classes.safetensors"
    code, text, err = verb("export", run.run_dir, "--out", out, "--licence", "CC0-1.0")
    assert code == 0, err
    assert f"wrote {out}" in text
    card = out.with_suffix(".md").read_text()
    for words in (
        "# classes",
        "| trained on | 160 real images |",
        "| metrics | fid 12.35 |",
        "extractor inception-v3, num_samples 50000",
        "| licence | CC0-1.0 |",
        "10: kind 0, kind 1",
        "name: sngan",
        "values differ by",
    ):
        assert words in card
    info = ganscale.Generator.from_pretrained(out).info
    assert info["about"]["metrics"] == {"fid": 12.345678}
    # Smaller by about a half: nearly all of it is matrices.
    assert out.stat().st_size < 0.65 * run_dir.snapshot(160).stat().st_size
    code, _, err = verb("sample", out, "--per-class", 1, "--out", tmp_path / "grid.png")
    assert code == 0, err


@pytest.mark.parametrize(
    ("file_format", "name", "words"),
    [
        ("torch-export", "given.pt2", 'torch.export.load("given.pt2")'),
        ("onnx", "given.onnx", 'onnxruntime.InferenceSession("given.onnx")'),
    ],
)
def test_a_graph_has_a_card_with_the_lines_that_run_it(
    verb: Verb,
    run: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file_format: str,
    name: str,
    words: str,
) -> None:
    out = tmp_path / name
    code, text, err = verb("export", run.run_dir, "--format", file_format, "--out", out)
    assert code == 0, err
    assert f"wrote {out}" in text
    assert "of 20 images the values differ by" in text
    card = (tmp_path / "given.md").read_text()
    for fact in (words, "MB in full precision; of 20 images", "| trained on | 160 real images |"):
        assert fact in card
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(lines, names)
    assert tuple(names["images"].shape) == (16, 3, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "card.md"), "expected a name that ends in .safetensors"),
        (("--out", "a.safetensors", "--format", "onnx"), "expected a name that ends in .onnx"),
    ],
)
def test_wrong_use_is_one_line(
    verb: Verb,
    run: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = verb("export", run.run_dir, *options)
    assert code == 2
    assert message in err
    assert not Path("a.safetensors").exists()
