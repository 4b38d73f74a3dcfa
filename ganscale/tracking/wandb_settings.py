"""W&B's variables: which mode they ask for, and a refusal of wrong ones before anything starts.

wandb reads its variables when a run begins, in a process that training does not wait for: a wrong
one would be noticed hours later, as rows that are missing. So `wandb.Settings` itself is asked
here, variable by variable. A variable that is empty counts as unset.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlparse

from pydantic import ValidationError

from ganscale.errors import ConfigError

__all__ = ["artifacts_to_log", "check_environment", "resolve_mode", "seconds", "variables"]

_ARTIFACTS = "GANSCALE_WANDB_ARTIFACTS"
_PASSED_ON = "BASE_URL ENTITY FINISH_TIMEOUT INIT_TIMEOUT JOB_TYPE MODE NOTES RUN_GROUP TAGS"
_MODES = {"run": "online", "dryrun": "offline"}
"""Old names that wandb still knows."""
_TIMEOUTS = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "20"}
"""Until the user is told that W&B does not answer, and for the upload when training has ended."""


def resolve_mode(setting: str) -> str:
    """What `tracking.wandb` means here: "auto" is online where an API key is known.

    Raises `ConfigError` for a WANDB_MODE that is unknown; wandb's `shared` is not supported.
    """
    if setting != "auto":
        return setting
    if stated := os.environ.get("WANDB_MODE"):
        if (mode := _MODES.get(stated, stated)) not in ("online", "offline", "disabled"):
            raise ConfigError(f"WANDB_MODE={stated!r}: expected online, offline or disabled")
        return mode
    return "online" if os.environ.get("WANDB_API_KEY") or _netrc_has_key() else "offline"


def check_environment(setting: str) -> None:
    """Raise `ConfigError` with one line that names all variables that W&B would refuse.

    Nothing is checked if `setting`, which is `tracking.wandb`, disables W&B.
    """
    if resolve_mode(setting) != "disabled" and (problems := list(_refused())):
        advice = "Change or unset what is named, or set tracking.wandb=disabled."
        raise ConfigError(f"{'; '.join(problems)}. {advice}")


def artifacts_to_log() -> str:
    """Which snapshots become artifacts. Raises `ConfigError` for an unknown choice."""
    stated = os.environ.get(_ARTIFACTS) or "none"
    if stated not in ("none", "best", "all"):
        raise ConfigError(f"{_ARTIFACTS}={stated!r}: expected none, best or all")
    return stated


def seconds(name: str) -> float:
    """A timeout, or its default. Raises `ConfigError` unless it is a positive number."""
    stated = os.environ.get(name) or _TIMEOUTS[name]
    with suppress(ValueError):
        if 0 < (value := float(stated)) < math.inf:
            return value
    raise ConfigError(f"{name}={stated!r}: expected a number of seconds greater than 0")


def variables() -> dict[str, str]:
    """What is set here of W&B's variables that workers on other machines should have as well."""
    names = [*(f"WANDB_{name}" for name in _PASSED_ON.split()), _ARTIFACTS]
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def _refused() -> Iterator[str]:
    # Imported here: it takes 0.7 s, which only a command that begins a run has to spend.
    from wandb import Settings

    for name, value in sorted(os.environ.items()):
        if name.startswith("WANDB_") and value and name not in ("WANDB_MODE", *_TIMEOUTS):
            try:
                Settings().update_from_env_vars({name: value})
            except Exception as error:  # wandb's UsageError, pydantic's and Python's ValueError
                rule = str(error)
                if isinstance(error, ValidationError):
                    rule = "; ".join(problem["msg"] for problem in error.errors())
                shown = "" if "KEY" in name else f"={value!r}"
                yield f"{name}{shown}: {' '.join(rule.split()).rstrip('.')}"
    checks: list[Callable[[], object]] = [partial(resolve_mode, "auto"), artifacts_to_log]
    checks += [partial(seconds, name) for name in _TIMEOUTS]
    for check in checks:
        try:
            check()
        except ConfigError as error:
            yield str(error)


def _netrc_has_key() -> bool:
    try:
        host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
        path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
        return host is not None and netrc(str(path)).authenticators(host) is not None
    except (OSError, ValueError, NetrcParseError):
        return False
