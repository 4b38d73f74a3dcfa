"""ganscale trains GANs, VAEs, encoders and classifiers on images at cluster scale.

`ganscale.train(config)` trains, `ganscale.Run(folder)` looks at a run,
`ganscale.Generator.from_pretrained(place)` draws images, and `ganscale.evaluate(images, reference)`
measures them; the command line does the same and the rest. Importing this package loads neither
torch nor ray: each name is loaded when it is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ganscale.config import Config
    from ganscale.evaluation.distributions.evaluation import Evaluation
    from ganscale.evaluation.evaluate import evaluate
    from ganscale.generation.generator import Generator
    from ganscale.run import Run
    from ganscale.training.callbacks import Callback, Rollback
    from ganscale.training.stopping import TrainResult

__all__ = [
    "Callback",
    "Config",
    "Evaluation",
    "Generator",
    "Rollback",
    "Run",
    "TrainResult",
    "__version__",
    "evaluate",
    "train",
]

__version__ = "0.2.0"

_MODULES = {
    "Callback": "ganscale.training.callbacks",
    "Config": "ganscale.config",
    "Evaluation": "ganscale.evaluation.distributions.evaluation",
    "Generator": "ganscale.generation.generator",
    "Rollback": "ganscale.training.callbacks",
    "Run": "ganscale.run",
    "TrainResult": "ganscale.training.stopping",
    "evaluate": "ganscale.evaluation.evaluate",
}

# Type checkers would take any name for a known one if they saw it.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_MODULES[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


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
        callbacks: objects of subclasses of `ganscale.Callback`, which are run between steps, on
            every rank; they need `launch.backend=inprocess`.

    Returns:
        The position, in images, at which training ended, and the reason if it was not the end of
        the run. Everything else is in the run's folder, `config.run_dir`, for `ganscale.Run`.

    Example:
        >>> import ganscale
        >>>
        >>> class PrintPosition(ganscale.Callback):
        ...     every_kimg = 10.0
        ...
        ...     def run(self, state):
        ...         print(f"{state.nimg} images, {state.step} steps")
        >>>
        >>> changes = ["name=mine", "launch.backend=inprocess", "launch.num_workers=1"]
        >>> ganscale.train("quickstart", changes, callbacks=[PrintPosition()])

    SIGTERM and Ctrl-C end it early, with a checkpoint, where the main thread calls it. Raises
    `ConfigError` or `DataError` before anything is written if the configuration cannot be trained,
    `RunInUse` if another process that is alive trains the run, `TrainingFault` when the guard ends
    the run.
    """
    from rich.console import Console

    from ganscale.config import Config, load_config
    from ganscale.launch.start import start

    if not isinstance(config, Config):
        config = load_config(config, overrides)
    elif overrides:
        raise ValueError("overrides are for presets and files; change a Config by with_changes()")
    return start(config, Console(stderr=True, markup=False, emoji=False), callbacks=callbacks)
