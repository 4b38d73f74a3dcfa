"""The best of several candidates: which one is kept, by networks whose logits are known by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ganscale.checkpoint import CheckpointStore
from ganscale.checkpoint.files import saved_state
from ganscale.config import Config
from ganscale.data.values import PIXELS, ValueRange
from ganscale.errors import CheckpointError
from ganscale.evaluation.best_of import best_images
from ganscale.evaluation.gan_metrics.gan_pairs import ScoringDiscriminator
from ganscale.generation.latent_sampler import LatentSampler
from ganscale.generation.latents import seed_for, seeded_labels
from ganscale.generation.sample_plan import PlannedImage, plan_per_class, plan_samples
from ganscale.generation.sampler import SampleableGenerator
from ganscale.generation.snapshot import load_generator, save_snapshot
from ganscale.models import build_discriminator, build_generator
from ganscale.run_directory import RunDirectory
from tests.conftest import MakeConfig, Verb


class Paints(nn.Module):
    """An image of one brightness, which is the latent's first element, squeezed into [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 1)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        shown: Tensor = (z[:, :1] / 6).clamp(-1, 1) + 0 * self.embedding(labels)
        return shown[:, :, None, None].expand(-1, 1, 4, 4)


class Judge(nn.Module):
    """Brightness times the weight of the class, plus what it sees across the batch."""

    def __init__(self, *weights: float, across: float = 0.0) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))
        self.across = across
        self.sizes: list[int] = []

    def forward(self, images: Tensor, labels: Tensor | None) -> Tensor:
        self.sizes.append(len(images))
        brightness = images.mean((1, 2, 3))
        weights = self.weights[labels if labels is not None else torch.tensor(0)]
        # Not the same for all images, as a deviation that a convolution sees beside them is not.
        return brightness * weights + self.across * brightness.std() * brightness.square()


def sampler(num_classes: int = 0, values: ValueRange = PIXELS) -> LatentSampler:
    spec = {"resolution": 4, "z_dim": 2, "num_classes": num_classes}
    return LatentSampler(SampleableGenerator(Paints(), spec=spec, info={}, values=values))


def first_element(seed: int) -> float:
    """Of a seed's latent, drawn here once more."""
    generator = torch.Generator().manual_seed(seed_for("sample", seed))
    return float(torch.randn(2, generator=generator)[0])


def test_a_plan_gives_each_image_its_own_seeds_and_the_class_of_the_first() -> None:
    assert plan_samples(3, seed=7) == [PlannedImage((n,), None) for n in (7, 8, 9)]
    plan = plan_samples(2, seed=7, num_candidates=3, num_classes=10)
    labels = seeded_labels([7, 10], 10).tolist()
    assert plan == [PlannedImage((7, 8, 9), labels[0]), PlannedImage((10, 11, 12), labels[1])]
    assert {image.label for image in plan_samples(5, seed=0, num_classes=10, label=4)} == {4}


def test_a_plan_by_classes_has_the_same_seeds_in_each_row() -> None:
    assert plan_per_class(2, seed=5, num_candidates=2, num_classes=2) == [
        PlannedImage((5, 6), 0),
        PlannedImage((7, 8), 0),
        PlannedImage((5, 6), 1),
        PlannedImage((7, 8), 1),
    ]


@pytest.mark.parametrize(("weight", "choose"), [(1.0, max), (-1.0, min)])
def test_the_candidate_with_the_highest_logit_is_kept(weight: float, choose: object) -> None:
    plan = plan_samples(20, seed=100, num_candidates=5)
    best = best_images(sampler(), ScoringDiscriminator(Judge(weight)), plan)
    expected = [choose(image.seeds, key=first_element) for image in plan]  # type: ignore[operator]
    assert best.seeds == expected
    # It is the image that this seed has anywhere.
    assert torch.equal(best.images, sampler().sample_seeds(expected))
    brightness = torch.tensor([first_element(seed) for seed in expected]).double() / 6
    torch.testing.assert_close(
        torch.tensor(best.logits).double(), weight * brightness, rtol=0, atol=1 / 255
    )


