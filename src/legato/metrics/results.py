"""What metrics have measured, read on the host."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from legato import backends
from legato.compat.keras_arrays import to_numpy
from legato.compat.keras_models import CompileMetrics, means_by_name
from legato.errors import ConfigError
from legato.when import When


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
        self._variables: list[keras.Variable] = []
        self._compute: Callable[[Sequence[Any]], list[Any]] | None = None
        self._are_means = False
        self._num_present = 0
        self._names: dict[keras.metrics.Metric, list[str]] = {}

    @property
    def are_kerass_own(self) -> bool:
        """Whether the results depend on `variables` alone."""
        return all(self._is_own)

    @property
    def variables(self) -> list[keras.Variable]:
        """What the results of Keras's own metrics depend on."""
        self._prepare()
        return self._variables

    def __call__(
        self, values: Sequence[np.ndarray] | None = None
    ) -> dict[str, Any]:
        """Results by name: floats, or lists for arrays.

        Args:
            values: of `variables`; None for those that they hold.
        """
        if not self._metrics:
            return {}
        computed = iter(self._of_own(values) if self._own else [])
        out: dict[str, Any] = {}
        for metric, is_own in zip(self._metrics, self._is_own, strict=True):
            value = next(computed) if is_own else metric.result()
            named = _flat(
                value if isinstance(value, dict) else {metric.name: value}
            )
            self._names[metric] = list(named)
            for name, each in named.items():
                out[name] = each if type(each) is float else _on_host(each)
        return out

    def series(
        self, values: Sequence[np.ndarray], times: int
    ) -> dict[str, list[Any]]:
        """Results by name as they were at several times, a list of each.

        Args:
            values: of `variables` then, `[times, ...]` each. (There are no
                others that the results depend on.)
            times: how many.
        """
        if not self._metrics:
            return {}
        self._prepare()
        if not self._are_means:
            results = [
                self([np.asarray(each[i]) for each in values])
                for i in range(times)
            ]
            return {
                name: [each[name] for each in results] for name in results[0]
            }
        if not self._names:
            self([each[0] for each in values])
        names = [name for each in self._metrics for name in self._names[each]]
        pairs = zip(values[::2], values[1::2], strict=True)
        columns = [_divide_all(total, count) for total, count in pairs]
        return dict(zip(names, columns, strict=True))

    def names(self, metric: keras.metrics.Metric) -> list[str]:
        """The names of a metric's results, once they have been read."""
        return self._names[metric]

    def _of_own(self, values: Sequence[np.ndarray] | None) -> list[Any]:
        compute = self._prepare()
        if values is None:
            values = backends.current().read(self._variables)
        return compute(values)

    def _prepare(self) -> Callable[[Sequence[Any]], list[Any]]:
        if self._compute is not None and self._are_means:
            return self._compute
        # Some make their variables when they are first updated.
        present = [v for metric in self._own for v in metric.variables]
        if self._compute is None or len(present) != self._num_present:
            self._num_present = len(present)
            means = _means(self._own)
            self._are_means = means is not None
            if means is not None:
                self._variables, self._compute = means
            else:
                self._variables = present
                self._compute = backends.current().compile_reading(
                    lambda: [metric.result() for metric in self._own], present
                )
        return self._compute


def _means(
    metrics: Sequence[keras.metrics.Metric],
) -> tuple[list[keras.Variable], Callable[[Sequence[Any]], list[Any]]] | None:
    """Divides means on the host; None if not all of them are means.

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

    def compute(values: Sequence[Any]) -> list[Any]:
        following = iter(values)
        return [
            {
                name: _divide_no_nan(next(following), next(following))
                for name in each
            }
            for each in named
        ]

    return variables, compute


def _divide_no_nan(total: np.ndarray, count: np.ndarray) -> float:
    """As `keras.metrics.Mean.result`, to the bit."""
    return float(total / count.astype(total.dtype)) if count else 0.0


def _divide_all(totals: np.ndarray, counts: np.ndarray) -> list[float]:
    """The same for each of several."""
    counts = counts.astype(totals.dtype, copy=False)
    if counts.all():
        return (totals / counts).tolist()
    found = np.zeros(totals.shape, totals.dtype)
    np.divide(totals, counts, out=found, where=counts != 0)
    return found.tolist()


def _flat(named: dict[str, Any]) -> dict[str, Any]:
    """Without groups, as in Keras's `fit`: of equal names its last counts."""
    if not any(isinstance(value, dict) for value in named.values()):
        return named
    found: dict[str, Any] = {}
    for name, value in sorted(named.items()):
        found |= _flat(value) if isinstance(value, dict) else {name: value}
    return found


def _on_host(result: Any) -> Any:
    array = to_numpy(result)
    return float(array) if array.ndim == 0 else array.tolist()


def _is_kerass_own(metric: Any) -> bool:
    # (Those of a compiled model hold others in a way of their own.)
    inner = [*metric._metrics, *getattr(metric, "metrics", ())]
    return type(metric).__module__.startswith("keras.") and all(
        map(_is_kerass_own, inner)
    )


def _held(metric: keras.metrics.Metric) -> list[keras.metrics.Metric]:
    """Those that `compile` was given, or the one."""
    held = metric.metrics if isinstance(metric, CompileMetrics) else None
    return list(held or [metric])


def label(metric: keras.metrics.Metric) -> str:
    """What checkpoints call a metric: that of `compile`, by all it holds."""
    return ",".join(each.name for each in _held(metric))


def described(metrics: Mapping[keras.metrics.Metric, When]) -> dict[str, str]:
    """When each training metric is updated and what it is, by its label.

    Raises:
        ConfigError: two have one name.
    """
    names = [
        name
        for metric in metrics
        for name in dict.fromkeys(each.name for each in _held(metric))
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"Several training metrics are named {twice[0]!r}: their logs and "
            "what checkpoints hold of them would be one. Give each a name of "
            'its own: keras.metrics.MeanSquaredError(name="...").'
        )
    return {
        label(metric): ", ".join(
            [str(when), *(type(each).__name__ for each in _held(metric))]
        )
        for metric, when in metrics.items()
    }


def directions(metrics: Sequence[keras.metrics.Metric]) -> dict[str, str]:
    """Whether less ("min") or more ("max") is better, where that is known."""
    known: dict[str, str] = {}
    for metric in metrics:
        # Keras sets it on its own metrics; users may on theirs.
        direction = getattr(metric, "_direction", None)
        if direction is not None:
            known[metric.name] = "max" if direction == "up" else "min"
    return known
