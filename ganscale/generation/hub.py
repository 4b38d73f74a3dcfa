"""Folders of generators on the Hugging Face hub, through the public interface of huggingface_hub.

The library is an extra and is imported when a model is uploaded or downloaded, not before: folders
and files need neither it nor a network.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from ganscale import __version__
from ganscale.errors import CheckpointError, ConfigError

_FILES = ("*.safetensors", "config.json", "README.md")


def is_repository(name: str) -> bool:
    """Whether a text has the form of a model on the hub, OWNER/NAME."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def download(repository: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a model of the hub, downloaded unless it is in huggingface_hub's cache.

    Raises `CheckpointError` if it cannot be read, and `ConfigError` without huggingface_hub.
    """
    hub = _library(f"there is no {repository} here, and to look for it on the Hugging Face hub")
    try:
        folder: str = hub.snapshot_download(
            repository,
            revision=revision,
            token=token,
            allow_patterns=list(_FILES),
            library_name="ganscale",
            library_version=__version__,
        )
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{repository} is neither a path nor a model on the Hugging Face hub that can be "
            f"read: {reason}"
        ) from None
    return Path(folder)


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str,
) -> str:
    """Upload a folder as a model, which is created if it does not exist; returns its address.

    Raises `ConfigError` without huggingface_hub, or if the hub refuses.
    """
    hub = _library("to upload to the Hugging Face hub")
    api = hub.HfApi(token=token, library_name="ganscale", library_version=__version__)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
        )
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{repository} cannot be uploaded: {reason}") from None
    return str(address)


def _library(purpose: str) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ConfigError(
            f"{purpose}, huggingface_hub is needed: pip install 'ganscale[hub]'"
        ) from None
    library: ModuleType = huggingface_hub
    return library
