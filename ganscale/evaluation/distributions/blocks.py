"""Work on all images of a set, shared by all ranks, with the results in order on rank 0.

Images are processed in fixed blocks, whichever rank has them, and rank 0 gets the blocks in the
order of the images. So results are bit-identical for any number of ranks. The price is a gather
after each block, in which fast ranks wait for slow ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from ganscale.errors import DataError
from ganscale.evaluation.image_sets import ImageSet
from ganscale.world import World

BLOCK = 100
"""Images that a rank processes before the results are gathered: ten seconds of a CPU's core with
Inception."""

Action = Callable[[NDArray[np.int64]], Tensor]


def map_blocks(
    action: Action, images: ImageSet, world: World
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Numbers of images (n,) and what `action` made of them (n, ...), in order, on rank 0.

    Every rank iterates over this inside a process group; it yields nothing on ranks other than 0.
    `action` takes at most `BLOCK` numbers, maybe none, and returns (BLOCK, ...), of which the rows
    beyond the numbers are ignored. A `DataError`, `OSError` or `RuntimeError` that it raises on any
    rank becomes the same `DataError` on all.
    """
    num_blocks = -(-len(images) // BLOCK)
    for first in range(0, num_blocks, world.world_size):
        mine = _numbers(first + world.rank, len(images))
        # After the last block some ranks have nothing to do, but still take part in the
        # collectives.
        block = _call_or_raise_on_all_ranks(partial(action, mine), images.description)
        for number, part in enumerate(_gather(block, world)):
            where = _numbers(first + number, len(images))
            if len(where):
                yield where, part[: len(where)]


def _numbers(block: int, num_images: int) -> NDArray[np.int64]:
    """The images of a block; none after the last."""
    return np.arange(min(block * BLOCK, num_images), min((block + 1) * BLOCK, num_images))


def _call_or_raise_on_all_ranks(action: Callable[[], Tensor], description: str) -> Tensor:
    """Call `action`, or raise the same `DataError` on all ranks if it fails on any."""
    result, problem = torch.empty(0), ""
    try:
        result = action()
    except DataError as error:
        problem = str(error)
    except (OSError, RuntimeError) as error:
        problem = f"{description}: {type(error).__name__}: {error}"
    # A rank that raised alone would leave the others waiting in the gather for ever. The flag is
    # one number, so that messages are exchanged only when something failed.
    failed = torch.tensor(int(bool(problem)))
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if failed:
        problems: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        raise DataError(next(text for text in problems if text))
    return result


def _gather(block: Tensor, world: World) -> list[Tensor]:
    """All ranks' blocks on rank 0, in order; nothing on others."""
    if not world.is_main:
        dist.gather(block, dst=0)
        return []
    blocks = [torch.empty_like(block) for _ in range(world.world_size)]
    dist.gather(block, blocks, dst=0)
    return blocks