def test_candidates_have_one_class_and_are_judged_as_that_class() -> None:
    judge = ScoringDiscriminator(Judge(1.0, -1.0, 1.0), num_classes=3)
    plan = plan_samples(12, seed=0, num_candidates=4, num_classes=3)
    best = best_images(sampler(3), judge, plan)
    choose = {0: max, 1: min, 2: max}
    assert {image.label for image in plan} == {0, 1, 2}
    expected = [choose[image.label or 0](image.seeds, key=first_element) for image in plan]
    assert best.seeds == expected


def test_what_is_kept_does_not_depend_on_the_rest_of_the_sheet() -> None:
    judge = Judge(1.0, across=3.0)
    plan = plan_samples(10, seed=0, num_candidates=7)
    whole = best_images(sampler(), ScoringDiscriminator(judge), plan)
    alone = [best_images(sampler(), ScoringDiscriminator(judge), [image]) for image in plan]
    assert whole.seeds == [best.seeds[0] for best in alone]
    assert whole.logits == [best.logits[0] for best in alone]
    assert set(judge.sizes) == {7}


def test_many_candidates_are_judged_in_forwards_of_one_size() -> None:
    judge = Judge(1.0)
    (image,) = plan_samples(1, seed=0, num_candidates=150)
    best = best_images(sampler(), ScoringDiscriminator(judge), [image])
    assert best.seeds == [max(image.seeds, key=first_element)]
    assert judge.sizes == [64, 64, 64]


def test_of_equal_logits_the_first_seed_is_kept() -> None:
    plan = plan_samples(3, seed=0, num_candidates=4)
    assert best_images(sampler(), ScoringDiscriminator(Judge(0.0)), plan).seeds == [0, 4, 8]


def test_arrays_of_floats_are_judged_in_the_range_of_the_networks() -> None:
    decibels = ValueRange("float32", -80.0, 0.0)
    judge = ScoringDiscriminator(Judge(1.0), values=decibels)
    plan = plan_samples(4, seed=0, num_candidates=6)
    best = best_images(sampler(values=decibels), judge, plan)
    assert best.seeds == [max(image.seeds, key=first_element) for image in plan]
    expected = [first_element(seed) / 6 for seed in best.seeds]
    torch.testing.assert_close(torch.tensor(best.logits), torch.tensor(expected))


def test_logits_that_are_not_finite_are_refused() -> None:
    judge = ScoringDiscriminator(Judge(float("nan")))
    with pytest.raises(CheckpointError, match="not finite"):
        best_images(sampler(), judge, plan_samples(2, seed=0, num_candidates=2))


CLASSES = ("ant", "bee", "cow")
MODEL = {"name": "sngan", "resolution": 16, "z_dim": 8, "base_channels": 4, "num_classes": 3}


@pytest.fixture
def run(make_config: MakeConfig) -> Config:
    """A run of a conditional SNGAN with a checkpoint and a snapshot, both of random weights."""
    config = make_config(model=MODEL)
    run_dir = RunDirectory(config.run_dir)
    run_dir.root.mkdir(parents=True)
    run_dir.config.write_text(config.to_yaml())
    torch.manual_seed(0)
    spec = config.model.model_dump()
    generator, discriminator = build_generator(spec), build_discriminator(spec)
    for part in generator.modules():
        if isinstance(part, nn.Embedding):  # so that classes look different
            nn.init.normal_(part.weight)
    store = CheckpointStore(config.checkpoints)
    attempt, _ = store.claim(lambda: None)
    state = {
        "averages": {"": {"generator": generator.state_dict()}},
        "D": {"model": discriminator.state_dict()},
    }
    meta = {"config": config.model_dump(mode="json")}
    store.write(attempt, saved_state(160, state, meta))
    save_snapshot(run_dir.snapshot(160), generator, spec=spec, nimg=160, classes=CLASSES)
    return config


def described(path: Path) -> dict[str, object]:
    with Image.open(path) as picture:
        values: dict[str, object] = json.loads(picture.text["ganscale"])  # type: ignore[attr-defined]
    return values


