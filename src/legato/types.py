"""Types that several layers share; they know nothing of training."""

import dataclasses
import enum
from typing import Any

JSON = None | bool | int | float | str | list[Any] | dict[str, Any]
"""What strict JSON can hold (floats are kept to the last bit)."""

Logs = dict[str, float]
"""Names and values of one step, one summary or one epoch, on the host."""


class AuditStatus(enum.StrEnum):
    """What became of one part of the state when a run was resumed."""

    RESTORED = "restored"
    NEW = "new"  # in the program, not in the checkpoint
    MISSING = "missing"  # in the checkpoint, not in the program
    IGNORED = "ignored"  # in both, and left alone on purpose
    NOT_RESUMABLE = "not resumable"  # its state cannot be saved


@dataclasses.dataclass(frozen=True)
class AuditEntry:
    """One line of the restore audit.

    Attributes:
        part: the part of the state, such as `"callbacks"` or `"arrays"`.
        name: what it is, such as `"EarlyStopping"` or `"EarlyStopping.best"`.
        status: what became of it.
        detail: why, where that needs saying.
    """

    part: str
    name: str
    status: AuditStatus
    detail: str = ""
