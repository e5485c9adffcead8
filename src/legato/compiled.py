"""A Task made from a compiled Keras model, for `legato.fit`.

It does what Keras's own `fit` does with a batch. A model that defines how it
is trained (`train_step`), or how it is measured, does so by its own methods,
in the active backend's signature.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import keras

from legato import backends
from legato.compat import keras_models
from legato.data import DataSource, HostValue
from legato.data.batches import BATCH_PARTS, named_part
from legato.data.beside import without
from legato.data.structure import Structure
from legato.errors import ConfigError, DataError
from legato.identity import code_hash, describe_value
from legato.metrics import HostMetric, HostStepMetric, StepMetric
from legato.task import Task
from legato.types import JSON, LogStyle
from legato.when import Every, When, read_when

CompileMetrics = keras_models.CompileMetrics

TrainMetrics = (
    Literal["compiled"] | None | When | Sequence[Any] | Mapping[Any, Any]
)
ValidationMetrics = Literal["compiled"] | None | Sequence[Any] | Mapping


class CompiledTask(Task):
    """See the module.

    Args:
        model: a compiled model; it need not be built.
        train: batches `(x,)`, `(x, y)` or `(x, y, sample_weight)`.
        validation: the same; None for no validation.
        train_metrics: see `legato.fit`.
        validation_metrics: see `legato.fit`.
        order_seed: of the order of the data.

    Raises:
        ConfigError: the model is not compiled, or what is asked for does not
            fit it.
    """

    batch_parts = BATCH_PARTS

    def __init__(
        self,
        model: keras.Model,
        train: DataSource,
        validation: DataSource | None,
        *,
        train_metrics: TrainMetrics = "compiled",
        validation_metrics: ValidationMetrics = "compiled",
        order_seed: int = 0,
    ) -> None:
        self.order_seed = order_seed
        self._model: Any = model
        self._sources = {"train": train, "validation": validation}
        own_step, own_test_step = _own_steps(model)
        if own_step:
            self.train_logs = LogStyle.OWN
            _refuse_choice("train_metrics", train_metrics, own_step)
        else:
            self.train_logs = LogStyle.RUNNING
        if own_test_step and validation_metrics == "compiled":
            self.validation_logs = LogStyle.OWN
        else:
            self.validation_logs = LogStyle.RUNNING
        compiled = keras_models.compiled_metrics(model)
        self._train_metrics = _Chosen.of_training(model, train_metrics)
        self._validation_metrics = _Chosen.of_validation(
            model, validation_metrics
        )
        chosen = (self._train_metrics, self._validation_metrics)
        used = chosen if validation is not None else chosen[:1]
        batch = without(train.batch_spec(train.full_batch_size))
        if not (own_step or own_test_step):
            _refuse_on_host(batch)
        with_compiled = any(each.is_compiled for each in used)
        compared = {"training": batch} if validation is not train else {}
        if validation is not None:
            spec = validation.batch_spec(validation.full_batch_size)
            compared["validation"] = without(spec)
        if own_step or not keras_models.compares(model):
            compared.pop("training", None)
        if own_test_step or not keras_models.compares(model):
            compared.pop("validation", None)
        _refuse_targets(compared)
        try:
            keras_models.build(model, batch, with_compiled=with_compiled)
        except Exception:  # of the model's, or a backend's
            _refuse_weights(model, compared)
            raise
        _refuse_weights(model, compared)  # of validation, or a second `fit`
        self.label_classes = keras_models.label_classes(model, batch)
        for argument, asked, each in zip(
            ("train_metrics", "validation_metrics"),
            (train_metrics, validation_metrics),
            used,
            strict=False,
        ):
            for metrics in each.updated:
                if metrics is compiled:
                    continue
                try:
                    keras_models.build_metrics(model, batch, metrics)
                except Exception as error:  # of the metric's, or a backend's
                    raise ConfigError(
                        f"{argument}={asked!r}: the model cannot be measured "
                        f"by this: {error}"
                    ) from error

    @property
    def title(self) -> str:
        """The name of the model."""
        return self._model.name

    def build_model(self) -> keras.Model:
        """The model, as given."""
        return self._model

    def build_optimizer(self) -> keras.optimizers.Optimizer:
        """The optimizer that it was compiled with."""
        return self._model.optimizer

    def build_inputs(self, split: str) -> DataSource | None:
        """The data, as given."""
        return self._sources[split]

    def build_metrics(
        self, training: bool
    ) -> dict[keras.metrics.Metric, When] | list[Any]:
        """All that is reported beside the loss."""
        style = self.train_logs if training else self.validation_logs
        chosen = self._train_metrics if training else self._validation_metrics
        if style is LogStyle.OWN:
            return dict.fromkeys(self._model.metrics, Every(1))
        if not training and chosen.on_host:
            return [*chosen.updated, *chosen.on_host]
        if not chosen.is_compiled:
            return dict(chosen.updated)
        # Some are updated by the loss, or by layers: at each step.
        found: dict[keras.metrics.Metric, When] = dict.fromkeys(
            keras_models.reported_metrics(self._model), Every(1)
        )
        return found | chosen.updated

    def train_step(
        self,
        inputs: Any,
        model: Any,
        optimizer: Any,
        metrics: Sequence[StepMetric] | None = None,
    ) -> dict[str, Any]:
        """One update, as `keras.Model.train_step` does it."""
        if self.train_logs is LogStyle.OWN:
            return _run_own(model, model.train_step, _train_state, inputs)
        x, y, weight = keras.utils.unpack_x_y_sample_weight(without(inputs))

        def forward() -> tuple[Any, Any]:
            outputs = keras_models.call_model(model, x, training=True)
            with self._train_metrics.measuring(model):
                loss = keras_models.compute_loss(
                    model, x, y, outputs, weight, training=True
                )
            return loss, outputs

        (loss, outputs), gradients = backends.current().value_and_grad(
            forward,
            backends.require_variables(model.trainable_variables),
            optimizer,
            as_keras=True,
        )
        optimizer.apply(gradients, model.trainable_variables)
        self._train_metrics.update(metrics, y, outputs, weight)
        return {self.loss: loss}

    def validation_step(
        self,
        inputs: Any,
        model: Any,
        metrics: Sequence[StepMetric | HostStepMetric] | None = None,
    ) -> dict[str, Any]:
        """Measures a batch, as `keras.Model.test_step` does it."""
        if self.validation_logs is LogStyle.OWN:
            return _run_own(model, model.test_step, _test_state, inputs)
        _, labels, _ = keras.utils.unpack_x_y_sample_weight(inputs)
        x, y, weight = keras.utils.unpack_x_y_sample_weight(without(inputs))
        outputs = keras_models.call_model(model, x, training=False)
        logs = {}
        if model.compiled:
            with self._validation_metrics.measuring(model):
                logs[self.loss] = keras_models.compute_loss(
                    model, x, y, outputs, weight, training=False
                )
        self._validation_metrics.update(metrics, y, outputs, weight, labels)
        return logs

    def describe(self) -> dict[str, JSON]:
        """The model and its loss: another one is another run."""
        model = self._model
        config: Any = getattr(model, "_compile_config", None)
        compiled = config.config if config is not None else {}
        return {
            "model": type(model).__name__,
            "model_code_sha256": code_hash(type(model)),
            "layers": {
                str(number): describe_value(layer)
                for number, layer in enumerate(model.layers)
            },
            "loss": describe_value(compiled.get("loss")),
            "loss_weights": describe_value(compiled.get("loss_weights")),
        }


def _refuse_on_host(batch: Any) -> None:
    """What stays on the host is for host metrics, in dicts alone."""
    for path, leaf in keras.tree.flatten_with_path(batch):
        if isinstance(leaf, HostValue):
            as_numbers = 'Where these are numbers, take .astype("float32").'
            remedies = [as_numbers] if leaf.holds == "objects" else []
            match path[0]:
                case 1:
                    remedies.append(
                        "Number the classes: "
                        "np.unique(y, return_inverse=True)[1]."
                    )
                case 2:
                    remedies = [as_numbers]
                case _:
                    remedies.append(
                        "Turn it into numbers before: run a preprocessing "
                        "layer, such as keras.layers.StringLookup, in the "
                        "data (dataset.map(lookup)), not in the model."
                    )
            raise DataError(
                f"{named_part('.'.join(map(str, path)))} holds {leaf.holds}, "
                f"which no device takes. {' '.join(remedies)} In a dict among "
                "x or y, beside what the model takes, it goes to host metrics."
            )


def _refuse_targets(compared: Mapping[str, Any]) -> None:
    """What no loss of Keras's can be computed with.

    Args:
        compared: batches in which it compares outputs with targets, by what
            they are for.
    """
    for name, batch in compared.items():
        _, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        if y is None:
            raise DataError(
                f"The {name} data hold no y, with which the loss that the "
                "model was compiled with compares its outputs. Give y, or "
                "batches (x, y); or compile the model without a loss, if its "
                "layers add their own."
            )
        if isinstance(weight, dict) and not keras.tree.is_nested(y):
            raise DataError(
                f"The {name} data: sample_weight is a dict of {[*weight]}, and "
                "y is a single array. Give a single array of weights too, one "
                "for each example."
            )


def _refuse_weights(model: keras.Model, compared: Mapping[str, Any]) -> None:
    """Weights whose shapes do not go with the model's losses."""
    for name, batch in compared.items():
        _, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        if weight is None or all(
            len(each.shape) == 1 for each in Structure.leaves(weight)
        ):
            continue  # one for each example
        why = keras_models.misfit(model, batch)
        if why is not None:
            why = " ".join(why.split())[:200].rstrip(".")
            shapes = [
                [tuple(leaf.shape) for leaf in Structure.leaves(each)]
                for each in (weight, y)
            ]
            raise DataError(
                f"The {name} data: sample_weight of shape "
                f"{_listed(shapes[0])} does not go with the loss of y of shape "
                f"{_listed(shapes[1])}: {why}. Give one "
                "weight for each example: shape (examples,)."
            )


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))


