"""How a run is driven: length, cadences, policies."""

from typing import Annotated, Any, Literal

import pydantic

from legato.config.duration import RULE, parse_duration, seconds_of
from legato.config.initial import InitConfig, from_path
from legato.config.model import Config
from legato.config.sinks import check_names, require_known
from legato.errors import ConfigError
from legato.when import Every, When, as_whole, read_when


def _whole(minimum: int, or_else: str = "") -> pydantic.BeforeValidator:
    """A whole number of at least `minimum`; `or_else` names the remedy."""

    def check(value: Any) -> Any:
        if value is None:
            return None
        number = as_whole(value)
        if number is None or number < minimum:
            raise ValueError(
                f"must be a whole number of at least {minimum}{or_else}"
            )
        return number

    return pydantic.BeforeValidator(check)


def _check_validation_interval(value: Any) -> Any:
    number = as_whole(value)
    if value is None or value == "epoch":
        return value
    if number is None or number < 1:
        raise ValueError(
            'must be a number of steps of at least 1, "epoch", or null (None) '
            "for never"
        )
    return number


def _check_validation_freq(value: Any) -> Any:
    several = isinstance(value, list | tuple | set)
    numbers = [as_whole(each) for each in (value if several else [value])]
    if not numbers or any(n is None or n < 1 for n in numbers):
        raise ValueError(
            "must be a whole number of epochs of at least 1, or a list of the "
            "epochs (from 1) after which to validate"
        )
    return sorted(numbers) if several else numbers[0]  # type: ignore[type-var]


def _check_checkpoint_interval(value: Any) -> Any:
    number = as_whole(value)
    if number is not None and number >= 1:
        return number
    if isinstance(value, str):
        return value if value == "epoch" else _check_duration(value)
    raise ValueError(
        'must be a number of steps of at least 1, "epoch", or a duration such '
        'as "10min"; a run without checkpoints could not be resumed'
    )


def _check_duration(value: Any) -> Any:
    if not isinstance(value, str) or seconds_of(value) is None:
        raise ValueError(RULE)
    return value


