"""Metrics inside a compiled step: updated when they are due, never read."""

import dataclasses
import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import keras

from legato.errors import ConfigError, StepError
from legato.metrics.host import HostMetric
from legato.when import When


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
        self._is_updated = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._metric, name)

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Update the metric with a batch, if it is due at this step."""
        if self.when.over == "batch" and not self._is_updated:
            self._call(self._metric.reset_state)
        self._is_updated = True
        self._call(lambda: self._metric.update_state(*args, **kwargs))

    def _call(self, change: Callable[[], Any]) -> None:
        if self.when.is_always:
            change()
        else:
            self._recorded.append(change)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it would give the result.

        Raises:
            StepError: always.
        """
        raise _not_in_a_step(self._metric.name, "called")

    def result(self) -> Any:
        """Refused: the engine reads results when they are due.

        Raises:
            StepError: always.
        """
        raise _not_in_a_step(self._metric.name, "asked for its result()")

    def reset_state(self) -> None:
        """Refused: the engine resets metrics.

        Raises:
            StepError: always.
        """
        raise _not_in_a_step(self._metric.name, "reset")

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
        # Windows make no difference to when they are due.
        when = dataclasses.replace(metric.when, over="epoch")
        together.setdefault(when, []).extend(metric.take_recorded())
    for when, calls in together.items():
        if calls:

            def update(calls: list[Callable[[], Any]] = calls) -> None:
                for call in calls:
                    call()

            due = keras.ops.convert_to_tensor(when.is_due(step), "bool")
            keras.ops.cond(due, update, lambda: None)


class HostStepMetric:
    """A host metric as a step sees it: what it is given goes to the host.

    Args:
        metric: the metric behind it.

    Attributes:
        name: its name.
        takes_weights: whether its `update_state` has a `sample_weight`.
    """

    def __init__(self, metric: HostMetric) -> None:
        self.name = metric.name
        taken = inspect.signature(metric.update_state).parameters
        self.takes_weights = "sample_weight" in taken
        self._recorded: list[tuple[Any, Any]] = []

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Update the metric with a batch, once that has come to the host."""
        self._recorded.append((args, kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it would give the result.

        Raises:
            StepError: always.
        """
        raise _not_in_a_step(self.name, "called")

    def result(self) -> Any:
        """Refused: the engine reads results when they are due.

        Raises:
            StepError: always.
        """
        raise _not_in_a_step(self.name, "asked for its result()")

    def reset_state(self) -> None:
        """Refused: the engine resets metrics.

        Raises:
            StepError: always.
        """
        raise _not_in_a_step(self.name, "reset")

    def take_recorded(self) -> list[tuple[Any, Any]]:
        """Arguments of the calls of `update_state`, with tensors in them."""
        recorded, self._recorded = self._recorded, []
        return recorded


def _not_in_a_step(name: str, what: str) -> StepError:
    return StepError(
        f"The metric {name!r} was {what} in a step. Only update it there, by "
        "update_state: the engine resets metrics when an epoch or a "
        "validation begins, and reads them for summaries and at its end."
    )


def check_metrics(
    metrics: Any,
    where: str,
    default: When | None,
    *,
    training: bool,
    unique: bool = True,
) -> dict[Any, When | None]:
    """The metrics, and when each is updated; None for never.

    Args:
        metrics: what `build_metrics` returned.
        where: that was, for messages.
        default: when, for those that are returned without saying so.
        training: whether they are those of training.
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
        if isinstance(metric, HostMetric) and training:
            raise ConfigError(
                f"{where} returned the host metric {metric.name!r}: these "
                "measure in validation only. Return it where training=False."
            )
        if not isinstance(metric, keras.metrics.Metric | HostMetric):
            raise ConfigError(
                f"{where} returned {metric!r} among the metrics: it must be a "
                "keras.metrics.Metric or a legato.HostMetric object. Return a "
                "list of these."
            )
        if not metric.name:
            raise ConfigError(
                f"{where} returned a {type(metric).__name__} without a name: "
                "its __init__ must call super().__init__(name=...)."
            )
        if not isinstance(when, When | None):
            raise ConfigError(
                f"{where} returned {when!r} for the metric {metric.name!r}: "
                "it must be legato.Every(steps), legato.Sample(share), or None "
                "for never."
            )
    names = [metric.name for metric, _ in pairs]
    on_host = [m.name for m, _ in pairs if isinstance(m, HostMetric)]
    for name in names:
        if names.count(name) > 1 and (unique or name in on_host):
            raise ConfigError(
                f"{where} returned two metrics named {name!r}: give each one "
                "its own `name`."
            )
    return dict(pairs)
