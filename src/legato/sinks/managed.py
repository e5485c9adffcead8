"""A summary manager as a sink."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from legato.errors import ConfigError, LegatoWarning, SummaryError
from legato.summaries.managers import SummaryManager, SummaryManagerInterface
from legato.summaries.writers import as_step
from legato.types import JSON, Table


@runtime_checkable
class Rewindable(Protocol):
    """A manager that takes part in checkpoints."""

    def get_state(self) -> JSON:
        """Where it is."""
        ...

    def set_state(self, state: JSON) -> None:
        """Take back everything since then (None: everything)."""
        ...


class ManagerSink:
    """Gives the values of one kind to a summary manager.

    Args:
        kind: of the values.
        manager: what they are given to.

    Attributes:
        inexact: what keeps it from being rewound; None if nothing does.
    """

    def __init__(self, kind: str, manager: SummaryManagerInterface) -> None:
        self._kind = kind
        self._manager = manager
        self.inexact: str | None = None
        if not isinstance(manager, Rewindable):
            name = type(manager).__qualname__
            self.inexact = (
                f"the summaries of {kind} go to a {name}, which has no "
                "get_state() and set_state(), and so cannot be rewound: a run "
                "that is killed writes some of them a second time"
            )

    @property
    def may_wait(self) -> bool:
        """Whether numbers may be written later: no code of a user's runs."""
        manager = self._manager
        return isinstance(manager, SummaryManager) and manager.is_plain

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """See `Sink`."""
        if kind != self._kind:
            return
        if isinstance(self._manager, SummaryManager):
            values = _without_lists(values)
        with as_step(step):
            self._manager.write_summaries(values)

    def write_table(self, kind: str, table: Table) -> None:
        """Write floats, where they may wait."""
        if kind == self._kind:
            assert isinstance(self._manager, SummaryManager)
            self._manager.summary_writer().write_table(table)

    def flush(self) -> None:
        """See `Sink`."""
        try:
            self._manager.flush()
        except SummaryError as error:
            _tell(error)

    def sync(self) -> None:
        """See `SyncedSink`."""
        if isinstance(self._manager, SummaryManager):
            self._manager.sync()

    def get_state(self) -> JSON:
        """See `Sink`."""
        if isinstance(self._manager, SummaryManager):
            # Written with the checkpoint, in the background.
            for error in self._manager.drain():
                _tell(error)
        if isinstance(self._manager, Rewindable):
            return self._manager.get_state()
        return None

    def set_state(self, state: JSON) -> None:
        """See `Sink`."""
        if isinstance(self._manager, Rewindable):
            self._manager.set_state(state)

    def close(self) -> None:
        """See `Sink`; the manager is the user's, and may still be used."""
        if not isinstance(self._manager, SummaryManager):
            return self.flush()
        try:
            self._manager.close()
        except SummaryError as error:
            _tell(error)


class EvaluationSink:
    """Gives what is evaluated to a manager, whose failures end nothing.

    Args:
        manager: what it is given to; None for nothing.
    """

    def __init__(self, manager: SummaryManagerInterface | None) -> None:
        self._sink = manager and ManagerSink("validation", manager)

    def write(self, step: int, results: Mapping[str, Any]) -> None:
        """Write and flush results.

        A value that cannot be written is told, and the others are written. A
        manager that fails is told, and is given nothing more.
        """
        if self._sink is None:
            return
        try:
            try:
                self._sink.write("validation", step, results)
            except SummaryError as error:
                _tell(error)
            self._sink.flush()
        except Exception as error:
            self._sink = None
            warnings.warn(
                "The eval_summary_manager failed, and is left out until the "
                f"next evaluation: {type(error).__name__}: {error}. The "
                "results are returned all the same.",
                LegatoWarning,
                stacklevel=3,
            )


def check_managers(run_dir: Path, summaries: str, **managers: Any) -> None:
    """Checks the summary managers that a user gives.

    Args:
        run_dir: the directory of the run.
        summaries: the engine's own directory in it.
        **managers: by the name of the argument; None for none.

    Raises:
        ConfigError: one is no manager, or writes where the engine does.
    """
    own = (run_dir / summaries).resolve()
    for name, manager in managers.items():
        if manager is None:
            continue
        if not isinstance(manager, SummaryManagerInterface):
            raise ConfigError(
                f"{name}={manager!r:.80}: it must be a legato.SummaryManager, "
                "or another legato.SummaryManagerInterface; or None for the "
                "run's own."
            )
        if isinstance(manager, SummaryManager) and (
            manager.summary_dir.resolve().is_relative_to(own)
        ):
            raise ConfigError(
                f"{name} has summary_dir={str(manager.summary_dir)!r}: {own} "
                "is the engine's own, and cut back when the run is resumed. "
                f"Give another directory, such as {run_dir / 'eval'}."
            )


def _without_lists(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without what is no summary: lists that metrics give, and None."""
    return {
        name: _without_lists(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None and not isinstance(value, list | tuple)
    }


def _tell(error: SummaryError) -> None:
    warnings.warn(str(error), LegatoWarning, stacklevel=2)
