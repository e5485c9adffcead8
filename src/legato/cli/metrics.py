"""Metrics that the command line names."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from legato.config import nearest
from legato.errors import ConfigError
from legato.experiment import import_object

if TYPE_CHECKING:
    import keras

    from legato.metrics import HostMetric


def build_metric(name: str) -> "keras.metrics.Metric | HostMetric":
    """Makes a metric; imports Keras, and the module that the name says.

    Args:
        name: as in `compile(metrics=[name])`: "accuracy" (of the kind that
            suits labels and outputs), or what is in `keras.metrics`, such as
            "AUC" or "mse". Or "package.module:Name": a metric (of Keras or a
            `legato.HostMetric`), its class, a function without arguments that
            makes one, or a function of labels and outputs, whose mean is taken.

    Raises:
        ConfigError: if there is no such metric, or it needs arguments.
    """
    import keras

    from legato.metrics import HostMetric

    where = f"--metric {name}"
    kinds = (keras.metrics.Metric, HostMetric)
    if ":" in name:
        found = import_object(name, where)
        if callable(found) and not isinstance(found, kinds):
            if _takes_labels_and_outputs(found):
                return keras.metrics.MeanMetricWrapper(
                    found, name=found.__name__
                )
            found = _make(found, where)
    elif name in ("accuracy", "acc"):
        return keras.metrics.MeanMetricWrapper(_accuracy, name=name)
    else:
        found = _make(lambda: _of_keras(name, where), where)
        if not isinstance(found, keras.metrics.Metric):
            found = keras.metrics.MeanMetricWrapper(found)
        found.name = name  # as `compile` calls it
    if not isinstance(found, kinds):
        raise ConfigError(
            f"{where}: is a {type(found).__name__}: it must be a "
            "keras.metrics.Metric or a legato.HostMetric, or a function or "
            "class that makes one."
        )
    return found


def _make(maker: Callable[[], Any], where: str) -> Any:
    try:
        return maker()
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: could not be made: {error}. Where it needs arguments, "
            "name a function without any that makes it: package.module:name."
        ) from error


def _of_keras(name: str, where: str) -> Any:
    import keras

    try:
        found = keras.metrics.get(name)
    except ValueError:
        found = None
    # These take values, not labels and outputs.
    of_values = (keras.metrics.Metric, keras.metrics.Mean, keras.metrics.Sum)
    if found is not None and type(found) not in of_values:
        return found
    classes = [
        each
        for each in dir(keras.metrics)
        if isinstance(getattr(keras.metrics, each), type)
        and each != "Accuracy"  # of labels as outputs: hardly what is meant
    ]
    meant = nearest(name, ["accuracy", "mse", "mae", *classes])
    raise ConfigError(
        f"{where}: keras.metrics has no metric {name!r}"
        + (f" - did you mean {meant!r}? " if meant else ". ")
        + "One of yours is named package.module:Name."
    )


def _takes_labels_and_outputs(function: Any) -> bool:
    if inspect.isclass(function):
        return False
    try:
        signature = inspect.signature(function)
    except ValueError:  # some that are written in C have none
        return False
    required = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind
        in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) == 2


def _accuracy(labels: Any, outputs: Any) -> Any:
    """The accuracy that `compile(metrics=["accuracy"])` means."""
    import keras

    if outputs.shape[-1] == 1:
        return keras.metrics.binary_accuracy(labels, outputs)
    if len(labels.shape) < len(outputs.shape) or labels.shape[-1] == 1:
        return keras.metrics.sparse_categorical_accuracy(labels, outputs)
    return keras.metrics.categorical_accuracy(labels, outputs)
