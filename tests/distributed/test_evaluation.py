"""Any number of ranks measures the same numbers, and fails alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ganscale.data.shards import ShardSet
from ganscale.errors import DataError
from ganscale.evaluation.distributions.evaluate import evaluate
from ganscale.evaluation.distributions.precomputed import content_digest
from ganscale.evaluation.image_sets import ImagesOfShards, open_images
from ganscale.world import World
from tests.support.ranks import run_ranks
from tests.support.small_extractor import SmallExtractor


def _evaluated(world: World, folder: Path, shards: Path) -> Any:
    torch.set_num_threads(1)
    samples = open_images(str(folder), scratch=folder)
    try:
        content = content_digest(samples, world)
        found = evaluate(samples, ImagesOfShards(ShardSet.load(shards)), SmallExtractor(), world)
    except DataError as error:
        return str(error)
    return content, None if found is None else found.row()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    root = tmp_path / "samples"
    root.mkdir()
    for number in range(1201):
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:04d}.png")
    return root


def test_one_two_and_three_ranks_give_equal_numbers(folder: Path, procedural_shards: Path) -> None:
    ((content, alone),) = run_ranks(1, _evaluated, folder, procedural_shards)
    assert len(alone) >= 7
    for world_size in (2, 3):
        first, *others = run_ranks(world_size, _evaluated, folder, procedural_shards)
        assert others == [(content, None)] * (world_size - 1)
        assert first == (content, alone)


def test_an_image_that_one_rank_cannot_read_is_an_error_on_all(
    folder: Path, procedural_shards: Path
) -> None:
    (folder / "0700.png").write_bytes(b"no image")
    one, other = run_ranks(2, _evaluated, folder, procedural_shards)
    assert "0700" in one
    assert other == one


def _evaluated_by_two_networks(world: World, folder: Path) -> Any:
    extractor = SmallExtractor()
    extractor.digest = f"that of rank {world.rank}"
    images = open_images(str(folder), scratch=folder)
    with pytest.raises(DataError, match="ranks have different extractors"):
        evaluate(images, images, extractor, world)
    return True


def test_ranks_with_different_networks_are_refused(folder: Path) -> None:
    assert run_ranks(2, _evaluated_by_two_networks, folder) == [True, True]
