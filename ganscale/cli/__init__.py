"""The `ganscale` command. Heavy imports are inside the commands, so that --help is quick.

Exit codes: 0 success, 1 failure, 2 usage or configuration error. Errors are one line on standard
error; `--debug` shows the traceback as well.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import typer

# Importing them adds their subcommands.
from ganscale.cli import (  # noqa: F401
    averages,
    bench,
    checkpoints,
    compare,
    dashboard,
    evaluate,
    explore,
    export,
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
from ganscale.errors import ConfigError, GanscaleError, describe_os_error
from ganscale.world import launched_rank

__all__ = ["app", "main"]

_PACKAGE = "ganscale"
_HIDDEN_BY_PYTHON = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Accepted anywhere, also after the subcommand.
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    _show_own_warnings()
    if threading.excepthook is threading.__excepthook__:  # not one of a debugger or a test
        threading.excepthook = _thread_excepthook(debug=debug)
    # torch warns that DDP's find_unused_parameters finds nothing; `wrap_in_ddp` says why it is set.
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
        text = " ".join(error.format_message().split()).rstrip(".")
        _report(f"{text}. See --help.", None, debug=False)
    except GanscaleError as error:
        code = 2 if isinstance(error, ConfigError) else 1
        _report(str(error), error, debug=debug)
    except OSError as error:
        code = 1
        _report(describe_os_error(error), error, debug=debug)
    except Exception as error:
        code = 1
        _report(f"{_brief(error)} (--debug shows where)", error, debug=debug)
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
    text = " ".join(message.splitlines())
    print(f"ganscale: {f'rank {rank}: ' if rank else ''}{text}", file=sys.stderr)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _thread_excepthook(*, debug: bool) -> Callable[[threading.ExceptHookArgs], None]:
    """A hook that reports an exception that ended a thread in one line instead of a traceback."""

    def report(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is SystemExit:
            return
        name = args.thread.name if args.thread is not None else "unknown"
        error = args.exc_value or args.exc_type()
        text = describe_os_error(error) if isinstance(error, OSError) else _brief(error)
        _report(f"thread {name!r} ended: {text} (--debug shows where)", error, debug=debug)

    return report


def _show_own_warnings() -> None:
    """Show the warnings that ganscale issues, whatever their class, and hide those of others."""
    for category in _HIDDEN_BY_PYTHON:
        warnings.filterwarnings("default", category=category, module=rf"{_PACKAGE}(\.|$)")
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if launched_rank() != 0:
        return
    if category.__module__.partition(".")[0] == _PACKAGE or _is_own(sys._getframe(1)):
        print(f"ganscale: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _is_own(frame: FrameType | None) -> bool:
    """Whether the warning being shown was issued by code of ganscale, not only attributed to it.

    A warning of another library, such as torch's from C++, is attributed to the line of ganscale
    that called it; but only a function of ours that calls `warnings.warn` issues one itself.
    """
    while frame is not None and frame.f_globals.get("__name__") == "warnings":
        frame = frame.f_back
    if frame is None:
        return False
    module = str(frame.f_globals.get("__name__"))
    return module.partition(".")[0] == _PACKAGE and "warn" in frame.f_code.co_names
