"""Secrets of a run: from the driver's environment to its workers, and never through a job.

Ray shows a job's entrypoint, metadata and runtime environment to whoever may look at its dashboard,
and writes them into logs. So a job names the variables that are secret, and their values come from
the cluster's own means: a Kubernetes secret, a role of the cloud, or the environment in which the
head was started. Workers on other hosts get them from the driver, from process to process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from ganscale.errors import ConfigError

NAMES_VARIABLE = "GANSCALE_SECRETS"
"""Names, with commas, of a driver's environment variables that its workers get as well."""


def own(names: Iterable[str]) -> dict[str, str]:
    """The named variables of this process. Raises `ConfigError` for one that is not set."""
    names = list(names)
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ConfigError(f"{', '.join(missing)}: not set in the environment of this process")
    return {name: os.environ[name] for name in names}


def for_workers() -> dict[str, str]:
    """What this driver's workers get of its environment. Raises `ConfigError` if it is not set."""
    names = [name.strip() for name in os.environ.get(NAMES_VARIABLE, "").split(",")]
    try:
        return own(name for name in names if name)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; {NAMES_VARIABLE} (ganscale submit --secret) names variables of the "
            "environment that the cluster's head was started in"
        ) from error
