"""Metrics inside a compiled step: updated when they are due, never read."""

import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from legato import backends
from legato.compat.keras_models import means_by_name
from legato.errors import ConfigError, StepError
from legato.metrics.when import Every, Sample, When, any_due, as_tensor

__all__ = [
    "Every",
    "Results",
    "Sample",
    "StepMetric",
    "When",
    "any_due",
    "check_metrics",
    "directions",
    "run_recorded",
]


class StepMetric:
    """A metric as a step sees it.

    Where it is due at each step, `update_state` acts at once. Otherwise it
    records, and one conditional around the recorded calls of all metrics that
    are due together runs them; the step is compiled once, whatever is due.

    Args:
        metric: the Keras metric behind it.
        when: it is updated.

    Attributes:
        when: as given.
    """

    def __init__(self, metric: keras.metrics.Metric, when: When) -> None:
        self._metric = metric
        self.when = when
        self._recorded: list[Callable[[], Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._metric, name)

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Update the metric with a batch, if it is due at this step."""
        if self.when.is_always:
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

    def is_any_of(self, metrics: Container[keras.metrics.Metric]) -> bool:
        """Whether the metric behind it is one of these."""
        return self._metric in metrics

    def take_recorded(self) -> list[Callable[[], Any]]:
        """The calls that wait for their conditional."""
        recorded, self._recorded = self._recorded, []
        return recorded


def run_recorded(metrics: Sequence[StepMetric], step: Any) -> None:
    """Run what the metrics recorded in a step, where it is due.

    Args:
        metrics: all of them.
        step: the step's index (from 0), an int32 scalar tensor.
    """
    together: dict[When, list[Callable[[], Any]]] = {}
    for metric in metrics:
        together.setdefault(metric.when, []).extend(metric.take_recorded())
    for when, calls in together.items():
        if calls:

            def update(calls: list[Callable[[], Any]] = calls) -> None:
                for call in calls:
                    call()

            due = as_tensor(when.is_due(step))
            keras.ops.cond(due, update, lambda: None)


def check_metrics(
    metrics: Any, where: str, default: When, *, unique: bool = True
) -> dict[keras.metrics.Metric, When]:
    """The metrics, and when each is updated.

    Args:
        metrics: what `build_metrics` returned.
        where: that was, for messages.
        default: when, for those that are returned without saying so.
        unique: whether two may not have one name.

    Raises:
        ConfigError: something else is among them, or two have one name.
    """
    if isinstance(metrics, Mapping):
        pairs = list(metrics.items())
    elif isinstance(metrics, list | tuple):
        pairs = [(metric, default) for metric in metrics]
    else:
        pairs = [] if metrics is None else [(metrics, default)]
    for metric, when in pairs:
        if not isinstance(metric, keras.metrics.Metric):
            raise ConfigError(
                f"{where} returned {metric!r} among the metrics: it must be a "
                "keras.metrics.Metric object. Return a list of these."
            )
        if not isinstance(when, When):
            raise ConfigError(
                f"{where} returned {when!r} for the metric {metric.name!r}: "
                "it must be legato.Every(steps) or legato.Sample(share)."
            )
    names = [metric.name for metric, _ in pairs]
    for name in names:
        if unique and names.count(name) > 1:
            raise ConfigError(
                f"{where} returned two metrics named {name!r}: give each one "
                "its own `name`."
            )
    return dict(pairs)


class Results:
    """The current results of metrics, on the host.

    Means, which most of Keras's metrics are, are divided here. What else is
    Keras's own is computed in one call of the device. What another metric's
    `result` looks at is not known, so it simply runs.

    Args:
        metrics: the metrics.
    """

    def __init__(self, metrics: Sequence[keras.metrics.Metric]) -> None:
        self._metrics = metrics
        self._is_own = [_is_kerass_own(metric) for metric in metrics]
        self._own = list(itertools.compress(metrics, self._is_own))
        self._means: Callable[[], list[Any]] | None = None
        self._compute: Callable[[], list[Any]] | None = None
        self._num_variables = 0
        self._names: dict[keras.metrics.Metric, list[str]] = {}

    def __call__(self) -> dict[str, Any]:
        """Results by name: floats, or lists for arrays."""
        if not self._metrics:
            return {}
        computed = iter(self._of_own() if self._own else [])
        out: dict[str, Any] = {}
        for metric, is_own in zip(self._metrics, self._is_own, strict=True):
            value = next(computed) if is_own else metric.result()
            named = value if isinstance(value, dict) else {metric.name: value}
            self._names[metric] = list(named)
            for name, each in named.items():
                out[name] = each if type(each) is float else _on_host(each)
        return out

    def names(self, metric: keras.metrics.Metric) -> list[str]:
        """The names of a metric's results, once they have been read."""
        return self._names[metric]

    def _of_own(self) -> list[Any]:
        if self._means is not None:
            return self._means()
        # Some make their variables when they are first updated.
        present = sum(len(metric.variables) for metric in self._own)
        if self._compute is None or present != self._num_variables:
            self._num_variables = present
            self._means = _read_means(self._own)
            self._compute = self._means or backends.current().compile_reading(
                lambda: [metric.result() for metric in self._own]
            )
        return self._compute()


def _read_means(
    metrics: Sequence[keras.metrics.Metric],
) -> Callable[[], list[Any]] | None:
    """Reads the results of means; None if not all of them are.

    A call of the device for each division, or one for all, would be a large
    part of a small step where a callback looks at each batch.
    """
    means = [means_by_name(metric) for metric in metrics]
    if any(each is None for each in means):
        return None
    named = [each or {} for each in means]
    variables = [
        variable
        for each in named
        for mean in each.values()
        for variable in (mean.total, mean.count)
    ]

    def read() -> list[Any]:
        values = iter(backends.current().read(variables))
        return [
            {name: _divide_no_nan(next(values), next(values)) for name in each}
            for each in named
        ]

    return read


def _divide_no_nan(total: np.ndarray, count: np.ndarray) -> float:
    """As `keras.metrics.Mean.result`, to the bit."""
    return float(total / count.astype(total.dtype)) if count else 0.0


def _on_host(result: Any) -> Any:
    array = np.asarray(keras.ops.convert_to_numpy(result))
    return float(array) if array.ndim == 0 else array.tolist()


def _is_kerass_own(metric: Any) -> bool:
    # (Those of a compiled model hold others in a way of their own.)
    inner = [*metric._metrics, *getattr(metric, "metrics", ())]
    return type(metric).__module__.startswith("keras.") and all(
        map(_is_kerass_own, inner)
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
