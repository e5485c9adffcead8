"""What a training process is doing, for the process that will kill it."""

import enum
import mmap
import struct
from pathlib import Path
from typing import NamedTuple, Self

_LAYOUT = struct.Struct("<qqq")


class Phase(enum.IntEnum):
    """What the main thread of a training process is doing."""

    STARTING = 0
    """importing, building, compiling, restoring"""
    STEPS = 1
    """steps run on the device"""
    VALIDATION = 2
    """the validation data are measured"""
    SAVING = 3
    """everything is copied for a checkpoint"""
    BETWEEN = 4
    """callbacks, logs"""
    ENDING = 5
    """after the last step"""


class Reading(NamedTuple):
    """What the board said.

    Attributes:
        phase: what the process is doing.
        step: completed steps.
        began_at: the step that the process began with; -1 before that.
    """

    phase: Phase
    step: int
    began_at: int


class Board:
    """A few bytes in a file that two processes have in their memory.

    Writing costs less than a microsecond: the process that is watched is not
    slowed down. Each number is written at once; together they may be torn,
    which does no harm to what they are for.

    Args:
        path: of the file; made anew by the one that watches.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(_LAYOUT.pack(0, 0, -1))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)

    def write(self, phase: Phase, step: int, began_at: int) -> None:
        """Say what is being done."""
        _LAYOUT.pack_into(self._map, 0, phase, step, began_at)

    def read(self) -> Reading:
        """What was said last."""
        phase, step, began_at = _LAYOUT.unpack_from(self._map, 0)
        return Reading(Phase(phase), step, began_at)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._map.close()
