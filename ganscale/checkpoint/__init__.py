"""Checkpoints: everything a run needs to go on, complete and verified or not there at all.

`lineage` says which checkpoints belong to a run, `holder` which process it belongs to, `encoding`
turns a state into files, `storage_backends` writes them to directories or object stores, `store`
puts these together, `writer` works in the background.
"""

from ganscale.checkpoint.holder import Heartbeat, Holder, Session
from ganscale.checkpoint.lineage import Attempt, CheckpointName
from ganscale.checkpoint.store import (
    CheckpointStore,
    DamagedCheckpointWarning,
    Retention,
    RunInUse,
    SavedFiles,
    Superseded,
)
from ganscale.checkpoint.writer import BackgroundWriter, SaveResult

__all__ = [
    "Attempt",
    "BackgroundWriter",
    "CheckpointName",
    "CheckpointStore",
    "DamagedCheckpointWarning",
    "Heartbeat",
    "Holder",
    "SaveResult",
    "Retention",
    "RunInUse",
    "SavedFiles",
    "Session",
    "Superseded",
]
