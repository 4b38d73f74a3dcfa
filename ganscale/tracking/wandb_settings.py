"""W&B's settings: what the environment says, and which of it wandb (0.31) would refuse.

wandb validates its variables when a run begins, in a process that training does not wait for: a
wrong one would be noticed hours later, as rows that are missing. So they are checked here, before
anything starts, by the rules of `wandb.Settings`. wandb itself is not imported, which would take
seconds. A variable that is empty counts as unset.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlparse

from ganscale.config.sections import valid_wandb_project
from ganscale.errors import ConfigError

__all__ = [
    "ARTIFACTS_VARIABLE",
    "Artifacts",
    "artifacts_to_log",
    "check_environment",
    "check_run_id",
    "helper_environment",
    "resolve_mode",
    "timeout_seconds",
    "variables",
]

Artifacts = Literal["none", "best", "all"]

ARTIFACTS_VARIABLE = "GANSCALE_WANDB_ARTIFACTS"
"""Which snapshots become artifacts: none (the default), best or all."""

_VARIABLES = (
    "WANDB_BASE_URL",
    "WANDB_ENTITY",
    "WANDB_FINISH_TIMEOUT",
    "WANDB_INIT_TIMEOUT",
    "WANDB_JOB_TYPE",
    "WANDB_MODE",
    "WANDB_NOTES",
    "WANDB_RUN_GROUP",
    "WANDB_TAGS",
    ARTIFACTS_VARIABLE,
)
_MODES = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""wandb's names of its modes; `run` and `dryrun` are old ones. `shared` is not supported."""
_DEFAULT_URL = "https://api.wandb.ai"
_TIMEOUTS = {"WANDB_INIT_TIMEOUT": 30.0, "WANDB_FINISH_TIMEOUT": 20.0}
"""Seconds for what the server must be asked, and then again for what is to be uploaded."""
_MAX_TAG = 64
_NOT_IN_ID = ":;,#?/'"
_NOT_IN_ENTITY = "/\\#?%:"


def resolve_mode(setting: str) -> str:
    """What `tracking.wandb` means here: "auto" is online where an API key is known.

    Raises `ConfigError` for a WANDB_MODE that is unknown.
    """
    if setting != "auto":
        return setting
    stated = _variable("WANDB_MODE")
    if stated is not None:
        return _mode(stated)
    return "online" if _variable("WANDB_API_KEY") or _netrc_has_key() else "offline"


def check_environment(setting: str) -> None:
    """Raise `ConfigError` with one line for what wandb would refuse of its variables.

    Nothing is checked if `setting`, which is `tracking.wandb`, disables W&B.
    """
    if resolve_mode(setting) == "disabled":
        return
    # All of them at once, so that nobody has to start as often as there are mistakes.
    problems = list(_problems())
    if problems:
        advice = "Change or unset what is named, or set tracking.wandb=disabled."
        raise ConfigError(f"{'; '.join(problems)}. {advice}")


def check_run_id(run_id: str, source: str) -> None:
    """Raise `ConfigError` if wandb would refuse the id; `source` is where it comes from."""
    if not run_id or run_id != run_id.strip() or set(run_id) & set(_NOT_IN_ID):
        raise ConfigError(
            f"{source}: {run_id!r} is not a valid W&B run id, which is not empty, has no spaces at "
            f"its ends and none of {' '.join(_NOT_IN_ID)}"
        )


def timeout_seconds(name: Literal["WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"]) -> float:
    """The variable, or its default. Raises `ConfigError` if it is no positive number."""
    stated = _variable(name)
    if stated is None:
        return _TIMEOUTS[name]
    try:
        seconds = float(stated)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{name}={stated!r}: expected a number of seconds greater than 0")
    return seconds


def artifacts_to_log() -> Artifacts:
    """Which snapshots become artifacts. Raises `ConfigError` for an unknown choice."""
    stated = _variable(ARTIFACTS_VARIABLE) or "none"
    for choice in get_args(Artifacts):
        if stated == choice:
            return choice  # type: ignore[no-any-return]
    raise ConfigError(f"{ARTIFACTS_VARIABLE}={stated!r}: expected none, best or all")


def variables() -> dict[str, str]:
    """What is set here of W&B's variables that workers on other machines should have as well."""
    return {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}


def helper_environment() -> Mapping[str, str]:
    """This process's environment without empty variables of W&B, some of which wandb refuses."""
    return {k: v for k, v in os.environ.items() if v or not k.startswith("WANDB_")}


def _problems() -> Iterator[str]:
    """What wandb or ganscale would refuse, each with the variable's name and the rule."""
    for check in (_check_modes, _check_names, _check_tags, _check_server, _check_own):
        try:
            check()
        except ConfigError as error:
            yield str(error)


def _check_modes() -> None:
    if (mode := _variable("WANDB_MODE")) is not None:
        _mode(mode)


def _check_names() -> None:
    if (project := _variable("WANDB_PROJECT")) is not None:
        try:
            valid_wandb_project(project)
        except ValueError as error:
            raise ConfigError(f"WANDB_PROJECT={project!r}: {error}") from None
    if (run_id := _variable("WANDB_RUN_ID")) is not None:
        check_run_id(run_id, "WANDB_RUN_ID")
    if (entity := _variable("WANDB_ENTITY")) is not None and (
        set(entity) & set(_NOT_IN_ENTITY) or re.search(r"\s", entity)
    ):
        raise ConfigError(
            f"WANDB_ENTITY={entity!r}: expected the name of a user or a team, without spaces "
            f"and {' '.join(_NOT_IN_ENTITY)}"
        )


def _check_tags() -> None:
    if (stated := _variable("WANDB_TAGS")) is None:
        return
    for tag in stated.split(","):
        if not 1 <= len(tag) <= _MAX_TAG:
            raise ConfigError(
                f"WANDB_TAGS has a tag of {len(tag)} characters ({tag[:20]!r}): expected tags of "
                f"1 to {_MAX_TAG} characters, with commas between them"
            )


def _check_server() -> None:
    if (key := _variable("WANDB_API_KEY")) is not None and key != key.strip():
        raise ConfigError("WANDB_API_KEY starts or ends with a space or a line break")
    url = _variable("WANDB_BASE_URL")
    if url is None:
        return
    try:
        parts = urlparse(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        host, _ = parts.hostname or "", parts.port
    except ValueError:  # a port that is no number, brackets that do not match
        is_valid, host = False, ""
    if not is_valid or re.search(r"\s", url):
        raise ConfigError(f"WANDB_BASE_URL={url!r}: expected http:// or https:// and a server")
    if host.endswith("wandb.ai") and (parts.scheme != "https" or "api." not in url):
        raise ConfigError(f"WANDB_BASE_URL={url!r}: W&B's own server is {_DEFAULT_URL}")


def _check_own() -> None:
    timeout_seconds("WANDB_INIT_TIMEOUT")
    timeout_seconds("WANDB_FINISH_TIMEOUT")
    artifacts_to_log()


def _mode(stated: str) -> str:
    if stated not in _MODES:
        raise ConfigError(f"WANDB_MODE={stated!r}: expected online, offline or disabled")
    return _MODES[stated]


def _variable(name: str) -> str | None:
    return os.environ.get(name) or None


def _netrc_has_key() -> bool:
    try:
        host = urlparse(_variable("WANDB_BASE_URL") or _DEFAULT_URL).hostname
        path = Path(_variable("NETRC") or "~/.netrc").expanduser()
        return host is not None and netrc(str(path)).authenticators(host) is not None
    except (OSError, ValueError, NetrcParseError):
        return False
