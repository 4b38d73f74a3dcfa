"""The same folders through torch-fidelity and through ganscale, with the same features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from ganscale.evaluation.distributions.evaluate import evaluate
from ganscale.evaluation.image_sets import open_images
from ganscale.world import World, process_group
from tests.support.small_extractor import SmallExtractor


class Theirs(FeatureExtractorBase):  # type: ignore[misc]
    """Our small extractor as torch-fidelity wants it."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self.extractor = SmallExtractor()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("eight",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "eight"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> torch.Tensor:
        return torch.zeros(1, 3, 16, 16)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.extractor.features(images),)


def folder_of(path: Path, num: int, seed: int, low: int) -> Path:
    random = np.random.default_rng(seed)
    path.mkdir()
    for number in range(num):
        colour = random.integers(low, 200, 3)
        pixels = (colour + random.integers(0, 56, (16, 16, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{number:05d}.png")
    return path


@pytest.mark.slow  # test_distances and test_inception_weights have the parts of it
@pytest.mark.filterwarnings("ignore")  # of torch-fidelity's own
def test_the_figures_of_two_folders_are_torch_fidelitys(tmp_path: Path) -> None:
    samples, reference = (
        folder_of(tmp_path / name, 1200, seed, low)
        for name, seed, low in (("samples", 0, 20), ("reference", 1, 0))
    )
    torch_fidelity.register_feature_extractor("small", Theirs)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(samples),
        input2=str(reference),
        feature_extractor="small",
        fid=True,
        kid=True,
        prc=True,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    images = [open_images(str(place), scratch=tmp_path) for place in (samples, reference)]
    world = World()
    with process_group(world):
        ours = evaluate(images[0], images[1], SmallExtractor(), world)
    assert ours is not None
    for name, their_name in (
        ("fd_small", "frechet_inception_distance"),
        ("kd_small", "kernel_inception_distance_mean"),
        ("precision_small", "precision"),
        ("recall_small", "recall"),
    ):
        assert ours.metrics[name].value == pytest.approx(theirs[their_name], rel=1e-3), name
    assert ours.metrics["fd_small"].value > 0
    assert 0.1 < ours.metrics["recall_small"].value < 0.99
