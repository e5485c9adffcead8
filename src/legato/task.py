"""What is learned: model, data, losses, metrics and steps in one object."""

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from legato.backends import value_and_grad
from legato.errors import ConfigError, StepError
from legato.metrics import HostMetric, HostStepMetric, StepMetric
from legato.rng import kept_host_state
from legato.types import JSON, LogStyle
from legato.when import When

Optimizers = keras.optimizers.Optimizer | dict[str, keras.optimizers.Optimizer]


class Task:
    """All parts of one machine-learning task; override what differs.

    `build_model`, `build_optimizer`, `build_inputs` and `build_losses` (or
    `train_step`) must be defined. The steps are compiled: they run as Python
    only while they are traced, and may use `keras.ops` and Keras objects as
    if they ran one by one. What changes during training and is read in a step
    must be a `keras.Variable`.

    Attributes:
        loss: the name of the loss among the logs.
        train_logs: what the logs of `train_step` mean.
        validation_logs: the same of `validation_step`.
        order_seed: of the order of the data, where the caller has seeded
            everything already; None lets the engine seed everything from the
            config.
        label_classes: how many classes there are for the labels at some
            places of a batch, such as `{"1": 10}` for batches of (features,
            labels), or `{"1.digit": 10}`; `{"1": (10, 255)}` if 255 is a
            label too, which is ignored. Labels in arrays are checked before
            training, others with `TrainerConfig.check_numerics`.
        batch_parts: what the parts of a batch are called in messages, where
            batches are tuples.
        configured_inputs: what makes the data of a split, in the place of
            `build_inputs`, where a config says what they are.
        configured_optimizer: what makes the optimizer, in the place of
            `build_optimizer`, where a config says what it is.
    """

    loss = "loss"
    train_logs = LogStyle.MEANS
    validation_logs = LogStyle.MEANS
    order_seed: int | None = None
    label_classes: Mapping[str, int | tuple[int, int | None]] = (
        types.MappingProxyType({})
    )
    batch_parts: Sequence[str] = ()
    configured_inputs: Mapping[str, Callable[[], Any]] = types.MappingProxyType(
        {}
    )
    configured_optimizer: Callable[[], Optimizers] | None = None

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if _reads is not None and not name.startswith("__"):
            _reads.note(self, name, value)
        return value

    @property
    def title(self) -> str:
        """What progress is shown under."""
        return type(self).__name__

    def initialize(self, model: Any) -> None:
        """Prepare a new model, for example with pretrained weights.

        Called once at the start of a run, not when one is resumed.
        """
        del model

    def build_model(self) -> Any:
        """Make the model.

        Returns:
            A built `keras.Model`, or a dict of them by name.
        """
        raise _missing(self, "build_model", "a keras.Model")

    def build_optimizer(self) -> Optimizers:
        """Make the optimizer, or a dict of them by name."""
        raise _missing(self, "build_optimizer", "a Keras optimizer")

    def build_inputs(self, split: str) -> Any:
        """Make the data of a split.

        Args:
            split: "train" or "validation".

        Returns:
            A data source, such as `legato.ArraySource`; or what gives
            batches, nested in any way: a `keras.utils.PyDataset`, a
            `tf.data.Dataset`, a PyTorch `DataLoader`, a Grain dataset or
            loader, a generator, any object that can be iterated over again
            and again. Plain arrays, `(features, labels)`, are given in
            batches of 32, and shuffled in training. None for a validation
            split that there is not.
        """
        del split
        raise _missing(self, "build_inputs", "a legato.ArraySource")

    def build_losses(
        self, labels: Any, model_outputs: Any, aux_losses: Any = None
    ) -> Any:
        """Compute the loss.

        Args:
            labels: the labels of a batch.
            model_outputs: what the model returned for it.
            aux_losses: `model.losses`: a list of scalars from `add_loss` and
                regularizers, to be added.

        Returns:
            A scalar tensor; or a dict of scalars, of which `self.loss` is
            minimised, and all are logged (`legato.losses.WeightedSum` makes
            one).
        """
        del labels, model_outputs, aux_losses
        raise _missing(self, "build_losses", "a scalar loss")

    def build_metrics(
        self, training: bool
    ) -> (
        Sequence[keras.metrics.Metric | HostMetric]
        | Mapping[keras.metrics.Metric, When | None]
    ):
        """Make the metrics of training or of validation.

        Args:
            training: for which of them.

        Returns:
            Metrics; for validation also `legato.HostMetric` objects. Or a
            dict of them and when each is updated in training:
            `{metric: legato.Every(50)}`, or None for never. Validation
            updates all with every batch.
        """
        del training
        return []

    def build_callbacks(self) -> Sequence[keras.callbacks.Callback]:
        """Make the callbacks that belong to the task, such as an annealing.

        Returns:
            Callbacks, called before those that the `Trainer` is given.
        """
        return []

    def describe(self) -> dict[str, JSON]:
        """What tells this task from another, beside its attributes and code.

        A run is resumed only by a task that is described in the same way.
        """
        return {}

    def name_losses(self, losses: Any) -> dict[str, Any]:
        """What `build_losses` returned, by name.

        Raises:
            StepError: it returned a dict without `self.loss`.
        """
        if not isinstance(losses, dict):
            return {self.loss: losses}
        if self.loss not in losses:
            raise StepError(
                f"{type(self).__name__}.build_losses returned "
                f"{sorted(losses)}: {self.loss!r}, the one that is minimised, "
                "must be among them."
            )
        return losses

    def process_metrics(
        self,
        metrics: Sequence[StepMetric | HostStepMetric] | None,
        labels: Any,
        model_outputs: Any,
    ) -> None:
        """Update each metric with a batch; None means metrics are off."""
        for metric in metrics or ():
            metric.update_state(labels, model_outputs)

    def train_step(
        self,
        inputs: Any,
        model: Any,
        optimizer: Any,
        metrics: Sequence[StepMetric] | None = None,
    ) -> dict[str, Any]:
        """One update of the model.

        Args:
            inputs: a batch, as `build_inputs("train")` structures it.
            model: what `build_model` returned.
            optimizer: what `build_optimizer` returned.
            metrics: the training metrics; None where they are off.

        Returns:
            Scalars by name; `self.loss` must be among them.
        """
        features, labels = inputs

        def forward() -> tuple[Any, Any]:
            outputs = model(features, training=True)
            losses = self.build_losses(labels, outputs, model.losses)
            losses = self.name_losses(losses)
            return losses[self.loss], (outputs, losses)

        (loss, (outputs, losses)), gradients = value_and_grad(
            forward, model.trainable_variables, optimizer
        )
        optimizer.apply(gradients, model.trainable_variables)
        self.process_metrics(metrics, labels, outputs)
        return {**losses, self.loss: loss}

    def validation_step(
        self,
        inputs: Any,
        model: Any,
        metrics: Sequence[StepMetric | HostStepMetric] | None = None,
    ) -> dict[str, Any]:
        """Measure the model on a batch.

        Args:
            inputs: a batch, as `build_inputs("validation")` structures it.
            model: what `build_model` returned.
            metrics: the validation metrics.

        Returns:
            Scalars by name; their means over the examples are reported. More
            than scalars only where `aggregate_logs` is defined.
        """
        features, labels = inputs
        outputs = self.inference_step(features, model)
        losses = self.build_losses(labels, outputs, model.losses)
        self.process_metrics(metrics, labels, outputs)
        return dict(self.name_losses(losses))

    def aggregate_logs(self, state: Any, step_logs: dict[str, Any]) -> Any:
        """Take what `validation_step` returned for a batch, on the host.

        If this is defined, a validation step may return anything nested of
        tensors among its logs: predictions, for example. It runs in a thread
        beside the device, as host metrics do, and before the metrics' results
        are read.

        Args:
            state: what the call for the batch before returned; None at first.
            step_logs: of the batch, with NumPy arrays in the place of tensors.

        Returns:
            Whatever the next call is to get.
        """
        del state, step_logs
        raise NotImplementedError

    def reduce_aggregated_logs(
        self, aggregated_logs: Any, global_step: int
    ) -> dict[str, Any]:
        """Make logs of what `aggregate_logs` has gathered in a validation.

        Args:
            aggregated_logs: what its last call returned.
            global_step: the number of training steps completed.

        Returns:
            Floats by name, which become logs; they replace the means of the
            steps' logs of the same name. What else summaries can show
            (images, texts, figures) and dicts of all these may be among them.
        """
        del aggregated_logs, global_step
        raise NotImplementedError

    def inference_step(self, inputs: Any, model: Any) -> Any:
        """The model's outputs for a batch of features, not training."""
        return model(inputs, training=False)


