"""What a sink is: where the values of a run go."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from legato.types import JSON


@runtime_checkable
class Sink(Protocol):
    """Takes what a run writes.

    A package offers one by an entry point of the group `legato.sinks`: a
    function that is given the run directory (a `pathlib.Path`) and returns
    it. All but `sync` of a `SyncedSink` is called from the training thread.

    Whatever a sink raises does not end training: it is told once, and the sink
    is not called any more in this process.
    """

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Take values.

        Args:
            kind: "train", "validation" or "epoch".
            step: completed steps.
            values: by name: numbers, and of validation also what else its
                results hold: texts, arrays, figures, dicts of these. Not to
                be changed, and not to be kept for later: figures are closed
                and arrays may change.
        """
        ...

    def flush(self) -> None:
        """Have all that was taken outlive this process.

        Called before each `get_state` and at the end.
        """
        ...

    def get_state(self) -> JSON:
        """How far it is, for a checkpoint.

        Returns:
            Plain JSON: the same for the same values, whatever was killed
            meanwhile.
        """
        ...

    def set_state(self, state: JSON) -> None:
        """Take back everything after a checkpoint.

        Called once, before anything is written.

        Args:
            state: what `get_state` returned; None to take back everything.
        """
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


@runtime_checkable
class SyncedSink(Sink, Protocol):
    """A sink that makes sure that its values are on the disk."""

    def sync(self) -> None:
        """Have all that `get_state` counted outlive a power cut.

        Called from another thread, before the checkpoint counts.
        """
        ...
