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

    def __call__(
        self, values: Sequence[np.ndarray] | None = None
    ) -> dict[str, float]:
        """The rates.

        Args:
            values: of the variables; None for those that they hold.
        """
        if values is not None:
            pairs = zip(self._rates.items(), values, strict=True)
            return {name: rate.read(value) for (name, rate), value in pairs}
        return {name: rate.read(None) for name, rate in self._rates.items()}


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

    def read(self, value: np.ndarray | None) -> float:
        variable, schedule = self.variable, rate_schedule(self._optimizer)
        if variable is None:
            return _to_float(self._rate())
        if value is None:
            (value,) = backends.current().read([variable])
        if schedule is None:
            return float(value)
        if schedule is not self._schedule:
            self._schedule = schedule
            self._compute = backends.current().compile_reading(
                self._rate, [variable]
            )
        return _to_float(self._compute([value]))

    def _rate(self) -> Any:
        return keras.ops.convert_to_tensor(self._optimizer.learning_rate)


def _to_float(tensor: Any) -> float:
    return float(np.asarray(keras.ops.convert_to_numpy(tensor)))
