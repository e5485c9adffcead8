"""Learning-rate schedules and optimizers, as a config describes them."""

import warnings
from typing import Any

import keras

from legato.config import ScheduleConfig
from legato.errors import LegatoWarning
from legato.task import Task

_Schedule = keras.optimizers.schedules.LearningRateSchedule


@keras.saving.register_keras_serializable(package="legato")
class Warmup(_Schedule):
    """A rate that rises in a straight line, and then follows a schedule.

    Update number `n` (from 0) has the rate
    `first * (warmup_from + (1 - warmup_from) * n / warmup_steps)` up to
    `warmup_steps`, where `first` is the schedule's at its beginning, and
    `schedule(n - warmup_steps)` from there on.

    Args:
        schedule: the rate after the warm-up: a `LearningRateSchedule`, or a
            number for a constant one.
        warmup_steps: updates in the warm-up; 1 or more.
        warmup_from: the share of the rate that the first update has.

    Raises:
        ValueError: if `warmup_steps` is below 1.
    """

    def __init__(
        self,
        schedule: _Schedule | float,
        warmup_steps: int,
        warmup_from: float = 0.0,
    ) -> None:
        if warmup_steps < 1:
            raise ValueError(
                f"warmup_steps={warmup_steps}: it must be 1 or more. Without "
                "a warm-up, use the schedule itself."
            )
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.warmup_from = warmup_from

    def __call__(self, step: Any) -> Any:
        """The rate of an update.

        Args:
            step: the number of updates before it; an integer scalar.
        """
        step = keras.ops.convert_to_tensor(step)
        after = keras.ops.maximum(step - self.warmup_steps, 0)
        if isinstance(self.schedule, _Schedule):
            first = self.schedule(keras.ops.zeros_like(step))
            rate = self.schedule(after)
        else:
            first = rate = keras.ops.convert_to_tensor(self.schedule, "float32")
        done = keras.ops.cast(step, "float32") / self.warmup_steps
        rising = first * (self.warmup_from + (1 - self.warmup_from) * done)
        return keras.ops.where(step < self.warmup_steps, rising, rate)

    def get_config(self) -> dict[str, Any]:
        """The arguments, with the schedule in serialised form."""
        schedule: Any = self.schedule
        if isinstance(schedule, _Schedule):
            schedule = keras.optimizers.schedules.serialize(schedule)
        return {
            "schedule": schedule,
            "warmup_steps": self.warmup_steps,
            "warmup_from": self.warmup_from,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Warmup":
        """The reverse of `get_config`."""
        schedule = config["schedule"]
        if isinstance(schedule, dict):
            schedule = keras.optimizers.schedules.deserialize(schedule)
        return cls(**{**config, "schedule": schedule})


def make_schedule(
    config: ScheduleConfig, rate: float, train_steps: int | None
) -> _Schedule | float:
    """Make a schedule of one of the named shapes.

    Args:
        config: which.
        rate: the learning rate that it multiplies.
        train_steps: the length of the run, for shapes that end with it; None
            if it is not known.

    Raises:
        ConfigError: the length of the shape is not known.
    """
    shapes = keras.optimizers.schedules
    match config.type:
        case "constant":
            made: _Schedule | float = rate
        case "cosine":
            made = shapes.CosineDecay(
                rate, config.shape_steps(train_steps), alpha=config.final
            )
        case "polynomial":
            made = shapes.PolynomialDecay(
                rate,
                config.shape_steps(train_steps),
                end_learning_rate=rate * config.final,
                power=config.power,
            )
        case "exponential":
            made = shapes.ExponentialDecay(
                rate,
                config.shape_steps(train_steps),
                config.decay_rate,
                staircase=config.staircase,
            )
        case _:
            # Keras's boundaries are the last updates of the rate before.
            made = shapes.PiecewiseConstantDecay(
                [boundary - 1 for boundary in config.boundaries],
                [rate, *(rate * factor for factor in config.factors)],
            )
    return add_warmup(config, made)


def add_warmup(
    config: ScheduleConfig, schedule: _Schedule | float
) -> _Schedule | float:
    """The schedule, after the warm-up if there is one."""
    if not config.warmup_steps:
        return schedule
    return Warmup(schedule, config.warmup_steps, config.warmup_from)


def own_step_scales(
    task_type: type[Task],
    precision: str | None,
    optimizer: keras.optimizers.Optimizer,
) -> bool:
    """Whether the optimizer is to be wrapped, so that losses are scaled.

    As `compile` does it for float16. A `train_step` of the user's own may not
    give the optimizer to `value_and_grad`, and would then apply gradients of
    the unscaled loss as if they were of the scaled one: a warning says so.

    Args:
        task_type: whose step it is.
        precision: see `TrainerConfig`.
        optimizer: as it was built.
    """
    if precision != "mixed_float16":
        return False
    if (
        isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        or optimizer.loss_scale_factor is not None
    ):
        return False
    if task_type.train_step is Task.train_step:
        return True
    warnings.warn(
        f'precision="mixed_float16": gradients of {task_type.__name__}, which '
        "has a train_step of its own, may vanish. If it gives the optimizer "
        "to legato.value_and_grad, return a "
        "keras.optimizers.LossScaleOptimizer from build_optimizer (in a "
        "config: optimizer.loss_scaling=true).",
        LegatoWarning,
        stacklevel=2,
    )
    return False
