"""W&B, from rank 0 only: one run across restarts, and never in the way of training.

The run's id lies in the run's folder, so a restart goes on with the same W&B run. Offline files are
flushed twenty times a second; wandb's default of 15 s loses that much to a kill.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ganscale.run_directory import RunDirectory

__all__ = ["WandbSink", "resolve_mode"]

_FLUSH_SECONDS = 0.05


class WandbSink:
    """A W&B run that takes rows with their own `step` as the horizontal axis."""

    def __init__(
        self, run_dir: RunDirectory, *, project: str, mode: str, config: dict[str, Any]
    ) -> None:
        import wandb

        run_dir.root.mkdir(parents=True, exist_ok=True)
        self.run_id = _run_id(run_dir.wandb_run_id)
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=self.run_id,
            resume="allow",
            mode="online" if mode == "online" else "offline",
            dir=str(run_dir.root),
            config=config,
            settings=wandb.Settings(
                x_transaction_log_flush_interval=_FLUSH_SECONDS, silent=True, console="off"
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Mapping[str, float]) -> None:
        """Send the row, complete at once."""
        self._run.log(dict(row), commit=True)

    def log_picture(self, name: str, path: Path, *, nimg: int, step: int) -> None:
        """Send the picture, with its caption."""
        picture = self._wandb.Image(str(path), caption=f"{nimg / 1000:g} kimg")
        self._run.log({name: picture, "step": step, "nimg": nimg}, commit=True)

    def alert(self, title: str, text: str) -> None:
        """Send an alert, which W&B mails to those who asked for it."""
        self._run.alert(title, text, level="WARN")

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def resolve_mode(setting: str) -> str:
    """What `tracking.wandb` means here: "auto" is online where an API key is known."""
    if setting != "auto":
        return setting
    stated = os.environ.get("WANDB_MODE")
    if stated in ("online", "offline", "disabled"):
        return stated
    return "online" if os.environ.get("WANDB_API_KEY") or _netrc_has_key() else "offline"


def _netrc_has_key() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return host is not None and netrc(str(path)).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def _run_id(path: Path) -> str:
    if not path.is_file():
        path.write_text(secrets.token_hex(4))
    return path.read_text()
