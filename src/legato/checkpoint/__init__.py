"""Checkpoints: written in the background, checked when read.

A run directory holds::

    checkpoints/step_00000100/   state.safetensors  host.json  data/<name>
                                 manifest.json
    best/                        the same, of the best step so far
    commits.jsonl                what was committed, and rewinds

What is set aside is renamed, never removed: `damaged-step_00000100-1` could
not be read, `aside-step_00000200-1` lay after a step to which the run was
rewound on purpose.

`CheckpointStore` is for the process that holds the lock; what is in `finding`
reads beside it.
"""

from legato.checkpoint.finding import (
    RunReader,
    check_which,
    enclosing_run,
    find_checkpoint,
    watch_checkpoints,
)
from legato.checkpoint.format import Checkpoint, load_checkpoint
from legato.checkpoint.store import FINAL, CheckpointStore

__all__ = [
    "FINAL",
    "Checkpoint",
    "CheckpointStore",
    "RunReader",
    "check_which",
    "enclosing_run",
    "find_checkpoint",
    "load_checkpoint",
    "watch_checkpoints",
]
