"""Metrics that are measured in NumPy on the host, beside the device."""

import abc
import re
from typing import Any

import numpy as np

from legato.errors import ConfigError


def to_numpy(value: Any) -> np.ndarray:
    """An array of NumPy's own types: bfloat16 and the like become float32."""
    array = np.asarray(value)
    is_foreign = array.dtype.kind == "V" and "float" in array.dtype.name
    return array.astype(np.float32) if is_foreign else array


class HostMetric(abc.ABC):
    """A metric of validation that runs on the host.

    Its `update_state` is called from a background thread, batch by batch in
    their order, while the device goes on with the next ones. In
    `Task.validation_step` it is used as any other metric: what it is given
    there as tensors arrives as NumPy arrays.

    Args:
        name: of the metric; None makes one from the name of the class.

    Attributes:
        name: of the metric.

    Raises:
        ConfigError: the name is empty or not a str.
    """

    name = ""  # where a class of the user's forgets to call `__init__`

    def __init__(self, name: str | None = None) -> None:
        if name is None:
            words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__)
            name = words.lower().strip("_")
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"{type(self).__name__}(name={name!r}): it must be a str that "
                "is not empty, or None."
            )
        self.name = name

    @abc.abstractmethod
    def update_state(self, labels: Any, outputs: Any) -> None:
        """Take a batch.

        An argument `sample_weight` may be added: `legato.fit` and
        `legato.evaluate` then pass the weights of the data, if there are any.

        Args:
            labels: of the batch, in the structure in which the step passed
                them, with NumPy arrays of shape `[batch, ...]` as leaves;
                also of strings, dates and objects, if the data hold any.
            outputs: the model's for these, likewise.
        """

    @abc.abstractmethod
    def result(self) -> dict[str, Any]:
        """What was measured since the last reset; resets nothing.

        Returns:
            Floats by name, which become logs. A dict among the values is a
            group of its own: a sub-directory of summaries.
        """

    @abc.abstractmethod
    def reset_state(self) -> None:
        """Forget all batches; called before each validation.

        Nothing of a host metric is saved: what it keeps over this, such as a
        random generator, is another one after a run was resumed. The engine
        names what it notices.
        """