def _is_on_host(metric: Any) -> bool:
    return isinstance(metric, HostMetric)


def _says_when(asked: Mapping[Any, Any]) -> bool:
    """Whether the values are steps, and no metrics, by the names of outputs."""
    return all(value is None for value in asked.values()) or any(
        isinstance(value, When | int | float)
        or (
            isinstance(value, Mapping)
            and (not value or not value.keys().isdisjoint({"every", "sample"}))
        )
        for value in asked.values()
    )


class _Chosen:
    """Which metrics are computed in training, or in validation.

    Args:
        updated: those that a step updates, and when.
        on_host: those of validation that are measured on the host.
        is_compiled: whether they are those that the model was compiled with.
    """

    def __init__(
        self,
        updated: dict[CompileMetrics, When],
        on_host: Sequence[HostMetric] = (),
        *,
        is_compiled: bool,
    ) -> None:
        self.updated: dict[Any, When] = dict(updated)
        self.on_host = on_host
        self.is_compiled = is_compiled

    @classmethod
    def of_training(cls, model: Any, asked: Any) -> "_Chosen":
        """See `legato.fit(train_metrics=...)`."""
        if isinstance(asked, Mapping) and _says_when(asked):
            together: dict[When, list[Any]] = {}
            for metric, value in asked.items():
                try:
                    when = read_when(value)
                except ConfigError as error:
                    raise ConfigError(
                        f"train_metrics: {metric!r:.80}: {error}"
                    ) from None
                if when is not None:
                    together.setdefault(when, []).append(metric)
            return cls(
                {
                    keras_models.make_metrics(model, metrics, None): when
                    for when, metrics in together.items()
                },
                is_compiled=False,
            )
        if isinstance(asked, When):
            compiled = keras_models.compiled_metrics(model)
            return cls({compiled: asked} if compiled else {}, is_compiled=True)
        return cls.of_validation(model, asked, "train_metrics")

    @classmethod
    def of_validation(
        cls, model: Any, asked: Any, argument: str = "validation_metrics"
    ) -> "_Chosen":
        """See `legato.fit(validation_metrics=...)`."""
        if isinstance(asked, str) and asked == "compiled":
            compiled = keras_models.compiled_metrics(model)
            always: dict[Any, When] = {compiled: Every(1)} if compiled else {}
            return cls(always, is_compiled=True)
        if asked is None or (isinstance(asked, list | tuple) and not asked):
            return cls({}, is_compiled=False)
        if isinstance(asked, HostMetric):
            asked = [asked]
        if not isinstance(asked, list | tuple | Mapping):
            remedy = f"{argument}=[{asked!r}]"
            if argument == "train_metrics":
                remedy += ", legato.Every(steps) or legato.Sample(share)"
            raise ConfigError(
                f'{argument}={asked!r}: it must be "compiled" (those of '
                "model.compile), None (off), or a list of metrics as "
                f"model.compile takes it: {remedy}."
            )
        on_host = [m for m in keras.tree.flatten(asked) if _is_on_host(m)]
        others = asked
        if on_host:
            if argument == "train_metrics":
                raise ConfigError(
                    f"train_metrics holds the host metric {on_host[0].name!r}: "
                    "these measure in validation only. Give it as one of "
                    "validation_metrics."
                )
            if isinstance(asked, Mapping):
                raise ConfigError(
                    f"{argument}={asked!r}: host metrics are given all "
                    "outputs. Put them in a list: [metric, ...]."
                )
            others = [each for each in asked if not _is_on_host(each)]
            if len(others) + len(on_host) != len(asked):
                raise ConfigError(
                    f"{argument}={asked!r}: the host metric "
                    f"{on_host[0].name!r} is inside of a list in it, and is "
                    "given all outputs. Put it into the outer list."
                )
        updated: dict[Any, When] = {}
        if others:
            made = keras_models.make_metrics(model, others, None)
            updated = {made: Every(1)}
        return cls(updated, on_host, is_compiled=False)

    def measuring(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Around the loss: of several outputs, each is measured, or not."""
        return keras_models.output_losses(model, measured=self.is_compiled)

    def update(
        self,
        metrics: Sequence[StepMetric | HostStepMetric] | None,
        y: Any,
        outputs: Any,
        weight: Any,
        labels: Any = None,
    ) -> None:
        """Update those metrics that are ours to update.

        Args:
            metrics: all metrics of the step.
            y: the targets.
            outputs: the model's.
            weight: of the examples.
            labels: the targets with what stays on the host of them.
        """
        for metric in metrics or ():
            if isinstance(metric, HostStepMetric):
                weights = {"sample_weight": weight}
                given = metric.takes_weights and weight is not None
                given = weights if given else {}
                metric.update_state(labels, outputs, **given)
            elif metric.is_any_of(self.updated):
                metric.update_state(y, outputs, weight)


def _own_steps(model: keras.Model) -> tuple[list[str], list[str]]:
    """What the model does by methods of its own in training, and testing.

    Raises:
        ConfigError: it defines what cannot be used here.
    """
    functions = keras_models.overridden(model, keras_models.OWN_FUNCTION)
    if functions:
        raise ConfigError(
            f"{type(model).__name__} defines {', '.join(functions)}: legato "
            "compiles the steps itself. Define train_step and test_step "
            "instead."
        )
    measured = keras_models.overridden(model, keras_models.OWN_METRICS)
    step = keras_models.overridden(model, keras_models.OWN_STEP)
    test_step = keras_models.overridden(model, keras_models.OWN_TEST_STEP)
    return step + measured, test_step + measured


def _refuse_choice(argument: str, asked: Any, own: Sequence[str]) -> None:
    if not (isinstance(asked, str) and asked == "compiled"):
        raise ConfigError(
            f"{argument}={asked!r}: the model defines {', '.join(own)}, and so "
            'computes its metrics itself. Leave it at "compiled", and choose '
            "in the model."
        )


def _run_own(
    model: Any,
    step: Callable[..., Any],
    state_of: Callable[[Any], list[list[keras.Variable]]],
    inputs: Any,
) -> dict[str, Any]:
    """Run a model's own step in the active backend's signature."""
    if keras.config.backend() != "jax":
        with keras_models.output_losses(model, measured=True):
            return dict(step(inputs))
    # Stateless there: values go in and come out.
    variables = state_of(model)
    state = tuple([v.value for v in group] for group in variables)
    logs, new = step(state, inputs)
    for group, before, after in zip(variables, state, new, strict=True):
        for variable, old, value in zip(group, before, after, strict=True):
            if value is not old:
                variable.assign(value)
    return dict(logs)


def _train_state(model: Any) -> list[list[keras.Variable]]:
    return [
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    ]


def _test_state(model: Any) -> list[list[keras.Variable]]:
    return [
        model.trainable_variables,
        model.non_trainable_variables,
        model.metrics_variables,
    ]