def _check_max_time(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value if value is None else _check_duration(value)
    seconds = isinstance(value, int | float) and not isinstance(value, bool)
    if not seconds or not 0 < value < float("inf"):
        raise ValueError(f"{RULE}, or a number of seconds above zero")
    return float(value)


def _check_train_metrics(value: Any) -> Any:
    if not isinstance(value, dict) or not all(
        isinstance(name, str) for name in value
    ):
        raise ValueError(
            "must be names of metrics, and when each is updated: "
            "{accuracy: 50, auc: null}"
        )
    return {name: _plain_when(name, when) for name, when in value.items()}


def _plain_when(name: str, value: Any) -> dict[str, Any] | None:
    """As it is written to `config.yaml`."""
    try:
        when = read_when(value)
    except ConfigError as error:
        raise ValueError(f"{name}: {error}") from None
    if when is None:
        return None
    plain: dict[str, Any] = {"over": when.over}
    if isinstance(when, Every):
        return {"every": when.steps, **plain}
    return {"sample": when.share, "seed": when.seed, **plain}


MAX_SHAPES = 32
"""The default of `TrainerConfig.max_batch_shapes`."""


class TrainerConfig(Config):
    """How a run is driven; the same in Python and in YAML.

    Attributes:
        train_steps: the length of the run in steps (completed updates).
        epochs: the length of the run in passes over the training data; give
            this or `train_steps`.
        initial_epoch: the number (from 0) of the first epoch; `epochs` counts
            those before it.
        steps_per_epoch: steps in an epoch, where that is not a pass over the
            data; the data go on from one epoch to the next.
        seed: the seed of everything random in the run.
        init_from: weights that a run begins with, after `Task.initialize`: a
            path, or what is in `InitConfig`. Read only where there is nothing
            to resume. null (None) for none.
        validation_interval: steps between validations, or "epoch" for one
            after each epoch, or None for none.
        validation_freq: where `validation_interval` is "epoch": validate
            after each so many epochs, or a list of the epochs (from 1) to
            validate after.
        validation_steps: batches in one validation; None takes the whole
            split.
        validation_weights: what is validated: the model as it is ("model"), or
            with the averages that its optimizer keeps ("average"), which
            training does not see.
        checkpoint_interval: steps between checkpoints, or "epoch", or a
            duration such as "10min".
        keep_last: how many of the newest checkpoints are kept; None keeps
            all.
        keep_every: checkpoints whose step is a multiple of this many steps
            are kept for good; None keeps none in this way.
        checkpoint_timeout: seconds after which training fails when no
            checkpoint could be written.
        summary_interval: steps between summaries; 0 for none.
        sinks: where summaries go, beside `metrics.jsonl`: "tensorboard",
            "csv", or what installed packages offer by entry points of the
            group `legato.sinks`.
        train_metrics_interval: steps between updates of the training metrics
            of which `build_metrics` says nothing else; 0 leaves all out of
            the compiled step that `train_metrics` does not name.
        train_metrics: when single ones are updated, by their names, where
            `build_metrics` does not say it in the way that is wanted:
            `legato.Every(50)` or 50, `legato.Sample(0.02)`, or None for
            never; in YAML `{auc: {every: 50, over: summary}, top3: null}`.
        steps_per_loop: at most this many steps run in one device call; None
            lets the engine choose. It does not change any bits.
        max_batch_shapes: for how many shapes of batches a step may be
            compiled, which takes time and memory for each; a batch of one
            more is an error. Eager steps on PyTorch are not compiled, and
            have no limit.
        precision: the precision of layers: "float32", or "mixed_bfloat16" or
            "mixed_float16", in which they compute in half precision and keep
            their weights in single; null (None) leaves the program's own.
        torch_compile: on PyTorch and TensorFlow, whether the steps are
            compiled (by `torch.compile`, by XLA): several times as fast, after
            a compilation of some seconds; "auto" compiles runs of 5,000 steps
            or more, where the step allows it and gains by it. Chosen when a
            run begins, and kept. False makes PyTorch run Python in every
            step, for a debugger or for prints. JAX compiles always.
        best_metric: the log that tells the best checkpoint, as it appears in
            an epoch's logs, such as "val_accuracy", or in a group of them:
            "val_coco/AP" or "val_coco.AP"; None keeps no best.
        best_mode: whether less ("min") or more ("max") of `best_metric` is
            better; "auto" goes by its name and its metric.
        exact: what to do about something that keeps resuming from being
            exact: refuse ("strict"), warn once ("warn"), or nothing ("off").
        resume: "auto" resumes if there is something to resume, "must" refuses
            to start anew, "never" refuses a used directory, and "override"
            resumes with this program's optimizer and loss where they differ.
        nonfinite_loss: "error" stops at a loss that is NaN or infinite and
            "warn" goes on; None is "error", but "warn" where a
            LossScaleOptimizer will skip the step.
        check_numerics: look at every batch on the host, before it is trained
            or validated on, for values that are NaN or infinite and labels
            out of range; the error names the example. Costs a pass over the
            batch.
        loss_upper_bound: a loss above it is as bad as one that is not finite;
            None for no bound.
        recovery_max_trials: how often the run goes back to a checkpoint and
            skips the steps that spoilt the loss, before it gives up; 0 for
            never.
        recovery_begin_steps: the bound holds only after so many steps.
        max_time: the longest that this process may train, as a duration or in
            seconds; after it training ends with everything saved and status
            75.
        progress: how progress is shown: a live bar ("rich"), a line now and
            then ("plain"), nothing ("none"), or by the terminal ("auto").
    """

    train_steps: Annotated[int | None, _whole(1)] = None
    epochs: Annotated[int | None, _whole(1)] = None
    initial_epoch: Annotated[int, _whole(0)] = 0
    steps_per_epoch: Annotated[
        int | None, _whole(1, ", or null (None) for a pass over the data")
    ] = None
    seed: Annotated[int, _whole(0)] = 0
    init_from: Annotated[
        InitConfig | None, pydantic.BeforeValidator(from_path)
    ] = None
    validation_interval: Annotated[
        int | Literal["epoch"] | None,
        pydantic.PlainValidator(_check_validation_interval),
    ] = "epoch"
    validation_freq: Annotated[
        int | list[int], pydantic.PlainValidator(_check_validation_freq)
    ] = 1
    validation_steps: Annotated[
        int | None, _whole(1, ", or null (None) for the whole split")
    ] = None
    validation_weights: Literal["model", "average"] = "model"
    checkpoint_interval: Annotated[
        int | str, pydantic.PlainValidator(_check_checkpoint_interval)
    ] = "epoch"
    keep_last: Annotated[
        int | None, _whole(1, ", or null (None) to keep all")
    ] = 3
    keep_every: Annotated[
        int | None, _whole(1, ", or null (None) to keep none this way")
    ] = None
    checkpoint_timeout: Annotated[float, pydantic.Field(gt=0)] = 600.0
    summary_interval: Annotated[int, _whole(0, " (0 for none)")] = 100
    sinks: Annotated[list[str], pydantic.PlainValidator(check_names)] = (
        pydantic.Field(default_factory=lambda: ["tensorboard"])
    )
    train_metrics_interval: Annotated[int, _whole(0, " (0 for off)")] = 1
    train_metrics: Annotated[
        dict[str, Any], pydantic.PlainValidator(_check_train_metrics)
    ] = pydantic.Field(default_factory=dict)
    steps_per_loop: Annotated[
        int | None, _whole(1, ", or null (None) to let the engine choose")
    ] = None
    max_batch_shapes: Annotated[int, _whole(1)] = MAX_SHAPES
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] | None = (
        None
    )
    torch_compile: bool | Literal["auto"] = "auto"
    best_metric: str | None = None
    best_mode: Literal["min", "max", "auto"] = "auto"
    exact: Literal["strict", "warn", "off"] = "warn"
    resume: Literal["auto", "must", "never", "override"] = "auto"
    nonfinite_loss: Literal["error", "warn"] | None = None
    check_numerics: bool = False
    loss_upper_bound: Annotated[
        float | None, pydantic.Field(allow_inf_nan=False)
    ] = None
    recovery_max_trials: Annotated[int, _whole(0, " (0 for never)")] = 0
    recovery_begin_steps: Annotated[int, _whole(0)] = 0
    max_time: Annotated[
        str | float | None, pydantic.PlainValidator(_check_max_time)
    ] = None
    progress: Literal["auto", "rich", "plain", "none"] = "auto"

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> "TrainerConfig":
        if self.train_steps is not None and self.epochs is not None:
            raise ValueError(
                f"train_steps={self.train_steps} and epochs={self.epochs} are "
                "both given: give one, and set the other to null (None)"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _recovers_from_something(self) -> "TrainerConfig":
        if self.recovery_begin_steps and self.loss_upper_bound is None:
            raise ValueError(
                f"recovery_begin_steps={self.recovery_begin_steps} says from "
                "where on loss_upper_bound holds, which is not given: give "
                "it, or leave both out"
            )
        if (
            self.recovery_max_trials
            and self.loss_upper_bound is None
            and self.nonfinite_loss == "warn"
        ):
            raise ValueError(
                f"recovery_max_trials={self.recovery_max_trials} has nothing "
                'to recover from: nonfinite_loss="warn" goes on, and no '
                "loss_upper_bound is given"
            )
        return self

    @property
    def trains_metrics(self) -> bool:
        """Whether any training metric may be updated."""
        return self.train_metrics_interval > 0 or any(
            when is not None for when in self.train_metrics.values()
        )

    def choose_when(self, name: str, default: When | None) -> When | None:
        """When a training metric is updated; None for never.

        Args:
            name: of the metric.
            default: when, if this config does not name it.
        """
        if name not in self.train_metrics:
            return default
        return read_when(self.train_metrics[name])

    @property
    def checkpoint_seconds(self) -> float | None:
        """Seconds between checkpoints, where the interval is a duration."""
        interval = self.checkpoint_interval
        if isinstance(interval, int) or interval == "epoch":
            return None
        return parse_duration(interval)

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        if isinstance(self.max_time, str):
            return parse_duration(self.max_time)
        return self.max_time

    def require_length(self) -> None:
        """Checks that the run has an end; evaluation alone needs none.

        Raises:
            ConfigError: if neither `train_steps` nor `epochs` is given.
        """
        if self.train_steps is None and self.epochs is None:
            raise ConfigError(
                "TrainerConfig: the length of the run is missing: give "
                "train_steps or epochs."
            )

    def require_sinks(self) -> None:
        """Checks that there are such sinks; evaluation needs none.

        Raises:
            ConfigError: if one of `sinks` is not known.
        """
        require_known(self.sinks)
