"""Checkpoints: everything a run needs to go on, complete and verified or not there at all.

`lineage` decides which checkpoints belong to a run, and `holder` which process the run belongs to.
`encoding` turns a state into bytes, and `files` makes a verified checkpoint of them in a directory
or an object store (`ganscale.storage`). `store` puts these together, and `writer` uses it from a
background thread.
"""

from ganscale.checkpoint.files import SavedFiles
from ganscale.checkpoint.holder import Heartbeat, Holder, Session
from ganscale.checkpoint.lineage import Attempt, CheckpointName
from ganscale.checkpoint.store import (
    CheckpointStore,
    DamagedCheckpointWarning,
    Retention,
    RunInUse,
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
    "Retention",
    "RunInUse",
    "SaveResult",
    "SavedFiles",
    "Session",
    "Superseded",
]
