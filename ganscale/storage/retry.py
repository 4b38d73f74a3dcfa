"""How long a failing store is asked again: one policy and one loop, for reads and writes alike.

What may pass by itself is an `OSError`: a refused or broken connection, a timeout, a server's 5xx,
a full disk. It is retried with exponential backoff and jitter until the policy's deadline.
Everything else says something about the request and is raised at once: a file that is missing,
credentials that are refused, a damaged checkpoint, a bug.
"""

from __future__ import annotations

import itertools
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

from ganscale.errors import DataError

if TYPE_CHECKING:
    from ganscale.config import DataConfig

_PATIENCE_SECONDS = 10.0

Result = TypeVar("Result")


class StoreError(DataError):
    """A store that could not be reached within the deadline, or that refuses access."""


class SlowStoreWarning(UserWarning):
    """A store that sends far more than was asked for, or has not answered for a while."""


@dataclass(frozen=True)
class RetryPolicy:
    """For how long failing requests to a store are retried."""

    deadline_seconds: float = 60.0
    """From the first attempt until the error."""
    attempt_seconds: float = 30.0
    """For one request of a few megabytes at most; then the server is taken for stalled."""
    first_delay_seconds: float = 0.2
    max_delay_seconds: float = 10.0

    @classmethod
    def of(cls, data: DataConfig) -> Self:
        """The one that is configured."""
        return cls(data.store_deadline_seconds, data.store_timeout_seconds)

    def delay(self, attempt: int) -> float:
        """Seconds to wait after attempt 1, 2, ...: doubled each time, with jitter.

        Many workers lose a store at the same moment. The jitter keeps them from coming back at the
        same moment; the lower half stays fixed, so that no worker retries at once.
        """
        longest = min(self.max_delay_seconds, self.first_delay_seconds * 2.0 ** (attempt - 1))
        return random.uniform(longest / 2, longest)


def retry(
    action: Callable[[], Result],
    policy: RetryPolicy,
    failure: str,
    wait: Callable[[float], object] = time.sleep,
) -> Result:
    """Call `action` again while it raises an `OSError`; returns its result.

    Args:
        action: what is tried; what it changes may be done twice.
        policy: for how long.
        failure: the beginning of the error's message, such as "URL could not be read".
        wait: waits some seconds between two attempts; true if there shall be no other.

    Raises `StoreError` when the time is over; its cause is the last error.
    """
    began = time.monotonic()
    is_warned = False
    for attempt in itertools.count(1):
        try:
            return action()
        except (PermissionError, IsADirectoryError, NotADirectoryError):  # for people to change
            raise
        except OSError as error:
            delay, elapsed = policy.delay(attempt), time.monotonic() - began
            if elapsed + delay > policy.deadline_seconds or wait(delay):
                raise StoreError(
                    f"{failure} within {policy.deadline_seconds:g} s, {attempt} attempts; "
                    f"last: {one_line(error)}"
                ) from error
            # Once for each request: a run that seems to hang should say what it waits for.
            if not is_warned and elapsed > _PATIENCE_SECONDS:
                is_warned = True
                warnings.warn(
                    f"{failure} so far ({one_line(error)}); trying again for up to "
                    f"{policy.deadline_seconds:g} s",
                    SlowStoreWarning,
                    stacklevel=2,
                )
    raise AssertionError("unreachable")


def one_line(error: BaseException) -> str:
    """An error's class and message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
