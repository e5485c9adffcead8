"""What validation measures on the host, in a thread beside the device."""

import contextlib
import queue
import random
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from legato.compat.keras_arrays import to_numpy
from legato.compat.masked_arrays import without_mask
from legato.data import Chunk, HostValue
from legato.errors import LegatoWarning, StepError
from legato.metrics import HostMetric, HostStepMetric
from legato.task import Task

_MAX_WAITING = 4
"""Batches that wait for the thread: each holds memory. (Or those of one call
of the device, if these are more.)"""

_TICK_SECS = 0.05
_LEAVE_SECS = 1.0
"""How long the end of a validation that is broken off waits for a metric."""

_RESERVED = ("kind", "step")
"""Names of what stands in each record of the logs."""

_SMALL_BYTES = 64 * 1024

_PLAIN = None | bool | int | float | complex | str | bytes


class HostSide:
    """Host metrics, and a Task's `aggregate_logs`.

    Args:
        task: the task.
        metrics: its host metrics.

    Attributes:
        aggregates: whether the Task aggregates the logs of steps.

    Raises:
        StepError: the Task aggregates logs and never reduces them.
    """

    def __init__(self, task: Task, metrics: Sequence[HostMetric]) -> None:
        self._task = task
        self._metrics = metrics
        # Attributes that were others after a reset than after the one before.
        self._kept: set[str] = set()
        self._after_reset: dict[str, Any] | None = None
        own = type(task)
        self.aggregates = own.aggregate_logs is not Task.aggregate_logs
        reduces = own.reduce_aggregated_logs is not Task.reduce_aggregated_logs
        if self.aggregates != reduces:
            has, lacks = "aggregate_logs", "reduce_aggregated_logs"
            if reduces:
                has, lacks = lacks, has
            raise StepError(
                f"{own.__name__} defines {has}, but not {lacks}: one takes the "
                "logs of each batch, and the other makes logs of what was "
                "taken. Define both."
            )

    @property
    def is_needed(self) -> bool:
        """Whether anything is measured here."""
        return bool(self._metrics) or self.aggregates

    @property
    def inexact(self) -> str | None:
        """What no checkpoint holds, as far as it was noticed; a sentence."""
        if not self._kept:
            return None
        return (
            "Host metrics keep something from one validation to the next that "
            f"no checkpoint holds: {', '.join(sorted(self._kept))}. Have "
            "reset_state set it"
        )

    def begin(
        self, step: int, gives_up: Callable[[], bool], max_steps: int
    ) -> "HostThread":
        """Reset everything, and start a thread for one validation.

        Args:
            step: the number of training steps that were completed.
            gives_up: whether to break it off, asked while it is waited for.
            max_steps: the most batches that are handed over at a time.
        """
        for metric in self._metrics:
            metric.reset_state()
        self._look()
        return HostThread(
            self._task,
            self._metrics,
            step,
            gives_up,
            max_steps,
            aggregates=self.aggregates,
        )

    def _look(self) -> None:
        """Note what metrics keep from one validation to the next."""
        found = {
            f"{metric.name}.{name}": seen
            for metric in self._metrics
            for name, value in vars(metric).items()
            if (seen := _seen(value)) is not None
        }
        before = self._after_reset
        if before is not None:
            self._kept |= {
                name
                for name in before.keys() | found.keys()
                if before.get(name) != found.get(name)
            }
        self._after_reset = found


