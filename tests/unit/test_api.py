"""The names of the package: generators, evaluations and runs as a program holds them."""

from __future__ import annotations

import base64
import inspect
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import ganscale
from ganscale.config import Config, load_config
from ganscale.data.values import ValueRange
from ganscale.errors import CheckpointError, ConfigError, DataError
from ganscale.evaluation.evaluate import choose_metrics
from ganscale.evaluation.image_sets import open_images
from ganscale.evaluation.memory_images import MemoryImages
from ganscale.generation.latent_sampler import LatentSampler
from ganscale.generation.latents import seeded_labels
from ganscale.generation.snapshot import save_snapshot
from ganscale.json_lines import read_lines
from ganscale.models import build_generator
from ganscale.run_directory import RunDirectory
from ganscale.training.callbacks import Callback
from tests.conftest import Verb
from tests.support.run_folders import begin, checkpoint, end, row, write_run
from tests.support.small_extractor import SmallExtractor
from tests.support.small_models import SMALL_MODELS

CLASSES = [f"kind {number}" for number in range(10)]
EVALUATED = {
    "extractor": "inception-v3",
    "extractor_digest": "abc",
    "samples": "50000 samples",
    "num_samples": 50000,
    "reference": "somewhere",
    "num_reference": 50000,
    "reference_statistics": "extracted",
}


def spec_of(name: str, **changes: Any) -> dict[str, Any]:
    model = {**SMALL_MODELS[name], **changes}
    return Config().with_changes({"model": model}).model.model_dump()


def snapshot_of(path: Path, name: str = "sngan-classes", *, seed: int = 0, **changes: Any) -> Path:
    """A snapshot of random weights in which classes differ."""
    torch.manual_seed(seed)
    spec = spec_of(name)
    model = build_generator(spec)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    classes = CLASSES if spec["num_classes"] else ()
    save_snapshot(path, model, spec=spec, nimg=640, classes=classes, **changes)
    return path


