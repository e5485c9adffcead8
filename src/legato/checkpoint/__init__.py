"""Checkpoints: written in the background, checked when read.

A run directory holds::

    checkpoints/step_00000100/   state.safetensors  host.json  data/<name>
                                 manifest.json
    best/                        the same, of the best step so far
    commits.jsonl                what was committed, and rewinds

What is set aside is renamed, never removed: `damaged-step_00000100-1` could
not be read, `aside-step_00000200-1` lay after a step to which the run was
rewound on purpose.
"""

from legato.checkpoint.format import Checkpoint, load_checkpoint
from legato.checkpoint.store import CheckpointStore

__all__ = ["Checkpoint", "CheckpointStore", "load_checkpoint"]
