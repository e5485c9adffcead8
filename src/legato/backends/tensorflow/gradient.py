"""Differentiation of a stateful-looking forward pass on TensorFlow."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from legato.backends.differentiation import (
    Result,
    require_reached,
)
from legato.backends.scope import own_dtype
from legato.backends.tensorflow.reached import reached_handles
from legato.backends.tensorflow.scope import StepScope
from legato.compat import keras_tracing


def value_and_grad(
    forward: Callable[[], Any],
    variables: list[keras.Variable],
    optimizer: keras.optimizers.Optimizer | None = None,
    *,
    as_keras: bool = False,
) -> tuple[Any, list[Any]]:
    """See `Backend.value_and_grad`."""
    if tf.executing_eagerly():
        return _in_a_graph(forward, variables, optimizer)
    around = keras_tracing.current_scope()
    outer = around if isinstance(around, StepScope) else None
    scope = StepScope(parent=outer, losses=True)
    with tf.GradientTape(watch_accessed_variables=False) as tape, scope:
        for variable in variables:
            if keras.backend.is_float_dtype(own_dtype(variable)):
                tape.watch(scope.memory(variable))
        result = Result(forward())
        loss: Any = tf.convert_to_tensor(result.loss)  # it may be a variable
        scaled = loss if optimizer is None else optimizer.scale_loss(loss)
    memories = [variable._value for variable in variables]
    gradients = tape.gradient(scaled, memories)
    reached = reached_handles(
        scaled,
        [
            None if gradient is None else memory.handle
            for memory, gradient in zip(memories, gradients, strict=True)
        ],
    )
    require_reached(variables, reached)
    gradients = [
        (
            gradient
            # Rows of an embedding come as a list of them, the same row
            # perhaps several times; optimizers treat these one by one.
            if as_keras and isinstance(gradient, tf.IndexedSlices)
            else tf.cast(tf.convert_to_tensor(gradient), memory.dtype)
        )
        if is_reached
        else None
        for gradient, memory, is_reached in zip(
            gradients, memories, reached, strict=True
        )
    ]
    return result.like_returned(loss, result.aux), gradients


def _in_a_graph(
    forward: Callable[[], Any],
    variables: list[keras.Variable],
    optimizer: keras.optimizers.Optimizer | None,
) -> tuple[Any, list[Any]]:
    """The same outside of a step.

    In a graph, as there: else conditionals would be Python's, and a gradient
    that is None now might be a zero in a step.
    """
    leaves: list[Any] = []
    returned: list[Any] = []

    def run() -> list[Any]:
        out = value_and_grad(forward, variables, optimizer)
        returned.append(out)
        leaves[:] = keras.tree.flatten(out)
        return [leaf for leaf in leaves if _is_tensor(leaf)]

    with keras_tracing.read_by_conversion():
        tensors = iter(tf.function(run, autograph=False)())
    return keras.tree.pack_sequence_as(
        returned[-1],
        [next(tensors) if _is_tensor(leaf) else leaf for leaf in leaves],
    )


def _is_tensor(leaf: Any) -> bool:
    return tf.is_tensor(leaf) and not isinstance(
        leaf, keras.Variable | tf.Variable
    )
