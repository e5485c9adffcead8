"""Optimizers in a config: which one, its learning rate, what is done to it."""

from typing import Annotated, Any

import pydantic

from legato.config.model import Config
from legato.config.objects import Arguments, check_class, check_object
from legato.errors import ConfigError

_Positive = Annotated[float, pydantic.Field(gt=0)]
_Fraction = Annotated[float, pydantic.Field(ge=0)]

# What each shape has a use for, beside the warm-up.
_USED: dict[str, tuple[str, ...]] = {
    "constant": (),
    "cosine": ("steps", "final"),
    "polynomial": ("steps", "final", "power"),
    "exponential": ("steps", "decay_rate", "staircase"),
    "step": ("boundaries", "factors"),
}
_OF_WARMUP = ("type", "warmup_steps", "warmup_from")


def _check_shape(value: str) -> str:
    if ":" in value:
        return check_object(value)
    if value not in _USED:
        raise ValueError(
            f'must be {", ".join(_USED)}, or "package.module:Class" of a '
            "keras.optimizers.schedules.LearningRateSchedule"
        )
    return value


def _check_optimizer(value: str) -> str:
    return check_class(value, "keras.optimizers", "AdamW")


class ScheduleConfig(Config):
    """How the learning rate changes, for `OptimizerConfig.schedule`.

    All shapes are factors of `learning_rate`, and count updates.

    Attributes:
        type: the shape after the warm-up: "constant", "cosine", "polynomial",
            "exponential" or "step"; or "package.module:Class" of a
            `LearningRateSchedule`, which gives the rate itself.
        warmup_steps: updates in which the rate rises in a straight line to
            where the shape begins; the shape counts from there.
        warmup_from: the factor at the first update of the warm-up.
        steps: of cosine and polynomial: updates until `final` is reached; null
            takes the rest of `trainer.train_steps`. Of exponential: updates
            in which the rate is multiplied by `decay_rate` once.
        final: the factor that cosine and polynomial end with, and stay at.
        power: of polynomial: the exponent; 1 is a straight line.
        decay_rate: of exponential: the factor of each `steps` updates.
        staircase: of exponential: multiply once in `steps` updates, in place of
            a little at each.
        boundaries: of step: the numbers of updates after which another factor
            holds, ascending.
        factors: of step: the factor after each of `boundaries`.
        config: keyword arguments for a class of your own.
    """

    type: Annotated[str, pydantic.AfterValidator(_check_shape)]
    warmup_steps: Annotated[int, pydantic.Field(ge=0)] = 0
    warmup_from: _Fraction = 0.0
    steps: Annotated[int, pydantic.Field(ge=1)] | None = None
    final: _Fraction = 0.0
    power: _Positive = 1.0
    decay_rate: _Positive | None = None
    staircase: bool = False
    boundaries: list[Annotated[int, pydantic.Field(ge=1)]] = pydantic.Field(
        default_factory=list
    )
    factors: list[_Fraction] = pydantic.Field(default_factory=list)
    config: Arguments = pydantic.Field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        """Whether it is a class of the user's."""
        return ":" in self.type

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "ScheduleConfig":
        used = ("config",) if self.is_own else _USED[self.type]
        useless = sorted(self.changed() - {*used, *_OF_WARMUP})
        if useless:
            known = ", ".join((*used, *_OF_WARMUP[1:]))
            raise ValueError(
                f"{', '.join(useless)}: of no use to type {self.type!r}, which "
                f"takes {known}: leave out what it does not take"
            )
        if self.warmup_from and not self.warmup_steps:
            raise ValueError(
                "warmup_from says where the warm-up begins, and there is none: "
                "give warmup_steps, or leave it out"
            )
        if self.type == "exponential" and None in (self.steps, self.decay_rate):
            raise ValueError("exponential needs steps and decay_rate")
        if self.type == "step":
            bounds = self.boundaries
            if len(bounds) != len(self.factors) or not bounds:
                raise ValueError(
                    f"step needs a factor for each of boundaries: there are "
                    f"{len(self.factors)} and {len(bounds)}"
                )
            if bounds != sorted(set(bounds)):
                raise ValueError(f"boundaries must ascend, and are {bounds}")
        return self

    def shape_steps(self, train_steps: int | None) -> int:
        """Updates until the shape ends.

        Args:
            train_steps: the length of the run; None if it is not known.

        Raises:
            ConfigError: it is not known, or the warm-up takes all of it.
        """
        if self.steps is not None:
            return self.steps
        if train_steps is None:
            raise ConfigError(
                f"steps is missing: the length of {self.type!r} can be taken "
                "from trainer.train_steps only, which is not given. Give one "
                "of the two."
            )
        if train_steps <= self.warmup_steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} leave nothing of the "
                f"{train_steps} steps of the run to {self.type!r}. Make it "
                "smaller, or give steps."
            )
        return train_steps - self.warmup_steps