def test_a_picture_says_how_to_draw_each_of_its_images(
    verb: Verb, run: Config, tmp_path: Path
) -> None:
    out, figures = tmp_path / "grid.png", tmp_path / "grid.json"
    options = ("--num", 4, "--seed", 3, "--best-of", 5, "--scale", 1, "--out", out)
    code, text, err = verb("sample", run.run_dir, *options, "--json", figures)
    assert code == 0, err
    assert "judged by the discriminator of tiny@0.16" in err
    values = described(out)
    assert values == json.loads(figures.read_text())
    seeds, labels = values["seeds"], values["labels"]
    assert isinstance(seeds, list)
    assert isinstance(labels, list)
    assert f"kept seeds {' '.join(map(str, seeds))}" in text
    assert [(seed - 3) // 5 for seed in seeds] == [0, 1, 2, 3]
    assert values["classes"] == [CLASSES[label] for label in labels]
    assert values["discriminator"] == "tiny@0.16"
    # By the networks themselves: of all candidates the one with the highest logit.
    generator = load_generator(run.run_dir)
    state = CheckpointStore(run.checkpoints).newest()
    assert state is not None
    judge = build_discriminator(run.model.model_dump())
    judge.load_state_dict(state.state()["D"]["model"])
    judge.eval()
    pixels = []
    for number, (seed, label) in enumerate(zip(seeds, labels, strict=True)):
        candidates = generator.sample(5, seed=3 + 5 * number, label=label)
        with torch.no_grad():
            logits = judge(candidates / 127.5 - 1, torch.full((5,), label))
        assert int(logits.argmax()) == seed - (3 + 5 * number)
        pixels.append(candidates[int(logits.argmax())])
    with Image.open(out) as picture:
        shown = np.asarray(picture)
    for number, image in enumerate(pixels):
        top, left = 1 + 17 * (number // 2), 1 + 17 * (number % 2)
        assert np.array_equal(shown[top : top + 16, left : left + 16], image.movedim(0, -1).numpy())


def test_a_grid_has_a_row_for_each_class(verb: Verb, run: Config, tmp_path: Path) -> None:
    out = tmp_path / "classes.png"
    options = ("--per-class", 2, "--seed", 9, "--scale", 1, "--out", out)
    code, text, err = verb("sample", run.run_dir, *options)
    assert code == 0, err
    assert "wrote 6 images" in text
    values = described(out)
    assert values["columns"] == 2
    assert values["seeds"] == [9, 10] * 3
    assert values["classes"] == ["ant", "ant", "bee", "bee", "cow", "cow"]
    with Image.open(out) as picture:
        shown = np.asarray(picture)
    # The names of the classes stand left of their rows.
    assert shown.shape[0] == 3 * 17 + 1
    assert shown.shape[1] > 2 * 17 + 1
    shown = shown[:, -(2 * 17 + 1) :, :3]
    generator = load_generator(run.run_dir)
    for row in range(3):
        for column, image in enumerate(generator.sample(2, seed=9, label=row)):
            cell = shown[1 + 17 * row : 17 * (row + 1), 1 + 17 * column : 17 * (column + 1)]
            assert np.array_equal(cell, image.movedim(0, -1).numpy())


def test_names_of_files_say_the_class_where_the_seed_does_not(
    verb: Verb, run: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    code, _, err = verb("sample", run.run_dir, "--per-class", 1, "--seed", 4, "--out", folder)
    assert code == 0, err
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"class-{label:03d}-seed-00000004.png" for label in range(3)]


def test_a_snapshot_outside_a_run_has_no_discriminator(
    verb: Verb, run: Config, tmp_path: Path
) -> None:
    inside = RunDirectory(run.run_dir).snapshot(160)
    options = ("--num", 1, "--best-of", 2, "--out", tmp_path / "a.png")
    code, _, err = verb("sample", inside, *options)
    assert code == 0, err
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes(inside.read_bytes())
    code, _, err = verb("sample", bare, *options)
    assert code == 2
    assert "is not in the folder of a run" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--per-class", 2, "--label", 1), "--label 1 is one class and --per-class shows all"),
        (("--label", 3), "expected a class of 0 to 2"),
        (("--best-of", 0), "--best-of"),
    ],
)
def test_wrong_use_is_one_line(
    verb: Verb, run: Config, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    code, _, err = verb("sample", run.run_dir, *options, "--out", tmp_path / "a.png")
    assert code == 2
    assert message in err
