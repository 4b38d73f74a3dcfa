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
from ganscale.evaluation.image_sets import GeneratedImages, ImagesOfShards, open_images
from ganscale.evaluation.memory_images import MemoryImages
from ganscale.generation import sampler
from ganscale.generation.sampler import rows_per_forward
from ganscale.world import World
from tests.support.counting_generator import counting_generator
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


def _evaluated_generator(world: World, num_images: int) -> Any:
    # A GPU's forwards. The process ends with this function, so nothing is to be restored.
    sampler._CPU_ROWS = rows_per_forward("cuda", 32)
    network, generator = counting_generator()
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (700, 3, 8, 8), generator=noise, dtype=torch.uint8)
    samples = GeneratedImages(generator, num_images, 0, "fake", "fake")
    found = evaluate(samples, MemoryImages(pixels), SmallExtractor(), world)
    return network.num_rows, None if found is None else found.row()


def test_ranks_do_not_draw_what_others_do() -> None:
    num_images, num_rows = 2300, rows_per_forward("cuda", 32)
    ((_, alone),) = run_ranks(1, _evaluated_generator, num_images)
    assert len(alone) >= 7
    for world_size in (1, 2, 3):
        drawn, rows = zip(*run_ranks(world_size, _evaluated_generator, num_images), strict=True)
        assert rows == (alone, *[None] * (world_size - 1))
        # The last forward of every rank is not full.
        assert sum(drawn) <= (-(-num_images // num_rows) + world_size) * num_rows


def test_an_image_that_one_rank_cannot_read_is_an_error_on_all(
    folder: Path, procedural_shards: Path
) -> None:
    (folder / "0700.png").write_bytes(b"no image")
    one, other = run_ranks(2, _evaluated, folder, procedural_shards)
    assert "0700" in one
    assert other == one


def _evaluated_snapshots(world: World) -> Any:
    _, generator = counting_generator()
    samples = GeneratedImages(generator, 100, 0, "fake", f"weights of rank {world.rank}")
    with pytest.raises(DataError, match="name one snapshot by --snapshot"):
        evaluate(samples, samples, SmallExtractor(), world)
    return True


def test_ranks_with_different_snapshots_are_refused() -> None:
    assert run_ranks(2, _evaluated_snapshots) == [True, True]


def _evaluated_by_two_networks(world: World, folder: Path) -> Any:
    extractor = SmallExtractor()
    extractor.digest = f"that of rank {world.rank}"
    images = open_images(str(folder), scratch=folder)
    with pytest.raises(DataError, match="ranks have different extractors"):
        evaluate(images, images, extractor, world)
    return True


def test_ranks_with_different_networks_are_refused(folder: Path) -> None:
    assert run_ranks(2, _evaluated_by_two_networks, folder) == [True, True]