_NAMED = (
    "learning_rate", "weight_decay", "clipnorm", "global_clipnorm",
    "clipvalue", "gradient_accumulation_steps", "ema_momentum",
)  # fmt: skip


class OptimizerConfig(Config):
    """An optimizer, for `Experiment.optimizer`.

    Attributes:
        type: the class: the bare name of one of `keras.optimizers`, such as
            "AdamW", or "package.module:Class".
        learning_rate: the rate, or the one that `schedule` multiplies; null
            takes the default of the class.
        schedule: how the rate changes; null for a constant one.
        weight_decay: the share of each weight, times the rate, that is taken
            away at each update; null takes the default of the class.
        exclude_from_weight_decay: regular expressions; a variable in whose
            name one is found, such as "bias" or "gamma", does not decay.
        clipnorm: the largest norm of the gradient of each variable.
        global_clipnorm: the largest norm of all gradients together.
        clipvalue: the largest absolute value in a gradient. Only one of the
            three may be given.
        ema_momentum: keep an average of the weights, of which so large a
            part stays at each update, such as 0.999; null keeps none. The run
            ends with the average as its weights, as in Keras.
        gradient_accumulation_steps: update the weights once in so many steps,
            with the mean of their gradients; null for each step.
        loss_scaling: scale the loss so that float16 gradients do not vanish,
            and skip steps whose gradients overflow; null does so where
            `trainer.precision` is "mixed_float16".
        config: further keyword arguments for the class, such as `beta_1`.
    """

    type: Annotated[str, pydantic.AfterValidator(_check_optimizer)]
    learning_rate: _Fraction | None = None
    schedule: ScheduleConfig | None = None
    weight_decay: _Fraction | None = None
    exclude_from_weight_decay: list[str] = pydantic.Field(default_factory=list)
    clipnorm: _Positive | None = None
    global_clipnorm: _Positive | None = None
    clipvalue: _Positive | None = None
    ema_momentum: Annotated[float, pydantic.Field(ge=0, le=1)] | None = None
    gradient_accumulation_steps: Annotated[int, pydantic.Field(ge=2)] | None = (
        None
    )
    loss_scaling: bool | None = None
    config: Arguments = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "OptimizerConfig":
        clips = ("clipnorm", "global_clipnorm", "clipvalue")
        given = [name for name in clips if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: give one")
        twice = sorted({*_NAMED, "use_ema"} & self.config.keys())
        if twice:
            raise ValueError(
                f"config holds {', '.join(twice)}: write it beside config "
                "(use_ema: ema_momentum), not in it"
            )
        if self.schedule is not None:
            own = self.schedule.is_own
            if own and self.learning_rate is not None:
                raise ValueError(
                    f"learning_rate is given, and so is the schedule "
                    f"{self.schedule.type}, which gives the rate itself: put "
                    "it into schedule.config"
                )
            if not own and self.learning_rate is None:
                raise ValueError(
                    "schedule changes learning_rate, which is missing: give it"
                )
        if self.exclude_from_weight_decay and self.weight_decay == 0:
            raise ValueError(
                "exclude_from_weight_decay excludes from what weight_decay=0 "
                "does not do: leave one of the two out"
            )
        return self

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the class, but `config` and the schedule."""
        given = {
            name: value
            for name in _NAMED
            if (value := getattr(self, name)) is not None
        }
        if self.ema_momentum is not None:
            given["use_ema"] = True
        return given
