"""What a Task builds, checked before anything is trained."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from legato import restoring
from legato.checkpoint import Checkpoint
from legato.compat.keras_names import fresh_names
from legato.compat.keras_seeds import set_random_seed
from legato.config import TrainerConfig, nearest
from legato.data import DataSource, InputChecks, task_source
from legato.errors import ConfigError
from legato.evaluation import Evaluator
from legato.identity import describe_program
from legato.metrics import check_metrics, directions
from legato.optimizers import own_step_scales
from legato.readings import Readings
from legato.task import ModelGroup, OptimizerGroup, Optimizers, Task
from legato.types import JSON, LogStyle
from legato.when import Every, When


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a Task.

    Attributes:
        task: whose parts they are.
        model: what `build_model` returned.
        whole: all models as one, with `optimizer`, for callbacks.
        optimizer: what `build_optimizer` returned.
        optimizers: the same by name; "" for a single one.
        metrics: the training metrics, and when each is updated; empty where
            they are off.
        source: the training data.
        checks: of the training data.
        evaluator: of the validation split; None if there is none.
        program: what the Task and the optimizers are, to compare runs by.
        initial_rates: the learning rates before anything was trained.
    """

    task: Task
    model: Any
    whole: keras.Model
    optimizer: Optimizers
    optimizers: dict[str, keras.optimizers.Optimizer]
    metrics: dict[keras.metrics.Metric, When]
    source: DataSource
    checks: InputChecks
    evaluator: Evaluator | None
    program: dict[str, JSON]
    initial_rates: dict[str, float]

    def all_metrics(self) -> list[Any]:
        """Those of training, and those of validation."""
        return [
            *self.metrics,
            *(self.evaluator.metrics if self.evaluator else ()),
        ]

    def that_may_be_inexact(self) -> list[Any]:
        """The data, those of validation, and what it measures on the host."""
        if self.evaluator is None:
            return [self.source]
        return [self.source, self.evaluator.source, self.evaluator]

    def directions(self) -> dict[str, str]:
        """Whether less or more is better, by log, where that is known."""
        validation = self.evaluator.on_device if self.evaluator else []
        found = {self.task.loss: "min"}
        found |= directions([*self.metrics, *validation])
        return found | {f"val_{name}": way for name, way in found.items()}

    def readings(self, manager: Any = None) -> Readings:
        """What summaries read.

        Args:
            manager: of the user's, which writes them; it may read anything.
        """
        return Readings(
            list(self.metrics), self.optimizers, are_all=manager is None
        )

    def scales_loss(self) -> bool:
        """Whether a LossScaleOptimizer skips steps that overflow."""
        return any(
            isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
            for optimizer in self.optimizers.values()
        )

    @contextlib.contextmanager
    def measured(self, weights: str) -> Iterator[None]:
        """Around a validation: what it must leave as it is, and sees.

        Args:
            weights: "model" or "average"; see `TrainerConfig`.
        """
        with restoring.kept(self.shared_variables()), self.averaged(weights):
            yield

    def averaged(
        self, weights: str, checkpoint: Checkpoint | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """See `restoring.averaged`."""
        return restoring.averaged(
            weights, self.model, self.optimizer, checkpoint
        )

    def shared_variables(self) -> list[keras.Variable]:
        """Those of metrics that training and validation both use.

        A compiled model's are: validation must leave them as they are, for
        the epoch that they count has not been read yet.
        """
        validation = self.evaluator.on_device if self.evaluator else []
        training = {id(v) for metric in self.metrics for v in metric.variables}
        return [
            variable
            for metric in validation
            for variable in metric.variables
            if id(variable) in training
        ]


def build_parts(task: Task, config: TrainerConfig) -> Parts:
    """Build everything that a Task defines.

    Raises:
        ConfigError: a method returned something else than it must.
        DataError: the data are wrong.
    """
    if task.order_seed is None:
        # Everything random that follows is a function of the seed.
        set_random_seed(config.seed)
    with precision(config.precision):
        return _build_parts(task, config)


@contextlib.contextmanager
def precision(name: str | None) -> Iterator[None]:
    """While active, layers are made with this dtype policy.

    Args:
        name: "float32", "mixed_bfloat16" or "mixed_float16"; None leaves the
            program's own.
    """
    if name is None:
        yield
        return
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _build_parts(task: Task, config: TrainerConfig) -> Parts:
    name = type(task).__name__
    model = task.build_model()
    models = list(model.values()) if isinstance(model, dict) else [model]
    if not models or not all(isinstance(m, keras.Model) for m in models):
        raise ConfigError(
            f"{name}.build_model returned {model!r}: it must return a "
            "keras.Model, or a dict of them."
        )
    optimizer, optimizers = _build_optimizers(task, config)
    _check_averages(config, optimizers.values())
    whole: Any = ModelGroup(model) if isinstance(model, dict) else model
    # Callbacks find the learning rate at `model.optimizer`.
    whole.optimizer = (
        OptimizerGroup(list(optimizers.values()))
        if isinstance(optimizer, dict)
        else optimizer
    )
    metrics = _build_train_metrics(task, config)
    clashes = task.loss in {metric.name for metric in metrics}
    if clashes and task.train_logs is LogStyle.MEANS:
        raise ConfigError(
            f"{name}.build_metrics returned a metric named {task.loss!r}, "
            "which is the name of the loss. Give it another `name`."
        )
    source = _build_source(task, "train", config.steps_per_epoch)
    if source is None:
        raise ConfigError(
            f'{name}.build_inputs("train") returned None: give the data to '
            "train on."
        )
    return Parts(
        task=task,
        model=model,
        whole=whole,
        optimizer=optimizer,
        optimizers=optimizers,
        metrics=metrics,
        source=source,
        checks=_build_checks(task, source, "The training data"),
        evaluator=_build_evaluator(task, model, config),
        # Described now: callbacks may change them.
        program=describe_program(task, optimizer),
        initial_rates=_rates(optimizers),
    )


def _build_optimizers(
    task: Task, config: TrainerConfig
) -> tuple[Optimizers, dict[str, keras.optimizers.Optimizer]]:
    """What the config or the Task says, and the same by name."""
    configured = task.configured_optimizer
    optimizer = configured() if configured else task.build_optimizer()
    optimizers = (
        dict(optimizer) if isinstance(optimizer, dict) else {"": optimizer}
    )
    for name, each in optimizers.items():
        if not isinstance(each, keras.optimizers.Optimizer):
            raise ConfigError(
                f"{type(task).__name__}.build_optimizer returned "
                f"{optimizer!r}: it must return a keras.optimizers.Optimizer, "
                "or a dict of them."
            )
        if not configured and own_step_scales(
            type(task), config.precision, each
        ):
            optimizers[name] = keras.optimizers.LossScaleOptimizer(each)
    if isinstance(optimizer, dict):
        return dict(optimizers), optimizers
    return optimizers[""], optimizers


def _check_averages(
    config: TrainerConfig, optimizers: Iterable[keras.optimizers.Optimizer]
) -> None:
    """Whether there will be averages to validate."""
    each: list[Any] = [getattr(o, "inner_optimizer", o) for o in optimizers]
    if config.validation_weights == "average" and not any(
        optimizer.use_ema for optimizer in each
    ):
        raise ConfigError(
            'validation_weights="average": no optimizer keeps averages of the '
            "weights. Make one with use_ema=True (in a config: "
            'optimizer.ema_momentum), or leave "model".'
        )


def _rates(
    optimizers: dict[str, keras.optimizers.Optimizer],
) -> dict[str, float]:
    return {name: _rate(each) for name, each in optimizers.items()}


def _rate(optimizer: keras.optimizers.Optimizer) -> float:
    rate: Any = optimizer.learning_rate
    return float(np.asarray(keras.ops.convert_to_numpy(rate)))


def _build_train_metrics(
    task: Task, config: TrainerConfig
) -> dict[keras.metrics.Metric, When]:
    """The training metrics, but for those that are never updated."""
    if not config.trains_metrics:
        return {}
    interval = config.train_metrics_interval
    made = _build_metrics(
        task, training=True, default=Every(interval) if interval else None
    )
    names = [metric.name for metric in made]
    for name in config.train_metrics:
        if name not in names:
            meant = nearest(name, names)
            raise ConfigError(
                f"train_metrics: {type(task).__name__}.build_metrics(training="
                f"True) returns no metric {name!r}"
                + (f" - did you mean {meant!r}?" if meant else f", but {names}")
            )
    chosen = {
        metric: when
        for metric, made_when in made.items()
        if (
            when := config.choose_when(
                metric.name, made_when if interval else None
            )
        )
        is not None
    }
    for metric, when in chosen.items():
        if when.over == "summary" and not config.summary_interval:
            raise ConfigError(
                f"The metric {metric.name!r} is taken over the steps since the "
                "last summary, but summary_interval=0: there are none. Set an "
                'interval, or over="epoch".'
            )
    return chosen


def _build_metrics(
    task: Task, *, training: bool, default: When | None
) -> dict[Any, When | None]:
    # A metric without a name of its own gets one that counts those before it
    # in the process: `auc_1` in validation, or in a notebook's second run.
    with fresh_names():
        metrics = task.build_metrics(training=training)
    where = f"{type(task).__name__}.build_metrics(training={training})"
    unique = task.train_logs is LogStyle.MEANS
    return check_metrics(
        metrics, where, default, training=training, unique=unique
    )


def _build_evaluator(
    task: Task, model: Any, config: TrainerConfig
) -> Evaluator | None:
    source = _build_source(task, "validation", config.validation_steps)
    if source is None:
        return None
    checks = _build_checks(task, source, "The validation data")
    return Evaluator(
        task,
        model,
        source,
        list(_build_metrics(task, training=False, default=Every(1))),
        seed=config.seed,
        max_batches=config.validation_steps,
        checks=checks if config.check_numerics else None,
        max_shapes=config.max_batch_shapes,
    )


def _build_source(
    task: Task, split: str, num_batches: int | None
) -> DataSource | None:
    configured = task.configured_inputs
    if split in configured:
        data = configured[split]()
    elif configured and type(task).build_inputs is Task.build_inputs:
        data = None
    else:
        data = task.build_inputs(split)
    if data is None:
        return None
    return task_source(
        data,
        f"{type(task).__name__}.build_inputs({split!r})",
        shuffle=split == "train",
        steps_per_epoch=num_batches,
    )


def _build_checks(task: Task, source: DataSource, what: str) -> InputChecks:
    """Also looks at the labels at once, where that costs next to nothing."""
    checks = InputChecks(source, what, task.label_classes, task.batch_parts)
    checks.check_labels()
    return checks
