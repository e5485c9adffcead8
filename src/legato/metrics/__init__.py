"""Metrics inside a compiled step: updated when they are due, never read."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from legato import backends
from legato.errors import ConfigError, StepError


class StepMetric:
    """A metric as a step sees it.

    With an interval of 1, `update_state` acts at once. With a longer one it
    records, and one conditional around all recorded calls of the step runs
    them when they are due; the step is compiled once, whatever the interval.

    Args:
        metric: the Keras metric behind it.
        interval: steps between updates.
    """

    def __init__(self, metric: keras.metrics.Metric, interval: int) -> None:
        self._metric = metric
        self._interval = interval
        self._recorded: list[Callable[[], Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._metric, name)

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Update the metric with a batch, if it is due at this step."""
        if self._interval == 1:
            self._metric.update_state(*args, **kwargs)
        else:
            self._recorded.append(
                lambda: self._metric.update_state(*args, **kwargs)
            )

    def result(self) -> Any:
        """Refused: the engine reads results when they are due.

        Raises:
            StepError: always.
        """
        raise StepError(
            f"The metric {self._metric.name!r} was asked for its result() in a "
            "step. Only update it there: the engine reads it for summaries "
            "and at the end of an epoch."
        )

    def reset_state(self) -> None:
        """Refused: the engine resets metrics.

        Raises:
            StepError: always.
        """
        raise StepError(
            f"The metric {self._metric.name!r} was reset in a step. The engine "
            "resets metrics when an epoch or a validation begins."
        )

    def take_recorded(self) -> list[Callable[[], Any]]:
        """The calls that wait for their conditional."""
        recorded, self._recorded = self._recorded, []
        return recorded


def run_recorded(metrics: Sequence[StepMetric], due: Any) -> None:
    """Run what the metrics recorded in this step, if `due` (a bool tensor)."""
    calls = [call for metric in metrics for call in metric.take_recorded()]
    if calls:

        def update() -> None:
            for call in calls:
                call()

        keras.ops.cond(due, update, lambda: None)


def check_metrics(metrics: Any, where: str) -> list[keras.metrics.Metric]:
    """The metrics as a list.

    Raises:
        ConfigError: something else is among them, or two have one name.
    """
    if metrics is None:
        return []
    found = list(metrics) if isinstance(metrics, list | tuple) else [metrics]
    for metric in found:
        if not isinstance(metric, keras.metrics.Metric):
            raise ConfigError(
                f"{where} returned {metric!r} among the metrics: it must be a "
                "keras.metrics.Metric object. Return a list of these."
            )
    names = [metric.name for metric in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"{where} returned two metrics named {name!r}: give each one "
                "its own `name`."
            )
    return found


class Results:
    """The current results of metrics, on the host.

    Those of Keras's own metrics are computed in one call of the device. What
    another metric's `result` looks at is not known, so it simply runs.

    Args:
        metrics: the metrics.
    """

    def __init__(self, metrics: Sequence[keras.metrics.Metric]) -> None:
        self._metrics = metrics
        self._is_own = [_is_kerass_own(metric) for metric in metrics]
        self._own = list(itertools.compress(metrics, self._is_own))
        self._compute: Callable[[], list[Any]] | None = None
        self._num_variables = 0

    def __call__(self) -> dict[str, Any]:
        """Results by name: floats, or lists for arrays."""
        computed = iter(self._of_own() if self._own else [])
        out: dict[str, Any] = {}
        for metric, is_own in zip(self._metrics, self._is_own, strict=True):
            value = next(computed) if is_own else metric.result()
            named = value if isinstance(value, dict) else {metric.name: value}
            for name, each in named.items():
                array = np.asarray(keras.ops.convert_to_numpy(each))
                out[name] = float(array) if array.ndim == 0 else array.tolist()
        return out

    def _of_own(self) -> list[Any]:
        # Some make their variables when they are first updated.
        present = sum(len(metric.variables) for metric in self._own)
        if self._compute is None or present != self._num_variables:
            self._num_variables = present
            self._compute = backends.current().compile_reading(
                lambda: [metric.result() for metric in self._own]
            )
        return self._compute()


def _is_kerass_own(metric: Any) -> bool:
    return type(metric).__module__.startswith("keras.") and all(
        map(_is_kerass_own, metric._metrics)
    )


def directions(metrics: Sequence[keras.metrics.Metric]) -> dict[str, str]:
    """Whether less ("min") or more ("max") is better, where that is known."""
    known: dict[str, str] = {}
    for metric in metrics:
        # Keras sets it on its own metrics; users may on theirs.
        direction = getattr(metric, "_direction", None)
        if direction is not None:
            known[metric.name] = "max" if direction == "up" else "min"
    return known
