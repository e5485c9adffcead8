"""PyTorch modules inside of Keras models."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import torch

from legato.compat import keras_tracing
from legato.errors import StepError


@contextlib.contextmanager
def scoped_modules() -> Iterator[None]:
    """While a step runs: `TorchModuleWrapper` uses the scope's values.

    A module reads its own parameters, past the Keras variables that stand for
    them, so that autograd would not reach these.
    """
    cls: Any = keras.layers.TorchModuleWrapper
    original = cls.call
    cls.call = keras_tracing.only_here(_call, original)
    try:
        yield
    finally:
        cls.call = original


def _call(
    layer: Any, *args: Any, training: bool | None = None, **kwargs: Any
) -> Any:
    module = layer.module
    buffers = [name for name, _ in module.named_buffers()]
    if buffers:
        raise StepError(
            f"The PyTorch module in the layer {layer.name!r} has buffers "
            f"({', '.join(buffers[:3])}), which are no Keras variables and "
            "would not be part of the run's state. Use Keras's own layer in "
            "its place, such as keras.layers.BatchNormalization."
        )
    variables = {id(v._value): v for v in layer.variables}
    values = {
        name: variables[id(parameter)].value
        for name, parameter in module.named_parameters()
        if id(parameter) in variables
    }
    # As Keras's own `call` does.
    layer.train(training is not False)
    return torch.func.functional_call(module, values, args, kwargs)