def _missing(task: Task, method: str, what: str) -> ConfigError:
    return ConfigError(
        f"{type(task).__name__} does not define {method}: define it to return "
        f"{what}."
    )


class AttributeReads:
    """Plain attributes of a Task that a step read while it was traced.

    Their values are constants of the compiled program: one that changes
    later would be ignored in silence. Numbers, strings, small arrays and
    containers of these are compared by value, tensors by identity, and
    everything else not at all.
    """

    def __init__(self) -> None:
        # The task, its value in comparable form, and as text.
        self._seen: dict[str, tuple[Task, Any, str]] = {}

    def note(self, task: Task, name: str, value: Any) -> None:
        """Remember a value, if it is plain data."""
        if name not in self._seen:
            with contextlib.suppress(_NotPlainError):
                self._seen[name] = task, _frozen(value), f"{value!r:.80}"

    def check(self) -> None:
        """Compare with the values of now.

        Raises:
            StepError: one of them changed.
        """
        for name, (task, before, text) in self._seen.items():
            value = object.__getattribute__(task, name)
            try:
                now = _frozen(value)
            except _NotPlainError:
                now = value
            if now != before:
                raise StepError(
                    f"{type(task).__name__}.{name} was {text} when the step "
                    f"was traced and is {value!r:.80} now: a compiled step "
                    "would go on with the old value, and a checkpoint holds "
                    "none of it. Make it a keras.Variable and assign to that."
                )


