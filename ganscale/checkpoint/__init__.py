"""Checkpoints: everything a run needs to go on, complete and verified or not there at all.

`lineage` says which checkpoints belong to a run, `encoding` turns a state into files, `places` are
directories and object stores, `store` puts the three together, `writer` works in the background.
"""

from ganscale.checkpoint.lineage import Attempt, CheckpointName
from ganscale.checkpoint.store import (
    CheckpointStore,
    DamagedCheckpointWarning,
    Retention,
    SavedFiles,
    Superseded,
)
from ganscale.checkpoint.writer import BackgroundWriter, Outcome

__all__ = [
    "Attempt",
    "BackgroundWriter",
    "CheckpointName",
    "CheckpointStore",
    "DamagedCheckpointWarning",
    "Outcome",
    "Retention",
    "SavedFiles",
    "Superseded",
]
