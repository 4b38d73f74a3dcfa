"""Where a user's caches lie: they outlive runs and restarts, and may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """The folder that GANSCALE_CACHE names, else `~/.cache/ganscale`."""
    folder = os.environ.get("GANSCALE_CACHE") or Path.home() / ".cache" / "ganscale"
    return Path(folder).expanduser()
