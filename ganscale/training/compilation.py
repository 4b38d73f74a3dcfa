"""Whether a run compiles its elementwise work, with what, and where the kernels are kept."""

from __future__ import annotations

import os
import tempfile
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from ganscale.config import Config
from ganscale.errors import ConfigError
from ganscale.models.elementwise import KernelCompiler
from ganscale.user_cache import user_cache

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_LIMITED_BY_MEMORY = ("r3gan", "stylegan2")
"""Models in which biases and activations take a large part of a step on a GPU: a third of R3GAN's,
where convolutions are grouped."""


def kernel_compiler(config: Config, device: torch.device) -> AbstractContextManager[None]:
    """The block in which a run's steps are taken, by `training.compile`.

    With `on` this, or a step in the block, raises `ConfigError` if kernels cannot be compiled; with
    `auto` there is one warning, and the operations are launched one by one.
    """
    mode = config.training.compile
    pays = device.type == "cuda" and config.model.name in _LIMITED_BY_MEMORY
    if mode == "off" or (mode == "auto" and not pays):
        return nullcontext()

    def report(error: Exception) -> None:
        reason = str(error).strip().split("\n")[0]
        if mode == "on":
            raise ConfigError(
                f"training.compile=on, but kernels cannot be compiled here: {reason} (a C++ "
                "compiler is needed, and Triton on CUDA; or set training.compile=off, and another "
                "name=... if the run has begun)"
            ) from error
        warnings.warn(
            "kernels could not be compiled, so elementwise operations are launched one by one, "
            f"which is slower: {reason} (training.compile=off silences this)",
            stacklevel=2,
        )

    try:
        _make_folder()
    except OSError as error:
        report(error)
        return nullcontext()
    return KernelCompiler(report)


def _make_folder() -> None:
    """Have Inductor keep kernels where they outlive a restart, unless the user said where.

    Its own folder is one of /tmp, which machines empty when they start and containers lose.
    """
    chosen = os.environ.get(_FOLDER)
    # It notes its own choice where a user's would be, as soon as an optimizer is made.
    own = os.path.join(tempfile.gettempdir(), "torchinductor_")
    if chosen is None or chosen.startswith(own):
        os.environ[_FOLDER] = str(user_cache() / "kernels")
    # It would do so itself, in the middle of an import that does not bear an error.
    Path(os.environ[_FOLDER]).mkdir(parents=True, exist_ok=True)
