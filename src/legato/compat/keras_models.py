"""What `keras.Model.compile` leaves behind, and Keras's own `fit` uses.

Private names of Keras's trainers are touched here and nowhere else.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import keras
from keras.src import backend as keras_backend
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.trainers.compile_utils import CompileMetrics

__all__ = ["CompileMetrics"]

OWN_STEP = ("train_step",)
OWN_TEST_STEP = ("test_step",)
OWN_METRICS = (
    "compute_metrics",
    "get_metrics_result",
    "metrics",
    "reset_metrics",
)
OWN_FUNCTION = ("make_train_function", "make_test_function")


def overridden(model: keras.Model, names: Iterable[str]) -> list[str]:
    """Which of these methods the model's class defines itself."""
    cls = type(model)
    return [n for n in names if getattr(cls, n) is not getattr(keras.Model, n)]


def compiled_metrics(model: Any) -> CompileMetrics | None:
    """What `compile(metrics=..., weighted_metrics=...)` made."""
    return model._compile_metrics


def reported_metrics(model: Any) -> list[keras.metrics.Metric]:
    """All metrics of a model but the mean of its loss."""
    return [m for m in model.metrics if m is not model._loss_tracker]


def make_metrics(model: Any, metrics: Any, weighted: Any) -> CompileMetrics:
    """What `compile` would make of these metrics."""
    names = getattr(model, "output_names", None)
    return CompileMetrics(metrics, weighted, output_names=names)


def means_by_name(
    metric: keras.metrics.Metric,
) -> dict[str, keras.metrics.Mean] | None:
    """The means that a metric's results are; None if some are not means.

    Args:
        metric: which may be what `compile` made, and hold others.
    """
    held: list[Any] = [
        inner
        for group in getattr(metric, "metrics", ())
        for inner in getattr(group, "metrics", [group])
    ]
    if not held:
        return {metric.name: metric} if _is_mean(metric) else None
    if not isinstance(metric, CompileMetrics) or not all(map(_is_mean, held)):
        return None
    # How they are named is Keras's business: it is asked with the means in
    # the place of their results.
    try:
        for mean in held:
            vars(mean)["result"] = lambda mean=mean: mean
        return metric.result()
    finally:
        for mean in held:  # one may be there twice
            vars(mean).pop("result", None)


def _is_mean(metric: keras.metrics.Metric) -> TypeGuard[keras.metrics.Mean]:
    return (
        isinstance(metric, keras.metrics.Mean)
        and type(metric).result is keras.metrics.Mean.result
    )


def has_loss(model: Any) -> bool:
    """Whether `compile` was given a loss."""
    return model._compile_loss is not None


def asks_for_compiling(model: Any) -> bool:
    """Whether `jit_compile=True` was given where Keras would not choose it."""
    return bool(model.jit_compile) and not model._resolve_auto_jit_compile()


def call_model(model: Any, x: Any, *, training: bool) -> Any:
    """The outputs, as Keras's own steps ask for them."""
    if model._call_has_training_arg:
        return model(x, training=training)
    return model(x)


def compute_loss(
    model: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool
) -> Any:
    """The total loss; the model's own `compute_loss`, if it has one."""
    return model._compute_loss(
        x=x,
        y=y,
        y_pred=y_pred,
        sample_weight=sample_weight,
        training=training,
    )


@contextlib.contextmanager
def output_losses(model: Any, *, measured: bool) -> Iterator[None]:
    """Around the loss of a model with several outputs.

    It has a metric for the loss of each, which the total loss updates on its
    way.

    Args:
        model: a compiled model.
        measured: whether these are wanted.
    """
    loss = model._compile_loss
    in_tensorflow = keras.config.backend() == "tensorflow"
    if loss is None or not loss._metrics or (measured and not in_tensorflow):
        yield
        return
    before = loss._metrics
    # Not an empty list: the losses are counted by it.
    loss._metrics = [_EachBatch(m) if measured else None for m in before]
    try:
        yield
    finally:
        loss._metrics = before


class _EachBatch:
    """A metric to which each batch counts the same, whatever its size.

    So it is in Keras's `fit` on TensorFlow, where the size of a batch is not
    known while the step is traced.
    """

    def __init__(self, metric: keras.metrics.Metric) -> None:
        self._metric = metric

    def update_state(self, value: Any, sample_weight: Any = None) -> Any:
        del sample_weight
        return self._metric.update_state(value)


