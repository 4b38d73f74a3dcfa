"""ganscale trains GANs, VAEs, encoders and classifiers on images at cluster scale.

`ganscale.train(config)` trains, `ganscale.load_generator(path).sample(16, seed=0)` draws from a
trained generator; the command line does the rest. Importing this package loads neither torch nor
ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ganscale.config import Config
    from ganscale.generation.sampler import SampleableGenerator
    from ganscale.training.callbacks import Callback
    from ganscale.training.stopping import TrainResult

__all__ = ["__version__", "load_generator", "train"]

__version__ = "0.2.0"


def load_generator(path: str | Path, *, device: str = "cpu") -> SampleableGenerator:
    """Load a snapshot file, or the newest snapshot of a run's folder, ready to sample from."""
    from ganscale.generation import snapshot

    return snapshot.load_generator(path, device=device)


def train(
    config: Config | str | Path,
    overrides: Sequence[str] = (),
    *,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train, on from the newest checkpoint if the run exists, and wait for the end.

    Args:
        config: a configuration, the name of a preset, or the path of a YAML file.
        overrides: changes to a preset or a file, each `section.field=value`.
        callbacks: objects that are run between steps, on every rank; they need
            `launch.backend=inprocess`. `ganscale.training.callbacks.Callback` is their base class.

    Example:
        >>> import ganscale
        >>> from ganscale.training.callbacks import Callback
        >>>
        >>> class PrintPosition(Callback):
        ...     every_kimg = 10.0
        ...
        ...     def run(self, state):
        ...         print(f"{state.nimg} images, {state.step} steps")
        >>>
        >>> changes = ["launch.backend=inprocess", "launch.num_workers=1"]
        >>> ganscale.train("quickstart", changes, callbacks=[PrintPosition()])

    SIGTERM and Ctrl-C end it early, with a checkpoint. Raises `ConfigError` or `DataError` before
    anything is written if the configuration cannot be trained, `RunInUse` if another process that
    is alive trains the run, `TrainingFault` when the guard ends the run.
    """
    from rich.console import Console

    from ganscale.config import Config, load_config
    from ganscale.launch.start import start

    if not isinstance(config, Config):
        config = load_config(config, overrides)
    elif overrides:
        raise ValueError("overrides are for presets and files; change a Config by with_changes()")
    return start(config, Console(stderr=True), callbacks=callbacks)
