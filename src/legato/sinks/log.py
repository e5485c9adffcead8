"""All that a run writes for people to read, in the sinks that hold it."""

import contextlib
import dataclasses
import datetime
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from legato import storage
from legato.config.sinks import plug_ins, require_known
from legato.errors import (
    ConfigError,
    DamagedError,
    LegatoError,
    LegatoWarning,
    RestoreError,
)
from legato.sinks.files import CSV, METRICS, CsvSink, JsonLinesSink
from legato.sinks.managed import ManagerSink
from legato.sinks.protocol import Sink, SyncedSink
from legato.storage import strict_json
from legato.summaries.managers import (
    SummaryManager,
    SummaryManagerInterface,
)
from legato.types import JSON, Table

TIMING = "timing.jsonl"
SUMMARIES = "summaries"
LATE = 0.1
"""Seconds that values wait, or until the next device call works: of small steps
many are written at once, which is twice as quick as a few after each call."""

KINDS = ("train", "validation")
"""Of the values that managers are given; `epoch` repeats them."""


@dataclasses.dataclass(eq=False)
class _Entry:
    """A sink, and what is known of it.

    Attributes:
        name: of its state in a checkpoint.
        sink: the sink.
        is_own: whether it writes files that are part of the exact run, of
            which nothing may be lost.
        is_dropped: whether it failed.
    """

    name: str
    sink: Any
    is_own: bool
    is_dropped: bool = False


