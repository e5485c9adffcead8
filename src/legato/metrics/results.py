"""What metrics have measured, read on the host."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from legato import backends
from legato.compat.keras_models import means_by_name


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
