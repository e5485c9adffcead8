"""The backends: `protocol` says what each must do, a package does it.

Nothing above this package knows which backend runs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from legato.backends.differentiation import require_variables
from legato.backends.protocol import (
    Backend,
    Compilation,
    CompiledLoop,
    Fetch,
    Keeping,
    LoopMode,
    Step,
)
from legato.errors import BackendError

__all__ = [
    "Backend",
    "Compilation",
    "CompiledLoop",
    "Fetch",
    "Keeping",
    "LoopMode",
    "Step",
    "current",
    "require_variables",
    "value_and_grad",
]


@functools.cache
def current() -> Backend:
    """The engine's side of the Keras backend that is active.

    Raises:
        BackendError: legato does not support it.
    """
    match keras.config.backend():
        case "jax":
            from legato.backends.jax import JaxBackend

            return JaxBackend()
        case "tensorflow":
            from legato.backends.tensorflow import TensorFlowBackend

            return TensorFlowBackend()
        case "torch":
            from legato.backends.torch import TorchBackend

            return TorchBackend()
        case name:
            raise BackendError(
                f'The Keras backend is "{name}": legato trains on "jax", '
                '"tensorflow" and "torch". Set the environment variable '
                "KERAS_BACKEND to one of them before Keras is imported."
            )


def value_and_grad(
    forward: Callable[[], Any],
    variables: Sequence[keras.Variable],
    optimizer: keras.optimizers.Optimizer | None = None,
) -> tuple[Any, list[Any]]:
    """Differentiate a computation of a loss with respect to variables.

    For use in `Task.train_step`; the same on every backend. What `forward`
    assigns (batch statistics, seeds) is kept.

    Args:
        forward: computes a scalar loss from the variables, and returns it, or
            returns `(loss, aux)` with any nested `aux`.
        variables: what to differentiate by; any subset of the variables.
        optimizer: the one that will apply the gradients. If it scales losses
            (`LossScaleOptimizer`, `loss_scale_factor`), the gradients are
            those of the scaled loss, as its `apply` expects.

    Returns:
        `(loss, gradients)`, or `((loss, aux), gradients)` where `forward`
        returned a pair. The loss is unscaled. Gradients are in the order of
        `variables`, each of its variable's shape and dtype; None for a
        variable that the loss does not reach.

    Raises:
        StepError: the loss is not a scalar, no variable is given, or the loss
            reaches none of them.
    """
    given = require_variables(variables)
    return current().value_and_grad(forward, given, optimizer)
