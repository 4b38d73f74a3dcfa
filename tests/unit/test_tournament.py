"""A tournament whose judges and generators are known: every figure by hand."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ganscale.checkpoint import CheckpointStore
from ganscale.checkpoint.files import saved_state
from ganscale.config import Config
from ganscale.data.shards import ShardSet
from ganscale.errors import CheckpointError, ConfigError
from ganscale.evaluation.gan_metrics.gan_pairs import (
    GanPair,
    ScoringDiscriminator,
    load_gan_pairs,
    score_images,
)
from ganscale.evaluation.gan_metrics.tournament import num_scored, run_tournament
from ganscale.generation.sampler import SampleableGenerator
from ganscale.generation.snapshot import save_snapshot
from ganscale.metrics.gam import score
from ganscale.models import build_discriminator, build_generator
from ganscale.run_directory import RunDirectory
from tests.conftest import MakeConfig

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Images:
    """Image n is the gray n + 1 of 255, 2x2 pixels."""

    num_images: int
    labels: NDArray[np.int64] | None = None
    description: str = "grays"
    digest: str = ""
    classes: tuple[str, ...] = ()
    shape: tuple[int, int, int] = (1, 2, 2)

    def __len__(self) -> int:
        return self.num_images

    def read(self, indices: Indices) -> Tensor:
        grays = torch.from_numpy(indices + 1).to(torch.uint8)
        return grays[:, None, None, None].expand(-1, *self.shape)


class Sees(nn.Module):
    """The logit is the brightness, weighted by class."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights or (1.0,)))

    def forward(self, images: Tensor, labels: Tensor | None) -> Tensor:
        weights = self.weights[labels if labels is not None else 0]
        return images.mean(dim=(1, 2, 3)) * weights


class Blind(Sees):
    """All images are alike to it."""

    def forward(self, images: Tensor, labels: Tensor | None) -> Tensor:
        return 0 * super().forward(images, labels)


class Paints(nn.Module):
    """All images have one brightness."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.value.expand(len(z), 1, 2, 2)


def pair(name: str, value: float, judge: nn.Module, num_classes: int = 0) -> GanPair:
    spec = {"z_dim": 2, "num_classes": num_classes, "resolution": 8}
    info = {"classes": ["ant", "bee"][:num_classes]}
    generator = SampleableGenerator(Paints(value), spec=spec, info=info)
    return GanPair(name, 1000, generator, ScoringDiscriminator(judge, num_classes), name, {})


def test_who_sees_everything_beats_who_is_blind() -> None:
    """`bright` paints white and sees; `dark` paints black and is blind: 64 images of each.

    The blind judge has all logits at its threshold: half of everything is wrong. The other's
    threshold is the median of its own 64 whites and 64 grays of at most 128: between the brightest
    gray and white. So it takes all grays for fakes, as it does all of dark's samples. Rates are
    (errors + 1/2) / 65.
    """
    runs = [pair("bright", 1.0, Sees()), pair("dark", -1.0, Blind())]
    reference = Images(128)
    scores = run_tournament(runs, reference, num_images=64).scores
    assert scores.num_images == 64
    assert scores.chosen == ((1.0, 0.0), (0.5, 0.5))
    assert scores.taken_for_real == ((1.0, 0.0), (0.5, 0.5))
    (match,) = scores.matches
    assert match.r_test.value == pytest.approx(64.5 / 32.5)
    assert match.r_samples.value == pytest.approx(0.5 / 32.5)
    assert match.winner is None  # r_test is not about 1
    assert [standing.name for standing in scores.standings] == ["bright", "dark"]


def logits_of(chosen: list[list[float]], num_images: int = 200) -> NDArray[np.float64]:
    """Test logits 0 to N - 1, and constant samples above the wanted share of them."""
    num_runs = len(chosen)
    logits = np.empty((num_runs, num_runs + 1, num_images))
    logits[:, -1] = np.arange(num_images)
    for judge, row in enumerate(chosen):
        for maker, share in enumerate(row):
            logits[judge, maker] = share * num_images - 0.5
    return logits


def test_two_runs_are_as_far_apart_as_their_games_say() -> None:
    """a's samples are chosen in 40 % by b, b's in 20 % by a: a has 0.4 + 0.8 of 2 games."""
    scores = score(logits_of([[0.1, 0.2], [0.4, 0.1]]), np.full(2, 100.0), ["a", "b"])
    first, second = scores.standings
    assert (first.name, second.name) == ("a", "b")
    difference = first.rating.value - second.rating.value
    assert difference == pytest.approx(400 * math.log10(1.2 / 0.8), abs=0.5)  # the prior's part
    assert first.chosen.value == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ([[0.1, 0.2], [0.4, 0.1]], "b is larger than chance explains."),
        ([[0.1, 0.39], [0.4, 0.1]], "b may be chance, since their intervals overlap."),
    ],
)
def test_the_last_line_says_who_is_ahead_and_how_surely(
    chosen: list[list[float]], words: str
) -> None:
    scores = score(logits_of(chosen), np.full(2, 100.0), ["a", "b"])
    line = scores.lines()[-1]
    assert line.startswith("a is ahead: the discriminators of the others choose its samples over ")
    assert "test images 40% of the time (50% would be perfect), and the lead over" in line
    assert line.endswith(words)


@pytest.mark.parametrize(
    ("thresholds", "winner"),
    [((60.0, 60.0), "a"), ((20.0, 150.0), None), ((150.0, 150.0), None)],
    ids=["a sees b's samples", "judges of other strictness", "nobody is fooled"],
)
def test_matches_are_decided_as_im_et_al_do(
    thresholds: tuple[float, float], winner: str | None
) -> None:
    """a's samples lie at logit 80 for b, b's at 40 for a; test images at 0 to 199."""
    scores = score(logits_of([[0.0, 0.2], [0.4, 0.0]]), np.array(thresholds), ["a", "b"])
    (match,) = scores.matches
    assert match.winner == winner


def test_equal_looks_count_half() -> None:
    """Of two samples at 2 and 5, test images at 0 and 2: 1 1/2 and 2 are beaten, of 2 and 2."""
    logits = np.array([[[2.0, 5.0], [-1.0, -1.0], [0.0, 2.0]]] * 2)
    scores = score(logits, np.full(2, 2.0), ["a", "b"])
    assert scores.chosen == ((0.875, 0.0), (0.875, 0.0))
    assert scores.taken_for_real == ((0.75, 0.0), (0.75, 0.0))


def test_intervals_are_those_of_the_images() -> None:
    """Half of the samples beat all test images: the share's deviation is 1 / (2 sqrt(N))."""
    logits = logits_of([[0.0, 0.5], [0.5, 0.0]], 400)
    logits[:, :2, :200], logits[:, :2, 200:] = -1, 400
    standing = score(logits, np.zeros(2), ["a", "b"]).standings[0]
    assert standing.chosen.value == 0.5
    assert standing.chosen.low == pytest.approx(0.5 - 1.96 / 40, abs=0.01)
    assert standing.chosen.high == pytest.approx(0.5 + 1.96 / 40, abs=0.01)


def test_every_image_is_judged_once_in_batches_of_one_size() -> None:
    class Counts(Sees):
        def forward(self, images: Tensor, labels: Tensor | None) -> Tensor:
            return super().forward(images, labels) + 1000 * len(images)

    done: list[int] = []
    logits = score_images(
        [ScoringDiscriminator(Counts())], Images(100), use_labels=False, progress=done.append
    )
    expected = 64000 + np.arange(1, 101) / 127.5 - 1
    np.testing.assert_allclose(logits, [expected], atol=0.01)
    assert done == [64, 36]


def test_a_judge_with_classes_is_told_labels_or_takes_the_best() -> None:
    images = Images(4, labels=np.array([0, 1, 0, 1]))
    judge = ScoringDiscriminator(Sees(1.0, 3.0), num_classes=2)
    dark = np.arange(1, 5) / 127.5 - 1
    told = score_images([judge], images, use_labels=True)
    np.testing.assert_allclose(told, [dark * [1, 3, 1, 3]], rtol=1e-5)
    np.testing.assert_allclose(
        score_images([judge], images, use_labels=False), [np.maximum(dark, 3 * dark)], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("classes", "labelled", "used", "why"),
    [
        ((2, 2), True, True, ""),
        ((2, 2), False, False, "grays has none"),
        ((2, 0), True, False, "run1 trained without classes"),
        ((0, 0), True, False, ""),
    ],
)
def test_labels_are_used_when_all_know_them(
    classes: tuple[int, int], labelled: bool, used: bool, why: str
) -> None:
    runs = [pair(f"run{i}", 0.0, Sees(1.0, 2.0), n) for i, n in enumerate(classes)]
    labels = np.arange(8) % 2 if labelled else None
    reference = Images(8, labels=labels, classes=("ant", "bee"))
    result = run_tournament(runs, reference, num_images=4)
    assert (result.uses_labels, result.why_without) == (used, why)
    written = json.loads(json.dumps(result.to_json()))
    assert (written["uses_labels"], written["why_without"]) == (used, why)


def test_labels_are_not_used_where_the_classes_have_no_names_or_differ() -> None:
    runs = [pair(f"run{i}", 0.0, Sees(1.0, 2.0), 2) for i in range(2)]
    reference = Images(8, labels=np.arange(8) % 2, classes=("ant", "bee"))
    runs[1].generator.classes = ("ant", "cat")
    assert run_tournament(runs, reference).why_without == "run1 has other classes than run0"
    runs[1].generator.classes = ()
    result = run_tournament(runs, reference)
    assert not result.uses_labels
    assert result.why_without.endswith("have the names of the classes of run1")