class RunLog:
    """The sinks of one run directory.

    What a sink raises ends nothing: it is told once, and the sink dropped for
    the rest of this process. Its saved state is kept for the next one. Three
    things are let through: whatever `metrics.jsonl` raises; of the other files
    of the exact run what the system reports of their writing, which is tried
    again with the checkpoint; and a value that is none (a `LegatoError`).

    Args:
        run_dir: an existing directory, locked by this process.
        sinks: names of those beside `metrics.jsonl`.
        managers: summary managers in place of the engine's own, by kind.
        run_id: the run's id, by which it knows its files elsewhere.
        dropped: names of those that failed earlier in this process.

    Attributes:
        inexact: what keeps sinks from being rewound, a sentence each.

    Raises:
        ConfigError: a sink is not known, or is none.
        RunDirError: one of their files or directories is a symbolic link, or
            something else.
        OSError: files of the exact run cannot be opened.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        sinks: Sequence[str] = ("tensorboard",),
        managers: Mapping[str, SummaryManagerInterface | None] | None = None,
        run_id: str = "",
        dropped: Sequence[str] = (),
    ) -> None:
        require_known(list(sinks))
        self._run_dir = run_dir
        self._states: dict[str, JSON] = {}
        self._failed: list[tuple[_Entry, Exception]] = []
        self._forget = set(dropped)
        self._claimed: list[SummaryManager] = []
        self._waiting: list[tuple[str, Callable[[], Table]]] = []
        self._late_at = 0.0
        _refuse_links(run_dir / SUMMARIES)
        for own in (METRICS, TIMING, *([CSV] if "csv" in sinks else [])):
            storage.require_kind(run_dir / own)
        self._metrics = JsonLinesSink(run_dir)
        self._timing = storage.JsonLines(run_dir / TIMING)
        self._others: list[_Entry] = []
        self.inexact: list[str] = []
        for name in sinks:
            if name == "csv":
                self._add(CSV, CsvSink(run_dir), is_own=True)
            elif name != "tensorboard":
                self._make(name)
        # Pictures are given away by managers, and so are written last. (And
        # whatever is refused above, no manager is claimed for good.)
        for kind, manager in self._managers(sinks, managers or {}, run_id):
            sink = ManagerSink(kind, manager)
            if sink.inexact:
                self.inexact.append(sink.inexact)
            is_own = isinstance(manager, SummaryManager)
            self._add(f"{SUMMARIES}/{kind}", sink, is_own)
        # Code of the user's is called at once: it may look at anything.
        self._may_wait = all(
            isinstance(each.sink, CsvSink)
            or (isinstance(each.sink, ManagerSink) and each.sink.may_wait)
            for each in self._others
        )
        self._metrics.refuses = self._may_wait

    def _managers(
        self,
        sinks: Sequence[str],
        given: Mapping[str, SummaryManagerInterface | None],
        run_id: str,
    ) -> list[tuple[str, SummaryManagerInterface]]:
        found: list[tuple[str, SummaryManagerInterface]] = []
        for kind in KINDS:
            manager = given.get(kind)
            if manager is None:
                if "tensorboard" not in sinks:
                    continue
                manager = SummaryManager(self._run_dir / SUMMARIES / kind)
            elif isinstance(manager, SummaryManager) and all(
                manager is not each for _, each in found
            ):
                manager.claim(f"-{kind}-{run_id}")
                self._claimed.append(manager)
            found.append((kind, manager))
        return found

    def _add(self, name: str, sink: Any, is_own: bool) -> None:
        self._others.append(_Entry(name, sink, is_own, name in self._forget))

    def _make(self, name: str) -> None:
        """Have a plug-in make its sink."""
        entry = _Entry(name, None, is_own=False, is_dropped=True)
        if name not in self._forget:
            try:
                entry.sink = plug_ins()[name].load()(self._run_dir)
            except Exception as error:
                self._drop(entry, error)
            else:
                _check_sink(name, entry.sink)
                entry.is_dropped = False
        self._others.append(entry)

    # -- writing ------------------------------------------------------------

    @property
    def dropped(self) -> list[str]:
        """The names of the sinks that failed."""
        return [each.name for each in self._others if each.is_dropped]

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write values of a kind ("train", "validation", "epoch").

        Raises:
            LegatoError: a value is none that can be written.
        """
        self.catch_up()
        self._metrics.write(kind, step, values)
        self._give("write", kind, step, values)

    def write_later(self, kind: str, make: Callable[[], Table]) -> None:
        """Write values of several steps, which may wait for `catch_up`.

        Args:
            kind: see `write`.
            make: gives them; of plain data, and whenever it is called.
        """
        if not self._waiting:
            self._late_at = time.monotonic() + LATE
        self._waiting.append((kind, make))
        if not self._may_wait:
            self.catch_up()

    @property
    def is_behind(self) -> bool:
        """Whether something waits for `catch_up`."""
        return bool(self._waiting)

    @property
    def is_late(self) -> bool:
        """Whether something has waited for long enough."""
        return self.is_behind and time.monotonic() >= self._late_at

    def catch_up(self) -> None:
        """Write what was put off: to be called while the device works.

        Everything else that needs it calls it too.
        """
        waiting, self._waiting = self._waiting, []
        for kind, make in waiting:
            table = make()
            if self._may_wait and table.is_of_floats:
                self._metrics.write_table(kind, table)
                self._give("write_table", kind, table)
            else:
                for step, values in table.rows():
                    self.write(kind, step, values)

    def _give(self, method: str, *arguments: Any) -> None:
        """Have all other sinks write."""
        for entry in self._others:
            # (A file that cannot be opened for its first line is dropped.)
            self._call(entry, method, *arguments, passes=LegatoError)

    def write_timing(self, step: int, values: dict[str, Any]) -> None:
        """Write wall-clock figures, which are no part of the exact run."""
        now = datetime.datetime.now(datetime.UTC).isoformat()
        self._timing.append({"step": step, "time": now, **values})

    def flush(self) -> None:
        """Hand everything to the system: it survives this process.

        Raises:
            OSError: it failed; nothing is lost, and it can be repeated.
        """
        self.catch_up()
        self._metrics.flush()
        self._timing.flush()
        for entry in self._others:
            self._call(entry, "flush")
        self._tell_failed()

    def sync(self) -> None:
        """Write and make durable: it survives a power cut too.

        May be called from another thread than the one that writes.

        Raises:
            OSError: it failed; nothing is lost, and it can be repeated.
        """
        self._metrics.sync()
        for entry in self._others:
            if entry.is_own:
                # Also of one that was dropped: a checkpoint counts its bytes.
                entry.sink.sync()
            elif not entry.is_dropped and isinstance(entry.sink, SyncedSink):
                try:
                    entry.sink.sync()
                except Exception as error:
                    self._failed.append((entry, error))
        with contextlib.suppress(OSError):  # no part of the run
            self._timing.flush()

    # -- state --------------------------------------------------------------

    def get_state(self) -> JSON:
        """Where the sinks are, for a checkpoint."""
        self.catch_up()
        self._tell_failed()
        states = {**self._states, METRICS: self._metrics.get_state()}
        for entry in self._others:
            if not entry.is_own:
                self._call(entry, "flush")
            state = self._call(entry, "get_state", check=strict_json.dumps)
            if not entry.is_dropped:
                states[entry.name] = state
        self._states = states
        return dict(states)

    def rewind(self, state: JSON, *, lenient: bool = False) -> None:
        """Take back everything after a checkpoint (None: everything).

        Args:
            state: what `get_state` returned.
            lenient: go on with logs that are shorter than the state says.

        Raises:
            RestoreError: the logs are shorter than the state says.
            RunDirError: a directory of them is a symbolic link.
        """
        states = {} if state is None else state
        if not isinstance(states, dict):
            raise RestoreError(f"The saved log positions are {state!r:.80}.")
        _refuse_links(self._run_dir / SUMMARIES)
        self._waiting = []
        # Those of sinks that are not here today are for when they are again.
        self._states = dict(states)
        try:
            with _lenient(lenient):
                self._metrics.set_state(states.get(METRICS))
            for entry in self._others:
                with _lenient(lenient):
                    self._call(entry, "set_state", states.get(entry.name))
        except DamagedError as error:
            raise RestoreError(
                f"The logs do not reach to the checkpoint: {error}. Put them "
                'back, or set resume="override" to go on without the missing '
                "lines."
            ) from error

    def close(self) -> None:
        """Flush and close, and let managers go; idempotent."""
        with contextlib.ExitStack() as stack:
            while self._claimed:  # called last: nothing is open any more
                stack.callback(self._claimed.pop().release)
            stack.callback(self._timing.close)
            stack.callback(self._metrics.close)
            for entry in self._others:
                if entry.is_own:
                    stack.callback(entry.sink.close)
                else:
                    stack.callback(self._call, entry, "close")
            stack.callback(self.catch_up)
            self._tell_failed()

    # -- failures -----------------------------------------------------------

    def _call(
        self,
        entry: _Entry,
        method: str,
        *arguments: Any,
        check: Callable[[Any], Any] = lambda result: None,
        passes: type | tuple[type, ...] = (OSError, LegatoError),
    ) -> Any:
        """Call a sink; drop it if it fails.

        Args:
            entry: the sink, and nothing is done if it was dropped.
            method: of it.
            *arguments: of that.
            check: raises if the result is none.
            passes: what is let through where the files are our own.
        """
        if entry.is_dropped:
            return None
        try:
            result = getattr(entry.sink, method)(*arguments)
            check(result)
            return result
        except Exception as error:
            if entry.is_own and isinstance(error, passes):
                raise
            self._drop(entry, error)

    def _drop(self, entry: _Entry, error: Exception) -> None:
        entry.is_dropped = True
        warnings.warn(
            f"The sink {entry.name!r} failed, and is left out until the run "
            f"is started again: {type(error).__name__}: {error}. Training "
            f"goes on; {METRICS} has all numbers.",
            LegatoWarning,
            stacklevel=4,
        )

    def _tell_failed(self) -> None:
        """Report what failed in another thread."""
        failed, self._failed = self._failed, []
        for entry, error in failed:
            if not entry.is_dropped:
                self._drop(entry, error)


def _check_sink(name: str, sink: Any) -> None:
    if isinstance(sink, Sink):
        return
    methods = [each for each in vars(Sink) if not each.startswith("_")]
    missing = [each for each in methods if not callable(getattr(sink, each, 0))]
    raise ConfigError(
        f"sinks: the package of {name!r} made a {type(sink).__name__}, which "
        f"is no legato.sinks.Sink: it has no {', '.join(missing)}. Leave it "
        "out, or have it mended."
    )


def _refuse_links(folder: Path) -> None:
    """Symbolic links among the engine's own directories are refused."""
    storage.require_kind(folder, is_directory=True)
    for place, folders, _ in os.walk(folder):
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                storage.require_kind(Path(place, name), is_directory=True)


@contextlib.contextmanager
def _lenient(is_lenient: bool) -> Iterator[None]:
    try:
        yield
    except DamagedError:
        if not is_lenient:
            raise
