"""Types that several layers share; they know nothing of training."""

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

JSON = None | bool | int | float | str | list[Any] | dict[str, Any]
"""What strict JSON can hold (floats are kept to the last bit)."""

Logs = dict[str, float]
"""Names and values of one step, one summary or one epoch, on the host."""


class LogStyle(enum.StrEnum):
    """What the logs that a step returns mean.

    Attributes:
        MEANS: values of a batch. Their means over the examples are the logs
            of an epoch; batch hooks see the values.
        RUNNING: the same, but batch hooks see what an epoch's logs would be
            so far, metrics included; sorted by name. So does Keras's `fit`.
        OWN: what is to be reported, as a Keras model's own `train_step`
            returns it: the last step's are the epoch's. Sorted by name.
    """

    MEANS = "means"
    RUNNING = "running"
    OWN = "own"


@dataclasses.dataclass(frozen=True)
class Table:
    """Values at several steps, by names.

    Attributes:
        steps: the steps.
        columns: by name, a value at each of them.
    """

    steps: Sequence[int]
    columns: Mapping[str, Sequence[Any]]

    @property
    def is_of_floats(self) -> bool:
        """Whether the values are nothing else."""
        columns = self.columns.values()
        return {type(value) for each in columns for value in each} == {float}

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The values of each step, by name."""
        for step, *values in zip(
            self.steps, *self.columns.values(), strict=True
        ):
            yield step, dict(zip(self.columns, values, strict=True))


def flat_logs(logs: Mapping[str, Any], prefix: str = "") -> Logs:
    """What of logs is numbers, with the groups among them as "group/name".

    Args:
        logs: floats, lists of numbers, and dicts of these; what else there is
            (images, texts) is for summaries alone.
        prefix: of all names.
    """
    return {
        name: value
        for name, value in flatten(logs, prefix)
        if isinstance(value, float) or _is_numbers(value)
    }


def flatten(
    values: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """All values, with the names of the groups that they are in."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, float | int) or _is_numbers(each) for each in value
    )


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