def build(model: Any, batch: Any, *, with_compiled: bool) -> None:
    """Make all variables of a compiled model, without computing anything.

    Args:
        model: a compiled model.
        batch: `(x,)`, `(x, y)` or `(x, y, sample_weight)` of things that have
            a `shape` and a `dtype`.
        with_compiled: whether the metrics given to `compile` are wanted.
    """
    # (In its `__dict__`: Keras's `__setattr__` wants no new state in a model
    # that is built.)
    attributes = vars(model)
    before = attributes.get("_compile_metrics")
    if not with_compiled:
        attributes["_compile_metrics"] = None
    attributes.setdefault("optimizer", None)  # it may not be compiled
    try:
        model._symbolic_build(data_batch=batch)
    finally:
        attributes["_compile_metrics"] = before


def compares(model: Any) -> bool:
    """Whether Keras itself compares outputs with targets, for its loss."""
    return has_loss(model) and not overridden(
        model, ("compute_loss", "_compute_loss")
    )


def misfit(model: Any, batch: Any) -> str | None:
    """Why the loss cannot be computed with the weights of a batch.

    Args:
        model: a model that is built.
        batch: see `build`.

    Returns:
        None where it can be, or cannot be without them either.
    """

    def measure(x: Any, y: Any, weight: Any) -> Any:
        y_pred = call_model(model, x, training=False)
        return compute_loss(model, x, y, y_pred, weight, training=False)

    x, y, weight = keras.utils.unpack_x_y_sample_weight(_symbols(batch))
    try:
        keras_backend.compute_output_spec(measure, x, y, weight)
    except Exception as error:
        with contextlib.suppress(Exception):
            keras_backend.compute_output_spec(measure, x, y, None)
            return str(error)
    return None


def build_metrics(model: Any, batch: Any, metrics: CompileMetrics) -> None:
    """Make what metrics need, by what they will be updated with.

    Args:
        model: a model that is built.
        batch: see `build`.
        metrics: of `make_metrics`.

    Raises:
        Anything: they do not fit the outputs.
    """
    if metrics.built:
        return
    symbols = _symbols(batch)
    x, y, weight = keras.utils.unpack_x_y_sample_weight(symbols)
    y_pred = keras_backend.compute_output_spec(model, x, training=False)
    keras_backend.compute_output_spec(metrics.update_state, y, y_pred, weight)


def label_classes(model: Any, batch: Any) -> dict[str, tuple[int, int | None]]:
    """How many classes there are for the labels at some places of a batch.

    Known where the loss of an output is the sparse categorical cross-entropy;
    or one of Legato's own, if labels are indices of classes and none has a
    weight (with weight 0 it may be anything).

    Args:
        model: a model that is built, with its loss.
        batch: see `build`.

    Returns:
        By the path of the labels ("1", or "1.name") the number of classes, and
        the label that may be none of them.
    """
    loss = model._compile_loss
    sparse = {
        tuple(each.path): found
        for each in (loss._flat_losses or [] if loss is not None else [])
        if (found := _index_labels(each.loss)) is not None
    }
    if not sparse:
        return {}
    x, y, weight = keras.utils.unpack_x_y_sample_weight(_symbols(batch))
    y_pred = keras_backend.compute_output_spec(model, x, training=False)
    labels, outputs = (
        {path: leaf.shape for path, leaf in keras.tree.flatten_with_path(tree)}
        for tree in (y, y_pred)
    )
    return {
        ".".join(map(str, (1, *path))): (int(outputs[path][-1]), ignored)
        for path, (ignored, takes_shares) in sparse.items()
        if outputs.get(path)
        and outputs[path][-1] is not None
        and (
            not takes_shares
            or (
                weight is None and _are_indices(labels.get(path), outputs[path])
            )
        )
    }


def _index_labels(loss: Any) -> tuple[int | None, bool] | None:
    """What labels a loss takes, where these may be classes of the last axis.

    Returns:
        The label that need not be one, and whether labels may be shares of
        the classes too; None for any other loss.
    """
    module = type(loss).__module__
    if hasattr(loss, "ignored_index") and module.startswith("legato.losses."):
        return loss.ignored_index, True
    if type(loss) not in (
        keras.losses.SparseCategoricalCrossentropy,
        LossFunctionWrapper,  # what `compile` makes of a name
    ):
        return None
    options = loss._fn_kwargs
    if (
        loss.fn is not keras.losses.sparse_categorical_crossentropy
        or options.get("axis", -1) != -1
    ):
        return None
    return options.get("ignore_class"), False


def _are_indices(labels: Any, outputs: Any) -> bool:
    """Whether labels of this shape have no axis of classes."""
    if labels is None or outputs[-1] == 1:
        return False
    return len(labels) == len(outputs) - 1 or (
        len(labels) == len(outputs) and labels[-1] == 1
    )


def _symbols(batch: Any) -> Any:
    def symbol(spec: Any) -> Any:
        if spec is None:
            return None
        return keras.KerasTensor(spec.shape, str(spec.dtype))

    return keras.tree.map_structure(symbol, batch)
