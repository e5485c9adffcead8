"""What a summary reads of variables: metrics' results and learning rates."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from legato import backends
from legato.compat.keras_rates import rate_schedule, rate_variable
from legato.metrics import Results


class Readings:
    """Reads it as it is, or as it was after a step whose values were kept.

    Args:
        metrics: the training metrics.
        optimizers: by name; "" for a single one.
        are_all: whether summaries read nothing else.

    Attributes:
        results: of the metrics.
        rates: the learning rates, as they are logged.
    """

    def __init__(
        self,
        metrics: Sequence[keras.metrics.Metric],
        optimizers: Mapping[str, keras.optimizers.Optimizer],
        *,
        are_all: bool = True,
    ) -> None:
        self._are_all = are_all
        self.results = Results(metrics)
        self.rates = LearningRates(optimizers)

    def series(
        self, values: Sequence[np.ndarray], times: int
    ) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        """The results and the rates as they were at several times, by name.

        Args:
            values: of `variables` then, `[times, ...]` each.
            times: how many.
        """
        count = len(self.results.variables)
        results = self.results.series(values[:count], times)
        return results, self.rates.series(values[count:])

    @property
    def variables(self) -> list[keras.Variable] | None:
        """On which they depend; None if that is not known.

        That of a metric of the user's is not, nor that of a rate that is a
        function of his.
        """
        rates = self.rates.variables
        known = self._are_all and self.results.are_kerass_own
        if rates is None or not known:
            return None
        return [*self.results.variables, *rates]


class LearningRates:
    """The learning rates of optimizers, by the names of their logs.

    Args:
        optimizers: by name; "" for a single one.
    """

    def __init__(
        self, optimizers: Mapping[str, keras.optimizers.Optimizer]
    ) -> None:
        self._rates = {
            "/".join(["learning_rate", name]).rstrip("/"): _Rate(optimizer)
            for name, optimizer in optimizers.items()
        }

    @property
    def variables(self) -> list[keras.Variable] | None:
        """On which they depend, one for each; None if that is not known."""
        found = [rate.variable for rate in self._rates.values()]
        known = [variable for variable in found if variable is not None]
        return known if len(known) == len(found) else None

    def __call__(self) -> dict[str, float]:
        """The rates."""
        return {name: rate.read() for name, rate in self._rates.items()}

    def series(self, values: Sequence[np.ndarray]) -> dict[str, list[float]]:
        """The rates as they were at several times, by name.

        Args:
            values: of the variables then, `[times]` each.
        """
        pairs = zip(self._rates.items(), values, strict=True)
        return {name: rate.series(each) for (name, rate), each in pairs}


class _Rate:
    """The learning rate of an optimizer.

    A schedule is computed in one call of the device.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self._optimizer = optimizer
        self._schedule: Any = None
        self._compute: Any = None

    @property
    def variable(self) -> keras.Variable | None:
        # (It may be given another rate meanwhile.)
        return rate_variable(self._optimizer)

    def read(self) -> float:
        variable = self.variable
        if variable is None:
            return _to_float(self._rate())
        values = backends.current().read([variable])
        return self.series(np.asarray(values))[0]

    def series(self, values: np.ndarray) -> list[float]:
        """The rates for several values of the variable, `[times]`."""
        schedule = rate_schedule(self._optimizer)
        if schedule is None:
            return values.tolist()
        if schedule is not self._schedule:
            variable = self.variable
            assert variable is not None
            self._schedule = schedule
            self._compute = backends.current().compile_reading(
                self._rate, [variable]
            )
        arrays = map(np.asarray, values)  # (iterating gives numbers)
        return [_to_float(self._compute([array])) for array in arrays]

    def _rate(self) -> Any:
        return keras.ops.convert_to_tensor(self._optimizer.learning_rate)


def _to_float(tensor: Any) -> float:
    return float(np.asarray(keras.ops.convert_to_numpy(tensor)))