def test_a_tournament_is_a_function_of_its_seed_and_counts_its_images() -> None:
    runs = [pair("a", 0.2, Sees()), pair("b", 0.1, Sees())]
    done: list[int] = []
    first = run_tournament(runs, Images(50), num_images=100, seed=3, progress=done.append)
    assert first == run_tournament(runs, Images(50), num_images=100, seed=3)
    assert sum(done) == num_scored(2, 100, Images(50)) == 150


@pytest.mark.parametrize(
    ("names", "shape", "words"),
    [
        (["a"], (1, 2, 2), "two runs"),
        (["a", "a"], (1, 2, 2), "twice"),
        (["a", "b"], (3, 2, 2), "a makes images of shape"),
    ],
)
def test_gans_that_cannot_meet_are_refused(
    names: list[str], shape: tuple[int, int, int], words: str
) -> None:
    runs = [pair(name, 0.0, Sees()) for name in names]
    with pytest.raises(ConfigError, match=words):
        run_tournament(runs, Images(50, shape=shape))


MakeRun = Callable[..., Config]


@pytest.fixture
def make_run(make_config: MakeConfig) -> MakeRun:
    """A run with checkpoints at some positions; all parameters are a hundredth of the position."""

    def make(*positions: int, **changes: object) -> Config:
        config = make_config(**changes)
        config.run_dir.mkdir(parents=True)
        (config.run_dir / "config.yaml").write_text(config.to_yaml())
        spec = config.model.model_dump()
        generator, discriminator = build_generator(spec), build_discriminator(spec)
        store = CheckpointStore(config.checkpoints)
        attempt, _ = store.claim(lambda: None)
        for nimg in positions:
            for parameter in (*generator.parameters(), *discriminator.parameters()):
                nn.init.constant_(parameter, nimg / 100)
            state = {
                "averages": {"": {"generator": generator.state_dict()}},
                "D": {"model": discriminator.state_dict()},
            }
            meta = {"config": config.model_dump(mode="json")}
            store.write(attempt, saved_state(nimg, state, meta))
        return config

    return make


@pytest.mark.parametrize(
    ("suffix", "nimg"),
    [("", 48), ("@0.048", 48), ("@0.04", 48), ("@0.032", 32), ("@0.03", 32), ("@0", 0), ("@9", 48)],
)
def test_a_run_plays_as_it_was_when_so_many_images_were_due(
    make_run: MakeRun, suffix: str, nimg: int
) -> None:
    config = make_run(0, 16, 32, 48)
    (found,) = load_gan_pairs([f"{config.run_dir}{suffix}"])
    assert (found.nimg, found.name) == (nimg, f"tiny@{nimg / 1000:g}")
    for model in (found.generator.model, found.discriminator.model):
        assert not model.training
        assert all(bool(torch.all(p == nimg / 100)) for p in model.parameters())


def test_checkpoints_are_found_where_the_configuration_says(
    make_run: MakeRun, tmp_path: Path
) -> None:
    config = make_run(16, checkpoint__location=str(tmp_path / "elsewhere"))
    (found,) = load_gan_pairs([str(config.run_dir)])
    assert found.nimg == 16


def test_a_moved_run_has_its_class_names_from_moved_shards_or_from_a_snapshot(
    make_run: MakeRun, procedural_shards: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "runs" / "shards"
    shards.parent.mkdir()
    shutil.copytree(procedural_shards, shards)
    changes = {"model.name": "sngan", "model.num_classes": 10, "data.shards": str(shards)}
    config = make_run(16, storage=str(tmp_path / "runs"), **changes)
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    (found,) = load_gan_pairs([str(moved / "tiny")])
    assert found.generator.classes == ShardSet.load(procedural_shards).classes
    shutil.rmtree(moved / "shards")
    (found,) = load_gan_pairs([str(moved / "tiny")])
    assert found.generator.classes == ()
    save_snapshot(
        RunDirectory(moved / "tiny").snapshot(16),
        found.generator.model,
        spec=config.model.model_dump(),
        nimg=16,
        classes=[f"kind {number}" for number in range(10)],
    )
    (found,) = load_gan_pairs([str(moved / "tiny")])
    assert found.generator.classes[9] == "kind 9"


def test_runs_of_one_name_are_told_apart_by_their_paths(make_run: MakeRun, tmp_path: Path) -> None:
    configs = [make_run(16, storage=str(tmp_path / part)) for part in "ab"]
    found = load_gan_pairs([str(config.run_dir) for config in configs])
    assert [c.name for c in found] == [f"{config.run_dir}@0.016" for config in configs]


def test_a_position_before_the_first_checkpoint_names_those_there_are(make_run: MakeRun) -> None:
    config = make_run(32, 48)
    with pytest.raises(CheckpointError, match=r"it has some at 0\.032, 0\.048 kimg"):
        load_gan_pairs([f"{config.run_dir}@0.01"])


def test_what_is_no_run_or_no_position_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run"):
        load_gan_pairs([str(tmp_path)])
    with pytest.raises(ConfigError, match="RUN@KIMG"):
        load_gan_pairs([f"{tmp_path}/run@half"])
