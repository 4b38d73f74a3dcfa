"""ganscale trains GANs on images at cluster scale.

`ganscale.load_generator(path).sample(16, seed=0)` draws from a trained generator; the command line
does the rest. Importing this package loads neither torch nor ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ganscale.generation.sampler import SampleableGenerator

__all__ = ["__version__", "load_generator"]

__version__ = "0.1.0"


def load_generator(path: str | Path, *, device: str = "cpu") -> SampleableGenerator:
    """Load a snapshot file, or the newest snapshot of a run's folder, ready to sample from."""
    from ganscale.generation import snapshot

    return snapshot.load_generator(path, device=device)