class Packed:
    """What goes from a step to the host: tensors, and what holds them.

    What stood for something that stays on the host is that again there.

    Args:
        logs: of the step, for `aggregate_logs`; None where it is not defined.
        metrics: the host metrics that the step has updated.

    Attributes:
        tensors: all tensors, in an order.

    Raises:
        StepError: something is neither a tensor nor plain data.
    """

    def __init__(
        self, logs: Mapping[str, Any] | None, metrics: Sequence[HostStepMetric]
    ) -> None:
        named = {metric.name: metric.take_recorded() for metric in metrics}
        nested = [logs, named]
        self.tensors: list[Any] = []
        # Tensors of a trace are gone when it ends: not kept.
        self._leaves: list[tuple[int | None, Any]] = []
        for path, leaf in keras.tree.flatten_with_path(nested):
            if isinstance(leaf, HostValue | _PLAIN):
                self._leaves.append((None, leaf))
                continue
            try:
                tensor = keras.ops.convert_to_tensor(leaf)
            except Exception as error:
                where = "/".join(map(str, path[1:]))
                raise StepError(
                    f"validation_step gave the host {leaf!r:.80} ({where}): it "
                    "must be tensors and plain data, nested in dicts, lists "
                    "and tuples."
                ) from error
            self._leaves.append((len(self.tensors), None))
            self.tensors.append(tensor)
        self._nested = keras.tree.map_structure(lambda _: 0, nested)

    def unpack(
        self, arrays: Sequence[np.ndarray], beside: Sequence[Any]
    ) -> tuple[Any, dict]:
        """The logs, and the calls of each metric by name, with arrays.

        Args:
            arrays: the tensors of a batch.
            beside: what of it stayed on the host.
        """
        leaves = [
            arrays[index]
            if index is not None
            else beside[plain.index]
            if isinstance(plain, HostValue)
            else plain
            for index, plain in self._leaves
        ]
        logs, named = keras.tree.pack_sequence_as(self._nested, leaves)
        return logs, named


_Waiting = tuple[Packed, list[Any], int, Sequence[Sequence[Any]]]