@pytest.fixture
def generator(tmp_path: Path) -> ganscale.Generator:
    return ganscale.Generator.from_pretrained(snapshot_of(tmp_path / "a.safetensors"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of 20 steps whose second attempt began at step 10, with snapshots and samples."""
    rows = [row(step) for step in range(1, 13)] + [row(step, attempt=2) for step in range(11, 21)]
    rows[3]["train/loss_G"] = None  # as a value that was not finite is written
    rows[-1]["metrics/fid"] = 41.5
    events = [begin(), checkpoint(10), begin(2, step=10, seconds=30, reason="resume")]
    events += [
        {"time": 1.0, "event": "evaluation", "attempt": 2, "nimg": 64 * 20, "skipped": {}},
        end(20, attempt=2),
    ]
    root = tmp_path / "runs" / "mine"
    write_run(root, rows, events, samples=(5, 20))
    run_dir = RunDirectory(root)
    for number, path in enumerate(
        (run_dir.snapshot(640), run_dir.snapshot(1280), run_dir.snapshot(640, "best"))
    ):
        spec = spec_of("dcgan")
        torch.manual_seed(number)
        nimg = int(path.stem.removeprefix("nimg-"))
        save_snapshot(path, build_generator(spec), spec=spec, nimg=nimg)
    return root


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True
    )
    return done.stdout


# The package


def test_the_names_are_there_and_are_loaded_when_they_are_used() -> None:
    code = (
        "import ganscale, sys\n"
        "heavy = {'torch', 'ray', 'pandas', 'huggingface_hub', 'onnx'}\n"
        "assert not heavy & set(sys.modules)\n"
        "assert set(ganscale.__all__) <= set(dir(ganscale))\n"
        "ganscale.Run, ganscale.Callback, ganscale.Config, ganscale.train\n"
        "assert not {'ray', 'pandas'} & set(sys.modules)\n"
        "for name in ganscale.__all__: getattr(ganscale, name)\n"
        "assert 'ray' not in sys.modules\n"
        "assert 'huggingface_hub' not in sys.modules\n"
    )
    run_python(code)


def test_a_run_needs_neither_torch_nor_ray(run_folder: Path) -> None:
    code = (
        "import ganscale, sys\n"
        f"run = ganscale.Run({str(run_folder)!r})\n"
        "print(run)\n"
        "len(run.metrics), len(run.events), run.samples, run.snapshots, run.config, run.report()\n"
        "assert not {'torch', 'ray'} & set(sys.modules)\n"
    )
    assert run_python(code).startswith("Run mine: finished at 1.28 kimg of ")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Discriminator'"):
        ganscale.Discriminator  # type: ignore[attr-defined]  # noqa: B018


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(ganscale.__file__).parent / "py.typed").is_file()


def test_callbacks_are_public() -> None:
    assert ganscale.Callback is Callback


@pytest.mark.parametrize("name", [n for n in ganscale.__all__ if not n.startswith("_")])
def test_every_public_name_and_its_members_say_what_they_are(name: str) -> None:
    value = getattr(ganscale, name)
    assert inspect.getdoc(value)
    for member, function in vars(value).items() if inspect.isclass(value) else ():
        if not member.startswith("_") and callable(getattr(value, member)):
            assert inspect.getdoc(function), f"{name}.{member}"


# Generators


@pytest.mark.parametrize("name", SMALL_MODELS)
@pytest.mark.parametrize("truncation", [None, 0.7])
def test_images_have_the_bits_of_the_command(
    verb: Verb, tmp_path: Path, name: str, truncation: float | None
) -> None:
    path = snapshot_of(tmp_path / "a.safetensors", name)
    out = tmp_path / "images.npy"
    options = [] if truncation is None else ["--truncation-psi", truncation]
    code, _, err = verb("sample", path, "--num", 5, "--seed", 4711, "--out", out, *options)
    assert code == 0, err
    expected = np.load(out)  # (N, C, H, W)
    generator = ganscale.Generator.from_pretrained(path)
    images = generator(5, seed=4711, truncation=truncation, output_type="np")
    assert images.dtype == np.uint8
    assert np.array_equal(images, expected.transpose(0, 2, 3, 1))
    assert len(np.unique(images)) > 5
    alone = generator(1, seed=4713, truncation=truncation, output_type="np")
    assert np.array_equal(alone[0], images[2])


def test_the_forms_of_images_agree(generator: ganscale.Generator) -> None:
    pictures = generator(3, seed=5)
    array = generator(3, seed=5, output_type="np")
    tensor = generator(3, seed=5, output_type="pt")
    assert array.shape == (3, 16, 16, 3)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (3, 3, 16, 16))
    assert 0 <= tensor.min() < 0.5 < tensor.max() <= 1
    assert torch.equal((tensor * 255).round().byte().movedim(1, -1), torch.from_numpy(array))
    assert [picture.size for picture in pictures] == [(16, 16)] * 3
    assert all(np.array_equal(np.array(p), a) for p, a in zip(pictures, array, strict=True))


def test_classes_are_chosen_by_number_and_by_name(generator: ganscale.Generator) -> None:
    labels = seeded_labels([0, 1, 2], 10).tolist()
    by_seed = generator(3, output_type="np")
    for chosen in (labels, [CLASSES[label] for label in labels]):
        assert np.array_equal(generator(3, class_labels=chosen, output_type="np"), by_seed)
    third = generator(3, class_labels="kind 3", output_type="np")
    for label in (3, np.int64(3), np.array([3, 3, 3])):
        assert np.array_equal(third, generator(3, class_labels=label, output_type="np"))
    assert not np.array_equal(third, generator(3, class_labels=4, output_type="np"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_images": 0}, "expected at least 1"),
        ({"output_type": "jpg"}, "expected pil, pt or np"),
        ({"class_labels": 10}, "takes 0 to 9"),
        ({"class_labels": "cat"}, "class 'cat': this generator has kind 0, kind 1"),
        ({"class_labels": [1, 2]}, "2 labels for 16 images"),
        ({"class_labels": [1.9] * 16}, "class 1.9: expected a whole number or a name"),
        ({"truncation": 0.0}, "expected at least 0.05"),
    ],
)
def test_wrong_calls_say_what_was_expected(
    generator: ganscale.Generator, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        generator(**options)


def test_arrays_keep_their_units_and_become_pictures_in_colours(tmp_path: Path) -> None:
    spec = spec_of("dcgan", img_channels=1)
    torch.manual_seed(0)
    decibels = ValueRange("float32", -80.0, 0.0)
    path = tmp_path / "a.safetensors"
    save_snapshot(path, build_generator(spec), spec=spec, nimg=1, values=decibels)
    generator = ganscale.Generator.from_pretrained(path)
    array = generator(2, output_type="np")
    assert array.dtype == np.float32
    assert array.shape == (2, 16, 16, 1)
    assert -80 <= array.min() < array.max() <= 0
    tensor = generator(2, output_type="pt")
    assert np.array_equal(tensor.movedim(1, -1).numpy(), array)
    assert generator(2)[0].mode == "RGB"


def test_a_saved_generator_draws_the_same_bits(
    generator: ganscale.Generator, tmp_path: Path, verb: Verb
) -> None:
    folder = generator.save_pretrained(tmp_path / "given", licence="CC0-1.0")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    loaded = ganscale.Generator.from_pretrained(folder)
    weights, stored = generator.model.state_dict(), loaded.model.state_dict()
    assert weights.keys() == stored.keys()
    assert all(torch.equal(stored[key], tensor) for key, tensor in weights.items())
    images = generator(4, seed=3, output_type="np")
    assert np.array_equal(loaded(4, seed=3, output_type="np"), images)
    assert (loaded.classes, loaded.nimg) == (tuple(CLASSES), 640)
    config = json.loads((folder / "config.json").read_text())
    assert config == loaded.info
    # The folder is a snapshot for the command as well.
    out = tmp_path / "images.npy"
    code, _, err = verb("sample", folder, "--num", 4, "--seed", 3, "--out", out)
    assert code == 0, err
    assert np.array_equal(np.load(out).transpose(0, 2, 3, 1), images)
    again = loaded.save_pretrained(tmp_path / "again")
    assert ganscale.Generator.from_pretrained(again).info["about"]["licence"] == "CC0-1.0"


def test_a_folder_needs_no_hub(
    generator: ganscale.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    folder = generator.save_pretrained(tmp_path / "given")
    assert ganscale.Generator.from_pretrained(folder).nimg == 640
    monkeypatch.chdir(tmp_path)
    for use in (generator.push_to_hub, ganscale.Generator.from_pretrained):
        with pytest.raises(ConfigError, match=r"pip install 'ganscale\[hub\]'"):
            use("me/mine")


def test_the_card_has_what_the_run_recorded(run_folder: Path, tmp_path: Path) -> None:
    newest = ganscale.Run(run_folder).generator()
    folder = newest.save_pretrained(tmp_path / "given", licence="CC0-1.0")
    card = (folder / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "ganscale",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["gan", "dcgan"],
        "license": "cc0-1.0",
    }
    for words in (
        "# given",
        "| trained on | 1,280 real images |",
        "| metrics | fid 41.5 |",
        "| protocol | measured during training |",
        f'Generator.from_pretrained("{folder}")',
        "name: dcgan",
    ):
        assert words in body
    # The figures are of the newest position; the best snapshot is of an earlier one.
    assert ganscale.Run(run_folder).generator("best").evaluation == {}


def test_a_later_evaluation_goes_first(run_folder: Path) -> None:
    file = RunDirectory(run_folder).events
    event = {
        "time": 2.0,
        "event": "evaluation",
        "attempt": 2,
        "nimg": 1280,
        "protocol": EVALUATED,
        "metrics": {"fid": {"value": 38.25, "low": 38, "high": 39}},
    }
    file.write_text(file.read_text() + json.dumps(event) + "\n")
    evaluation = ganscale.Run(run_folder).generator().evaluation
    assert evaluation["metrics"] == {"fid": 38.25}
    assert evaluation["protocol"]["num_samples"] == 50000


def test_a_config_of_something_else_is_none_of_a_run(
    generator: ganscale.Generator, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    generator.save_pretrained(project / "models")
    (project / "config.yaml").write_text("database: postgres\n")
    loaded = ganscale.Generator.from_pretrained(project / "models")
    for target in (project / "given", project):
        folder = loaded.save_pretrained(target)
        assert "trained on | 640 real images" in (folder / "README.md").read_text()


def test_weights_are_not_written_without_their_card(run_folder: Path, tmp_path: Path) -> None:
    loaded = ganscale.Run(run_folder).generator()
    RunDirectory(run_folder).config.write_text("database: postgres\n")
    with pytest.raises(ConfigError, match="unknown field 'database'"):
        loaded.save_pretrained(tmp_path / "given")
    assert not (tmp_path / "given").exists()


def test_a_generator_is_not_saved_over_a_run(run_folder: Path) -> None:
    with pytest.raises(ConfigError, match="is the folder of a run"):
        ganscale.Run(run_folder).generator().save_pretrained(run_folder)


def test_its_short_form_says_what_it_is(generator: ganscale.Generator, run_folder: Path) -> None:
    millions = generator.num_parameters / 1e6
    assert repr(generator) == (
        f"Generator(sngan, {millions:.2f} million parameters, 3x16x16, 10 classes "
        f"({' '.join(CLASSES)}), trained on 0.64 kimg)"
    )
    shown = repr(ganscale.Run(run_folder).generator())
    assert re.fullmatch(
        r"Generator\(dcgan, 0\.\d\d million parameters, 3x16x16, trained on 1.28 kimg, fid 41.5\)",
        shown,
    )


def picture_in(shown: str) -> Image.Image:
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', shown)
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_notebooks_show_a_grid(generator: ganscale.Generator) -> None:
    images = generator(6)
    grid = Image.open(io.BytesIO(images._repr_png_() or b""))
    # Two columns and three rows of 16 pixels, with a line of one around each.
    assert grid.size == (2 * 17 + 1, 3 * 17 + 1)
    for number, image in enumerate(images):
        left, top = 1 + number % 2 * 17, 1 + number // 2 * 17
        part = grid.crop((left, top, left + 16, top + 16))
        assert np.array_equal(np.array(part), np.array(image))
    assert images.grid(columns=6).size == (6 * 17 + 1, 18)
    assert type(images)()._repr_png_() is None
    shown = generator._repr_html_()
    assert repr(generator) in shown.replace("&#x27;", "'")
    whole = picture_in(shown)
    assert np.array_equal(np.array(whole), np.array(generator(16).grid(columns=8)))


def test_another_device_clears_what_was_computed_on_the_first(tmp_path: Path) -> None:
    generator = ganscale.Generator.from_pretrained(
        snapshot_of(tmp_path / "a.safetensors", "stylegan2")
    )
    first = generator(2, truncation=0.5, output_type="np")
    assert generator.to("cpu") is generator
    assert np.array_equal(generator(2, truncation=0.5, output_type="np"), first)
    direct = LatentSampler(generator, truncation_psi=0.5).sample_seeds([0, 1])
    assert np.array_equal(direct.movedim(1, -1).numpy(), first)


# The hub


def test_a_generator_is_uploaded_as_it_would_be_saved(
    generator: ganscale.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's interface with its real signatures, and a folder in place of the network."""
    uploaded: dict[str, bytes] = {}

    def upload_folder(**options: Any) -> None:
        folder = Path(options["folder_path"])
        uploaded.update({path.name: path.read_bytes() for path in folder.iterdir()})

    kind = create_autospec(huggingface_hub.HfApi)
    kind.return_value.create_repo.return_value = "https://example.org/me/mine"
    kind.return_value.upload_folder.side_effect = upload_folder
    monkeypatch.setattr(huggingface_hub, "HfApi", kind)
    address = generator.push_to_hub("me/mine", private=True, licence="MIT", token="secret")
    assert address == "https://example.org/me/mine"
    kind.return_value.create_repo.assert_called_once_with("me/mine", private=True, exist_ok=True)
    assert kind.call_args.kwargs["token"] == "secret"
    assert sorted(uploaded) == ["README.md", "config.json", "model.safetensors"]
    card = uploaded["README.md"].decode()
    assert "license: mit" in card
    assert "# mine\n" in card
    assert 'Generator.from_pretrained("me/mine")' in card
    assert b"secret" not in b"".join(uploaded.values())


def test_a_generator_of_the_hub_is_loaded(
    generator: ganscale.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = generator.save_pretrained(tmp_path / "cache")
    download = create_autospec(huggingface_hub.snapshot_download, return_value=str(folder))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    loaded = ganscale.Generator.from_pretrained("me/mine", revision="v1")
    assert np.array_equal(loaded(2, output_type="np"), generator(2, output_type="np"))
    assert download.call_args.args == ("me/mine",)
    assert download.call_args.kwargs["revision"] == "v1"
    # What is here goes first.
    (tmp_path / "me").mkdir()
    generator.save_pretrained(tmp_path / "me" / "mine")
    ganscale.Generator.from_pretrained("me/mine")
    assert download.call_count == 1


def test_what_the_hub_refuses_is_one_line(
    generator: ganscale.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = huggingface_hub.errors.LocalEntryNotFoundError("no network\nand no cache")
    download = create_autospec(huggingface_hub.snapshot_download, side_effect=error)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="neither a path nor a model .* no network and no"):
        ganscale.Generator.from_pretrained("me/mine")
    with pytest.raises(CheckpointError, match="no snapshot at absent"):
        ganscale.Generator.from_pretrained("absent")
    kind = create_autospec(huggingface_hub.HfApi)
    kind.return_value.create_repo.side_effect = error
    monkeypatch.setattr(huggingface_hub, "HfApi", kind)
    with pytest.raises(ConfigError, match="me/mine cannot be uploaded: no network and no cache"):
        generator.push_to_hub("me/mine")
    with pytest.raises(ConfigError, match="expected OWNER/NAME"):
        generator.push_to_hub("mine")


# Evaluations


@pytest.fixture
def image_folders(tmp_path: Path) -> tuple[Path, Path]:
    random = np.random.default_rng(0)
    folders = tmp_path / "samples", tmp_path / "reference"
    for folder in folders:
        folder.mkdir()
        for number in range(40):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folders


def test_an_evaluation_is_that_of_the_command(
    verb: Verb, image_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    samples, reference = image_folders
    file = tmp_path / "figures.json"
    options = ("--metrics", "prdc,c2st_1nn", "--json", file)
    code, out, err = verb("evaluate", "--images", samples, "--reference", reference, *options)
    assert code == 0, err
    found = ganscale.evaluate(samples, reference, metrics=["prdc", "c2st_1nn"], device="cpu")
    expected = json.loads(file.read_text())
    shown = found.to_json()
    assert shown["metrics"] == expected["metrics"]
    assert shown["protocol"] == expected["protocol"]
    assert repr(found).splitlines()[:-1] == out.splitlines()[:-1]  # the last one is the time
    value = found.metrics["precision_efficientnet_lite0"]
    assert value.low is not None
    assert value.high is not None
    assert value.low <= value.value <= value.high


def test_images_in_memory_are_those_of_a_folder(image_folders: tuple[Path, Path]) -> None:
    samples, reference = image_folders
    extractor = SmallExtractor()

    def fid(images: Any) -> float:
        found = ganscale.evaluate(images, reference, metrics=["fid"], extractor=extractor)
        return found.metrics["fd_small"].value

    expected = fid(samples)
    assert math.isfinite(expected)
    pictures = [Image.open(path) for path in sorted(samples.glob("*.png"))]
    array = np.stack([np.array(picture) for picture in pictures])
    tensor = torch.from_numpy(array).movedim(-1, 1)
    for images in (pictures, array, tensor, tensor.float() / 255):
        assert fid(images) == expected
    of_folder = open_images(str(samples), scratch=samples)
    assert torch.equal(MemoryImages.of(array).pixels, of_folder.read(np.arange(40)))


def test_a_generator_is_evaluated_by_its_images(
    tmp_path: Path, image_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GANSCALE_CACHE", str(tmp_path / "cache"))
    _, reference = image_folders
    path = snapshot_of(tmp_path / "a.safetensors")
    generator = ganscale.Generator.from_pretrained(path)
    images = generator(30, seed=7, output_type="pt")
    options: dict[str, Any] = {"metrics": ["fid"], "extractor": SmallExtractor(), "num": 30}
    of_images = ganscale.evaluate(images, reference, **options)
    for what in (generator, path, str(path)):
        found = ganscale.evaluate(what, reference, seed=7, **options)
        assert found.metrics == of_images.metrics
        assert found.protocol.samples == f"30 samples of {path}, seeds from 7, labels uniform"
    folder = generator.save_pretrained(tmp_path / "given", evaluation=found)
    value = found.metrics["fd_small"].value
    assert f"| metrics | fd_small {value:.4g} |" in (folder / "README.md").read_text()
    assert f"fd_small {value:.4g})" in repr(ganscale.Generator.from_pretrained(folder))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 3, 4, 4) - 1, "from -1 to -1: expected uint8, or floats from 0 to 1"),
        (torch.zeros(3, 4, 4), "expected (N, C, H, W)"),
        (np.zeros((2, 4, 4, 3)), "an array of float64 (2, 4, 4, 3): expected uint8"),
        (np.zeros((2, 3, 8, 8), dtype=np.uint8), "expected uint8 (N, H, W, C)"),
        ([Image.new("L", (4, 4)), Image.new("RGB", (4, 4))], "several sizes or modes"),
        ([Image.new("P", (4, 4))], "a Pillow image in mode P: expected L, RGB, RGBA"),
        ([Image.new("YCbCr", (4, 4))], "a Pillow image in mode YCbCr"),
        ([Image.new("CMYK", (4, 4))], "a Pillow image in mode CMYK"),
        ([np.zeros((4, 4, 3), dtype=np.uint8)], "a list of ndarray: expected Pillow images, or"),
        ([], "at least one image"),
    ],
)
def test_images_in_memory_of_another_form_are_refused(images: Any, words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)):
        MemoryImages.of(images)


