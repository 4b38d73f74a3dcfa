"""Work on all images of a set, shared by all ranks, with the results in order on rank 0.

Images are processed in fixed blocks, whichever rank has them, and rank 0 gets the blocks in the
order of the images. So results are bit-identical for any number of ranks. The price is a gather
after each block, in which fast ranks wait for slow ones, and that rank 0 holds the blocks of a few
gathers.
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
_RUN = 5
"""Blocks in a row that a rank processes. A generator draws up to 512 images at once, those that
follow the ones asked for, so a rank that went on with distant images would draw most in vain."""

Action = Callable[[NDArray[np.int64]], Tensor]


def map_blocks(
    action: Action, images: ImageSet, world: World
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Numbers of images (n,) and what `action` made of them (n, ...), in order, on rank 0.

    Every rank iterates over this inside a process group; it yields nothing on ranks other than 0.
    Each rank processes up to `_RUN` blocks in a row, and the next rank those that follow.

    `action` takes at most `BLOCK` numbers, maybe none, and returns (BLOCK, ...), of which the rows
    beyond the numbers are ignored. A `DataError`, `OSError` or `RuntimeError` that it raises on any
    rank becomes the same `DataError` on all.
    """
    num_blocks = -(-len(images) // BLOCK)
    first = yielded = 0
    waiting: dict[int, Tensor] = {}
    while first < num_blocks:
        # Fewer in a row at the end, so that all ranks share what is left.
        run = min(_RUN, -(-(num_blocks - first) // world.world_size))
        end = first + run * world.world_size
        for start in range(first, first + run):
            mine = _numbers(start + world.rank * run, len(images))
            # After the last block some ranks have nothing to do, but still take part in the
            # collectives.
            block = _call_or_raise_on_all_ranks(partial(action, mine), images.description)
            # Only rank 0 gets any.
            waiting |= zip(range(start, end, run), _gather(block, world), strict=False)
            while yielded in waiting:
                where, part = _numbers(yielded, len(images)), waiting.pop(yielded)
                yielded += 1
                if len(where):
                    yield where, part[: len(where)]
        first = end


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
