"""A line that says how long feature extraction will take, before it starts.

Inception on a CPU takes a quarter of an hour for 10,000 images on one core, and silence for so long
looks like a hang.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ganscale.evaluation.distributions.evaluate import Workload
    from ganscale.metrics.extractors import FeatureExtractor
    from ganscale.world import World

__all__ = ["announce"]


def announce(
    workload: Workload, *, network: FeatureExtractor, shape: tuple[int, int, int], world: World
) -> None:
    """Measure how fast the network is on images of a shape (C, H, W), and print what follows.

    Every rank calls this; rank 0 prints.
    """
    from ganscale.evaluation.distributions.features import images_per_second

    # All ranks measure at once, since processes of one machine slow each other down.
    speed = images_per_second(network, shape) * world.world_size
    if world.is_main:
        typer.echo(_line(workload, speed, world.device), err=True)


def _line(workload: Workload, images_per_second: float, device: str) -> str:
    note = f" (statistics of {workload.statistics} are included)" if workload.statistics else ""
    seconds = (workload.num_samples + workload.num_reference) / images_per_second
    if seconds < 90:
        about = f"{seconds:.0f} seconds"
    elif seconds < 90 * 60:
        about = f"{seconds / 60:.0f} minutes"
    else:
        about = f"{seconds / 3600:.1f} hours"
    return (
        f"{workload.num_samples:,} samples + {workload.num_reference:,} reference images{note} at "
        f"{images_per_second:.3g} images/s on {device}: about {about}"
    )
