"""What validation measures on the host, in a thread beside the device."""

import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from legato.errors import StepError
from legato.metrics import HostMetric, HostStepMetric
from legato.task import Task

_MAX_WAITING = 4
"""Batches that wait for the thread: each holds memory."""

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

    def begin(self, step: int) -> "HostThread":
        """Reset everything, and start a thread for one validation.

        Args:
            step: the number of training steps that were completed.
        """
        for metric in self._metrics:
            metric.reset_state()
        return HostThread(
            self._task, self._metrics, step, aggregates=self.aggregates
        )


class Packed:
    """What goes from a step to the host: tensors, and what holds them.

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
            if isinstance(leaf, _PLAIN):
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

    def unpack(self, arrays: Sequence[np.ndarray]) -> tuple[Any, dict]:
        """The logs, and the calls of each metric by name, with arrays."""
        leaves = [
            plain if index is None else arrays[index]
            for index, plain in self._leaves
        ]
        logs, named = keras.tree.pack_sequence_as(self._nested, leaves)
        return logs, named


class HostThread:
    """Takes batches in their order while the device goes on with the next.

    Use it in a `with` statement: an exception there ends the thread.

    Args:
        task: whose logs are aggregated.
        metrics: what is measured.
        step: see `HostSide.begin`.
        aggregates: whether logs are.
    """

    def __init__(
        self,
        task: Task,
        metrics: Sequence[HostMetric],
        step: int,
        *,
        aggregates: bool,
    ) -> None:
        self._task = task
        self._metrics = metrics
        self._step = step
        self._aggregates = aggregates
        self._aggregated: Any = None
        self._results: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._cancelled = False
        # None ends it.
        self._waiting: queue.Queue[tuple[Packed, list[Any]] | None] = (
            queue.Queue(_MAX_WAITING)
        )
        self._thread = threading.Thread(
            target=self._run, name="legato-host-metrics", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> "HostThread":
        return self

    def __exit__(self, *exc: object) -> None:
        self._cancelled = True
        self._put(None)
        self._thread.join()

    def take(self, packed: Packed, tensors: list[Any]) -> None:
        """Hand a batch over; waits while too many are.

        Raises:
            Anything: what a metric raised for this batch or one before.
        """
        self._put((packed, tensors))
        self._raise()

    def finish(self) -> dict[str, Any]:
        """Wait for all batches.

        Returns:
            The results of the metrics and what the Task made of the logs:
            floats, dicts of such, and what only summaries can show.

        Raises:
            Anything: what a metric or the Task raised.
            StepError: results have no names, or the same one.
        """
        self._put(None)
        self._thread.join()
        self._raise()
        return self._results

    def _put(self, item: Any) -> None:
        while self._thread.is_alive():
            try:
                self._waiting.put(item, timeout=0.1)
                return
            except queue.Full:
                continue  # it may have ended meanwhile

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while (item := self._waiting.get()) is not None:
                if self._cancelled:
                    return
                packed, tensors = item
                logs, calls = packed.unpack([_to_numpy(t) for t in tensors])
                for metric in self._metrics:
                    for args, kwargs in calls[metric.name]:
                        metric.update_state(*args, **kwargs)
                if self._aggregates:
                    self._aggregated = self._task.aggregate_logs(
                        self._aggregated, logs
                    )
            if not self._cancelled:
                self._results = self._read()
        except BaseException as error:
            # With the traceback of this thread: where it was raised.
            self._error = error

    def _read(self) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for metric in self._metrics:
            found = metric.result()
            who = f"{type(metric).__name__}.result (the metric {metric.name!r})"
            for name, value in _named(found, who).items():
                if name in results:
                    raise StepError(
                        f"{who} returned {name!r}, which another host metric "
                        "returned too. Give one of them another name."
                    )
                results[name] = value
        if self._aggregates:
            reduced = self._task.reduce_aggregated_logs(
                self._aggregated, self._step
            )
            who = f"{type(self._task).__name__}.reduce_aggregated_logs"
            results |= _named(reduced, who)
        return results


def _named(found: Any, who: str) -> dict[str, Any]:
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) for name in found
    ):
        raise StepError(
            f"{who} returned {found!r:.80}: it must be a dict of results by "
            "name."
        )
    return {
        name: (
            _named(value, f"{who}, {name!r},")
            if isinstance(value, Mapping)
            else _plain(value)
        )
        for name, value in found.items()
    }


def _plain(value: Any) -> Any:
    """Numbers as floats, whatever held them; the rest as it is."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, np.generic | np.ndarray) or keras.ops.is_tensor(value):
        array = _to_numpy(value)
        is_number = array.ndim == 0 and array.dtype.kind in "biuf"
        return float(array) if is_number else array
    return value


def _to_numpy(tensor: Any) -> np.ndarray:
    array = np.asarray(keras.ops.convert_to_numpy(tensor))
    # What NumPy does not know, host metrics would not either.
    known = array.dtype.kind in "biufcSUO"
    return array if known else array.astype(np.float32)