def test_equal_images_have_one_digest_and_others_another() -> None:
    zeros: Tensor = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    first = MemoryImages.of(zeros)
    assert first.digest == MemoryImages.of(zeros.clone()).digest
    assert first.digest != MemoryImages.of(zeros.reshape(2, 3, 2, 8)).digest
    assert first.digest != MemoryImages.of(zeros + 1).digest


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["fad"], "expected some of fid, "),
        ([], "expected some of fid, "),
        ("fid", "expected some of fid, "),
        (["frechet"], "is now called fid"),
    ],
)
def test_unknown_metrics_are_refused(names: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_metrics(names)


def test_an_evaluation_without_a_reference_or_in_several_processes_is_refused(
    generator: ganscale.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="give --reference"):
        ganscale.evaluate(generator)
    with pytest.raises(ConfigError, match="give a reference"):
        ganscale.evaluate(generator(2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun -m ganscale evaluate"):
        ganscale.evaluate(generator, "somewhere")


# Runs


def test_tables_are_the_lines_of_the_files(run_folder: Path) -> None:
    run = ganscale.Run(run_folder)
    run_dir = RunDirectory(run_folder)
    lines = read_lines(run_dir.metrics)
    # The second attempt began at step 10, so it has replaced steps 11 and 12 of the first.
    kept = [line for line in lines if line["attempt"] == 2 or line["step"] <= 10]
    assert len(kept) == 20
    metrics = run.metrics
    assert list(metrics.columns) == list(dict.fromkeys(name for line in kept for name in line))
    assert metrics["train/loss_G"].dtype == np.float64
    for position, line in enumerate(kept):
        for name in metrics.columns:
            stored, expected = metrics[name].iloc[position], line.get(name)
            assert stored == expected if expected is not None else math.isnan(stored)
    events = run.events
    assert list(events["event"]) == ["start", "checkpoint", "resume", "evaluation", "end"]
    assert list(events["time"]) == [line["time"] for line in read_lines(run_dir.events)]


def test_sample_grids_are_in_the_order_of_their_positions(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path)
    run_dir.config.write_text(Config().to_yaml())
    paths = [run_dir.sample_grid(nimg) for nimg in (99_950_000, 100_000_000, 250_000_000)]
    paths[0].parent.mkdir()
    for path in [
        *paths,
        paths[0].with_name(".kimg-00001.000.png"),
        paths[0].with_name("kimg-.png"),
    ]:
        path.write_bytes(b"")
    assert ganscale.Run(tmp_path).samples == paths
    assert [*run_dir.sample_grids()] == [99_950_000, 100_000_000, 250_000_000]


def test_a_run_names_its_files(run_folder: Path) -> None:
    run = ganscale.Run(str(run_folder))
    assert (run.name, run.path) == ("mine", run_folder)
    assert run.config == load_config("quickstart")
    assert (run.nimg, run.total_nimg) == (1280, run.config.total_nimg)
    assert run.state == "finished"
    assert [path.name for path in run.samples] == ["kimg-00000.320.png", "kimg-00001.280.png"]
    assert [path.name for path in run.snapshots] == [
        "nimg-000000000640.safetensors",
        "nimg-000000001280.safetensors",
    ]
    assert run.averages == ["best"]


def test_a_run_gives_its_newest_generator_and_its_best(run_folder: Path) -> None:
    run = ganscale.Run(run_folder)
    run_dir = RunDirectory(run_folder)
    for generator, path in (
        (run.generator(), run_dir.snapshot(1280)),
        (run.generator(average="best"), run_dir.snapshot(640, "best")),
    ):
        assert generator.path == path
        expected = ganscale.Generator.from_pretrained(path)(2, output_type="np")
        assert np.array_equal(generator(2, output_type="np"), expected)
    with pytest.raises(CheckpointError, match="no average 'ema-100': it has best"):
        run.generator("ema-100")


def test_a_run_writes_its_report(run_folder: Path, tmp_path: Path) -> None:
    run = ganscale.Run(run_folder)
    assert run.report() == run_folder / "report.html"
    other = run.report(tmp_path / "page.html")
    assert other == tmp_path / "page.html"
    assert "mine" in other.read_text()


def test_the_short_form_of_a_run(run_folder: Path) -> None:
    run = ganscale.Run(run_folder)
    total = run.config.total_nimg / 1000
    assert repr(run).splitlines() == [
        f"Run mine: finished at 1.28 kimg of {total:,.6g} kimg",
        "  It has reached its length.",
        "  metrics/fid 41.5",
        "  train/loss_G 1.95",
        "  train/loss_D 1.05",
        "  time/images_per_second 640",
    ]
    shown = run._repr_html_()
    assert "Run mine: finished" in shown
    assert np.array_equal(np.array(picture_in(shown)), np.array(Image.open(run.samples[-1])))


def test_a_run_is_followed_while_it_trains(run_folder: Path) -> None:
    run = ganscale.Run(run_folder)
    assert run.nimg == 1280
    file = RunDirectory(run_folder).metrics
    file.write_text(file.read_text() + json.dumps(row(21, attempt=2)) + "\n")
    assert run.nimg == 64 * 21
    assert len(run.metrics) == 21


def test_a_folder_that_is_no_run_is_refused(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds runs and is none"):
        ganscale.Run(run_folder.parent)
    with pytest.raises(ConfigError, match="no such folder"):
        ganscale.Run("absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds nothing of a run"):
        ganscale.Run(tmp_path / "empty")