class _Same:
    """Equal to what holds the same object, and keeps it alive."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value


class _NotPlainError(Exception):
    """A value that is not plain data."""


_SMALL_BYTES = 64 * 1024


def _frozen(value: Any) -> Any:
    """A copy that can be compared with `==`; NaN equals itself."""
    match value:
        case None | bool() | int() | str() | bytes():
            return type(value), value
        case float() | complex():
            return type(value), repr(value)
        case np.ndarray() | np.generic() if value.dtype != object:
            if value.nbytes > _SMALL_BYTES:
                raise _NotPlainError  # compared at every call: too dear
            return "array", value.dtype, value.shape, value.tobytes()
        case _ if keras.ops.is_tensor(value):
            return "tensor", _Same(value)
        case list() | tuple():
            return type(value), [_frozen(each) for each in value]
        case set() | frozenset():
            return type(value), sorted(repr(_frozen(each)) for each in value)
        case dict():
            return dict, [(repr(k), _frozen(v)) for k, v in value.items()]
        case _:
            raise _NotPlainError


_reads: AttributeReads | None = None


@contextlib.contextmanager
def tracing(reads: AttributeReads) -> Iterator[None]:
    """While a step is traced: note which attributes of Tasks it reads.

    When that is, a resumed run may differ from one that was not killed, so
    nothing that it draws from Python's or NumPy's generators counts.
    """
    global _reads
    before, _reads = _reads, reads
    try:
        with kept_host_state():
            yield
    finally:
        _reads = before


class ModelGroup(keras.Model):
    """Several models as one, for callbacks that want a single model."""

    def __init__(self, models: dict[str, keras.Model]) -> None:
        super().__init__(name="models")
        for name, model in models.items():
            setattr(self, name, model)
        self.built = True

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: call the models in it."""
        raise NotImplementedError("Call the models in the group.")


class OptimizerGroup:
    """Several optimizers, as callbacks look for them: `.optimizers`."""

    def __init__(self, optimizers: Sequence[keras.optimizers.Optimizer]):
        self.optimizers = list(optimizers)