class HostThread:
    """Takes batches in their order while the device goes on with the next.

    Use it in a `with` statement: an exception there ends the thread.

    Args:
        task: whose logs are aggregated.
        metrics: what is measured.
        step: see `HostSide.begin`.
        gives_up: see there.
        max_steps: see there.
        aggregates: whether logs are.
    """

    def __init__(
        self,
        task: Task,
        metrics: Sequence[HostMetric],
        step: int,
        gives_up: Callable[[], bool],
        max_steps: int,
        *,
        aggregates: bool,
    ) -> None:
        self._task = task
        self._metrics = metrics
        self._step = step
        self._gives_up = gives_up
        self._doing = ""
        self._aggregates = aggregates
        self._aggregated: Any = None
        self._results: dict[str, Any] = {}
        self._reduced: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._cancelled = False
        # None ends it.
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue(
            max(1, _MAX_WAITING // max_steps)
        )
        self._thread = threading.Thread(
            target=self._run, name="legato-host-metrics", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> "HostThread":
        return self

    def __exit__(self, *exc: object) -> None:
        self._cancelled = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        self._waiting.put(None)  # for which there is room now
        self._thread.join(_LEAVE_SECS)
        if self._thread.is_alive():
            warnings.warn(
                f"Validation was broken off, and {self._doing} still runs in a "
                "thread, which is left behind.",
                LegatoWarning,
                stacklevel=3,
            )

    def take(self, packed: Packed, tensors: list[Any], chunk: Chunk) -> bool:
        """Hand some batches over; waits while too many are.

        Args:
            packed: what the tensors of a batch are part of.
            tensors: those of all batches, `[batches or more, ...]`.
            chunk: the batches.

        Returns:
            False: it was given up.

        Raises:
            Anything: what a metric raised for these batches or some before.
        """
        # (Not the chunk, which is large.)
        return self._put((packed, tensors, chunk.num_batches, chunk.beside))

    def finish(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Wait for all batches.

        Returns:
            The results of the metrics, and what the Task made of the logs:
            floats, dicts of such, and what only summaries can show. None: it
            was given up.

        Raises:
            Anything: what a metric or the Task raised.
            StepError: results have no names, or the same one.
        """
        if not self._put(None):
            return None
        while self._thread.is_alive():
            self._thread.join(_TICK_SECS)
            if self._thread.is_alive() and self._gives_up():
                return None
        self._raise()
        return self._results, self._reduced

    def _put(self, item: Any) -> bool:
        while self._thread.is_alive():
            try:
                self._waiting.put(item, timeout=_TICK_SECS)
                break
            except queue.Full:  # it may have ended meanwhile
                if self._gives_up():
                    return False
        self._raise()
        return True

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while (item := self._waiting.get()) is not None:
                if self._cancelled:
                    return
                packed, tensors, num_steps, beside = item
                stacks = [
                    _to_numpy(tensor, "A step gave") for tensor in tensors
                ]
                for index in range(num_steps):
                    if self._cancelled:
                        return
                    arrays = [stack[index, ...] for stack in stacks]
                    others = beside[index] if beside else ()
                    self._update(*packed.unpack(arrays, others))
            if not self._cancelled:
                self._read()
        except BaseException as error:
            # With the traceback of this thread: where it was raised.
            self._error = error

    def _update(self, logs: Any, calls: dict[str, Any]) -> None:
        """With a batch."""
        for metric in self._metrics:
            self._doing = f"the metric {metric.name!r}"
            for args, kwargs in calls[metric.name]:
                metric.update_state(*args, **kwargs)
        if self._aggregates:
            self._doing = "aggregate_logs"
            self._aggregated = self._task.aggregate_logs(self._aggregated, logs)

    def _read(self) -> None:
        for metric in self._metrics:
            self._doing = f"the metric {metric.name!r}"
            found = metric.result()
            who = f"{type(metric).__name__}.result (the metric {metric.name!r})"
            self._add(self._results, found, who)
        if self._aggregates:
            self._doing = who = "reduce_aggregated_logs"
            reduced = self._task.reduce_aggregated_logs(
                self._aggregated, self._step
            )
            self._add(
                self._reduced, reduced, f"{type(self._task).__name__}.{who}"
            )

    def _add(self, results: dict[str, Any], found: Any, who: str) -> None:
        for name, value in _named(found, who).items():
            if name in self._results or name in _RESERVED:
                other = "each record of the logs has"
                if name in self._results:
                    other = "a host metric returned too"
                raise StepError(
                    f"{who} returned {name!r}, which {other}. Give it another "
                    "name."
                )
            results[name] = value


def _named(found: Any, who: str) -> dict[str, Any]:
    if not isinstance(found, Mapping) or not all(map(_is_name, found)):
        raise StepError(
            f"{who} returned {found!r:.80}: it must be a dict of results by "
            "name: a str of Unicode text that is not empty."
        )
    return {
        name: (
            _named(value, f"{who}, {name!r},")
            if isinstance(value, Mapping)
            else _plain(value, f"{who} returned {name!r}")
        )
        for name, value in found.items()
    }


def _is_name(name: Any) -> bool:
    try:
        return isinstance(name, str) and bool(name.encode())
    except UnicodeEncodeError:  # a lone surrogate, as in odd file names
        return False


def _plain(value: Any, what: str) -> Any:
    """Numbers as floats, whatever held them; the rest as it is.

    Raises:
        StepError: it is of a kind that would be taken for numbers, or too
            large a number; `what` begins the message.
    """
    if isinstance(value, bool | int | float):
        try:
            return float(value)
        except OverflowError:
            raise StepError(
                f"{what}, a number of {int(value).bit_length()} bits: it must "
                "fit into a float. Return its logarithm, for example."
            ) from None
    if isinstance(value, str):
        return str(value)  # also of NumPy's
    if isinstance(value, np.ma.MaskedArray):
        value = without_mask(value)
    if isinstance(value, np.generic | np.ndarray) or keras.ops.is_tensor(value):
        array = _to_numpy(value, what)
        is_number = array.ndim == 0 and array.dtype.kind in "biuf"
        return float(array) if is_number else array
    if isinstance(value, list | tuple):
        return [_plain(each, what) for each in value]
    return value


def _to_numpy(tensor: Any, what: str) -> np.ndarray:
    array = to_numpy(tensor)
    if array.dtype.kind in "biufcSUO":
        return array
    if array.dtype.type.__module__ == "ml_dtypes":
        # What NumPy does not know, host metrics would not either.
        return array.astype(np.float32)
    raise StepError(
        f"{what}, of dtype {array.dtype}: it must be numbers or texts. "
        "Convert it: dates to numbers of days, or to str."
    )


def _seen(value: Any) -> Any:
    """What to compare a value by; None for what is not looked at."""
    match value:
        case bool() | int() | float() | str():
            return repr(value)
        case np.random.Generator():
            return repr(value.bit_generator.state)
        case np.random.RandomState():
            return repr(value.get_state(legacy=False))
        case random.Random():
            return repr(value.getstate())
        case np.ndarray() if value.nbytes <= _SMALL_BYTES:
            return value.dtype.str, value.shape, value.tobytes()
        case _:
            return None
