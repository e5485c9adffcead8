"""Where the learning rate of an optimizer comes from.

Private names of Keras's optimizers are touched here: the public ones compute
the rate.
"""

from typing import Any

import keras


def rate_variable(
    optimizer: keras.optimizers.Optimizer,
) -> keras.Variable | None:
    """On which the learning rate depends alone; None if that is not known.

    It is the rate itself, or the count of which a schedule is a function.
    """
    own: Any = _innermost(optimizer)
    if isinstance(own._learning_rate, keras.Variable):
        return own._learning_rate
    schedule = keras.optimizers.schedules.LearningRateSchedule
    return own._iterations if isinstance(own._learning_rate, schedule) else None


def rate_schedule(optimizer: keras.optimizers.Optimizer) -> Any:
    """The schedule or function that gives the rate; None if nothing does."""
    own: Any = _innermost(optimizer)
    rate = own._learning_rate
    return None if isinstance(rate, keras.Variable) else rate


def _innermost(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.Optimizer:
    """The one that is wrapped, if any is: it has the rate."""
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer
