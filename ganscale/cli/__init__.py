"""The `ganscale` command. Heavy imports wait inside the commands, so that --help is quick.

Exit codes: 0 success, 1 failure, 2 wrong use or configuration. Errors are one line on standard
error; `--debug` shows the traceback as well.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, NoReturn

import typer

# Importing them adds their verbs.
from ganscale.cli import (  # noqa: F401
    bench,
    checkpoints,
    compare,
    dashboard,
    evaluate,
    explore,
    images,
    jobs,
    rate,
    recognise,
    reconstruct,
    shards,
    sweep,
    training,
)
from ganscale.cli.app import app
from ganscale.errors import ConfigError, GanscaleError
from ganscale.world import launched_rank

__all__ = ["app", "main"]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    warnings.showwarning = _show_warning
    # torch warns that DDP's find_unused_parameters finds nothing; distribute.py says why it is set.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _let_waiting_threads_sleep()
    try:
        code = app(arguments, standalone_mode=False) or 0
    except typer.Exit as end:
        code = end.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = 130
        _report("interrupted", None, debug=False)
    except typer.TyperException as error:
        code = 2
        _report(f"{' '.join(error.format_message().split())} See --help.", None, debug=False)
    except GanscaleError as error:
        code = 2 if isinstance(error, ConfigError) else 1
        _report(str(error), error, debug=debug)
    except Exception as error:
        code = 1
        text = " ".join(str(error).split())
        _report(f"{type(error).__name__}: {text} (--debug shows where)", error, debug=debug)
    sys.exit(code)


def _let_waiting_threads_sleep() -> None:
    """Torch's OpenMP threads spin while they wait, at the cost of whoever shares the cores.

    OpenMP reads these when torch is loaded, here and in the workers that inherit them. After some
    microseconds of spinning a thread sleeps; benchmarks/RESULTS.md has what it changes.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "3000"


def _report(message: str, error: BaseException | None, *, debug: bool) -> None:
    if debug and error is not None:
        import traceback

        traceback.print_exception(error)
    rank = launched_rank()
    print(f"ganscale: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if launched_rank() == 0 and category.__module__.startswith("ganscale"):
        print(f"ganscale: warning: {message}", file=sys.stderr)
