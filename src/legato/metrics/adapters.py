"""Metrics of other libraries, used as metrics of validation."""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from legato.compat.masked_arrays import without_mask
from legato.errors import ConfigError, DataError
from legato.metrics.host import HostMetric, to_numpy


class SklearnMetric(HostMetric):
    """A scoring function of scikit-learn, over the whole split.

    Labels and outputs of all batches are kept, and `result()` calls the
    function once, so that it may be one that is no mean over batches (ROC AUC,
    F1, a rank correlation). Examples of weight 0 are left out; other weights
    than 1 are passed on.

    Args:
        function: called as `function(labels, predictions, **arguments)`, as
            those of `sklearn.metrics` are.
        name: of the metric; None takes the function's.
        needs: what the function is called with: "labels" for predicted
            classes, "scores" for the outputs as they are (probabilities,
            decision values, the predictions of a regression). To get classes,
            the largest output wins where outputs have one more axis than
            labels; outputs of the labels' shape are compared with `threshold`,
            or taken as they are if they are integers.
        threshold: for `needs="labels"`: an output above it is class 1.
        **arguments: of the function, such as `average="macro"`.

    Raises:
        ConfigError: the function cannot be called like this.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str | None = None,
        needs: Literal["labels", "scores"] = "labels",
        threshold: float | None = None,
        **arguments: Any,
    ) -> None:
        if not callable(function) or hasattr(function, "_score_func"):
            raise ConfigError(
                f"SklearnMetric({function!r}): it must be a function of labels "
                "and predictions, such as sklearn.metrics.f1_score; no name "
                "and no scorer of make_scorer."
            )
        called = getattr(function, "__name__", None)
        if name is None and called is None:
            raise ConfigError(
                f"SklearnMetric({function!r}): it has no name of its own. Give "
                'one: name="...".'
            )
        super().__init__(called if name is None else name)
        needed = ("labels", "scores") if threshold is None else ("labels",)
        if needs not in needed:
            raise ConfigError(
                f"SklearnMetric(needs={needs!r}, threshold={threshold!r}): it "
                'must be "labels" for predicted classes, which a threshold '
                'may make, or "scores" for outputs as they are.'
            )
        is_number = isinstance(threshold, numbers.Real)
        if isinstance(threshold, bool) or (
            math.isnan(threshold) if is_number else threshold is not None
        ):
            raise ConfigError(
                f"SklearnMetric(threshold={threshold!r:.80}): it must be a "
                "number, such as 0.5 for probabilities, or None."
            )
        _check_call(function, arguments)
        self._function = function
        self._needs = needs
        self._threshold = threshold
        self._arguments = arguments
        self._takes_weights = _takes(function, "sample_weight")
        self.reset_state()

    def update_state(
        self, labels: Any, outputs: Any, sample_weight: Any = None
    ) -> None:
        """Keep a batch.

        Args:
            labels: array of `[batch, ...]`.
            outputs: array of `[batch, ...]`.
            sample_weight: array of `[batch]`.

        Raises:
            DataError: they are no arrays or do not fit one another, or there
                are weights and the function takes none.
        """
        for role, value in (("labels", labels), ("outputs", outputs)):
            if isinstance(value, Mapping | list | tuple):
                raise DataError(
                    f"{self.name}: the {role} are a {type(value).__name__}: "
                    "give the metric the one array that it needs of them."
                )
        labels, outputs = to_numpy(labels), to_numpy(outputs)
        # (Sequences may be one long.)
        if outputs.shape == (*labels.shape, 1):
            outputs = outputs[..., 0]
        elif outputs.shape[:-1] != labels.shape:
            labels, outputs = _squeeze(labels), _squeeze(outputs)
        if labels.shape[:1] != outputs.shape[:1] or not labels.ndim:
            raise DataError(
                f"{self.name}: labels have the shape {labels.shape} and "
                f"outputs {outputs.shape}: the first axis of both must be the "
                "batch."
            )
        is_unknown = np.zeros(len(outputs), bool)
        if self._needs == "labels":
            if outputs.dtype.kind in "fc":
                parts = tuple(range(1, outputs.ndim))
                is_unknown = np.isnan(outputs).any(axis=parts)
            outputs = self._classes(labels, outputs)
        given = labels, (outputs, is_unknown)
        labels, (outputs, is_unknown), weights = _without_padding(
            self.name, *given, sample_weight, self._takes_weights
        )
        self._is_unknown |= bool(is_unknown.any())
        # Copies, as each selection is: a batch's memory may be used again.
        self._labels.append(labels)
        self._outputs.append(outputs)
        self._weights.append(weights)

    def result(self) -> dict[str, Any]:
        """The function's score of all batches since the last reset.

        Returns:
            The score by the metric's name, a group by index if it is an array,
            or the function's own names if it returns a dict. NaN if there was
            no example; and where classes are needed, if an output was NaN,
            which is of none.
        """
        weights = _join(self._weights)
        if not len(weights) or self._is_unknown:
            return {self.name: float("nan")}
        arguments = dict(self._arguments)
        if (weights != 1).any():
            arguments["sample_weight"] = weights
        score = self._function(
            _join(self._labels), _join(self._outputs), **arguments
        )
        return _as_logs(self.name, score)

    def reset_state(self) -> None:
        """Forget all batches."""
        self._labels: list[np.ndarray] = []
        self._outputs: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._is_unknown = False

    def _classes(self, labels: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        if outputs.ndim == labels.ndim + 1:
            return outputs.argmax(-1)
        if outputs.shape != labels.shape:
            raise DataError(
                f"{self.name}: labels have the shape {labels.shape} and "
                f"outputs {outputs.shape}: for classes, outputs must have the "
                "labels' shape, or one more axis. One-hot labels need argmax."
            )
        if self._threshold is not None:
            return (outputs > self._threshold).astype(np.int64)
        if outputs.dtype.kind == "f":
            remedy = (
                "Give threshold=0.5 for probabilities, threshold=0 for logits, "
                'or needs="scores" to pass them as they are.'
            )
            if outputs.ndim > 1:
                remedy += (
                    " If the labels are one-hot, give the metric their "
                    "argmax: labels.argmax(-1)."
                )
            raise DataError(
                f"{self.name}: outputs of dtype {outputs.dtype} and shape "
                f"{outputs.shape} are to be classes. {remedy}"
            )
        return outputs


_UPDATES = ("update", "update_state", "add_batch")
_RESULTS = ("compute", "result")
_RESETS = ("reset", "reset_state", "reset_states")


class WrappedMetric(HostMetric):
    """Any object that is updated, computed and reset, as a metric.

    It may be one of torchmetrics or torcheval (`update`, `compute`, `reset`),
    a metric in the style of Keras (`update_state`, `result`, and `reset_state`
    or `reset_states`), or one of Hugging Face's `evaluate` (`add_batch`,
    `compute`). Examples of weight 0 are left out; other weights than 1 are
    passed on if its update names an argument `sample_weight`.

    Args:
        metric: the object.
        name: of the metric; None takes the `name` of the object, or makes one
            from its class.
        order: of the arguments of its update: "labels_first" or
            "outputs_first". None takes what is usual: outputs first for
            `update`, labels first for `update_state`; `add_batch` takes them
            by name.
        convert: called with each array, if the object needs something else,
            such as `torch.from_numpy`.

    Raises:
        ConfigError: a method is missing, or cannot be called like this.
    """

    def __init__(
        self,
        metric: Any,
        name: str | None = None,
        order: Literal["labels_first", "outputs_first"] | None = None,
        convert: Callable[[np.ndarray], Any] | None = None,
    ) -> None:
        if inspect.isclass(metric):
            raise ConfigError(
                f"WrappedMetric({metric!r}): it is a class. Give an object of "
                f"it: {metric.__name__}(...)."
            )
        own = getattr(metric, "name", None)
        if name is None:
            named = isinstance(own, str) and own
            name = own if named else type(metric).__name__
        super().__init__(name)
        if order not in (None, "labels_first", "outputs_first"):
            raise ConfigError(
                f"WrappedMetric(order={order!r}): it must be 'labels_first', "
                "'outputs_first' or None."
            )
        update, self._update = _method(metric, _UPDATES)
        _, self._compute = _method(metric, _RESULTS)
        # Those with `add_batch` forget when they are computed.
        by_name = update == "add_batch"
        self._reset = None if by_name else _method(metric, _RESETS)[1]
        if order is None and update == "update":
            order = "outputs_first"
        self._order = None if by_name else (order or "labels_first")
        # (What takes any argument may pass over it, as collections of
        # torchmetrics do.)
        self._takes_weights = _takes(self._update, "sample_weight", named=True)
        if convert is not None and not callable(convert):
            raise ConfigError(
                f"WrappedMetric(convert={convert!r:.80}): it must be a "
                "function of an array, such as torch.from_numpy; or None."
            )
        self._convert = convert
        self._is_empty = True
        self._logs: dict[str, Any] | None = None
        try:
            self._call(inspect.signature(self._update).bind, None, None, {})
        except TypeError as error:
            raise ConfigError(
                f"WrappedMetric({type(metric).__name__}): its {update} cannot "
                f"be called with labels and outputs: {error}."
            ) from error
        except ValueError:  # it has no signature, as what is written in C
            pass

    def update_state(
        self, labels: Any, outputs: Any, sample_weight: Any = None
    ) -> None:
        """Hand a batch to the object.

        Args:
            labels: array, or structure of arrays, of `[batch, ...]`.
            outputs: likewise.
            sample_weight: array of `[batch]`.

        Raises:
            DataError: there are weights and the object takes none.
        """
        arguments = {}
        if sample_weight is not None:
            labels, outputs, weights = _without_padding(
                self.name, labels, outputs, sample_weight, self._takes_weights
            )
            if not len(weights):
                return
            if (weights != 1).any():
                arguments["sample_weight"] = self._converted(weights)
        self._logs = None
        self._is_empty = False
        self._call(
            self._update,
            self._converted(labels),
            self._converted(outputs),
            arguments,
        )

    def result(self) -> dict[str, Any]:
        """What the object computes from all batches since the last reset.

        Returns:
            The value by the metric's name, a group by index if it is an array,
            or the object's own names if it is a dict. NaN by its name if there
            was no example, and the object computes nothing of none.
        """
        # Kept, since computing may make the object forget.
        if self._logs is None:
            try:
                self._logs = _as_logs(self.name, self._compute())
            except Exception:
                if not self._is_empty:
                    raise
                self._logs = {self.name: float("nan")}
            self._is_empty = self._reset is None
        return dict(self._logs)

    def reset_state(self) -> None:
        """Forget all batches."""
        self._logs = None
        if self._reset is not None:
            self._reset()
        elif not self._is_empty:
            self._compute()
        self._is_empty = True

    def _call(
        self,
        function: Callable[..., Any],
        labels: Any,
        outputs: Any,
        arguments: dict[str, Any],
    ) -> None:
        if self._order is None:
            function(references=labels, predictions=outputs, **arguments)
        elif self._order == "labels_first":
            function(labels, outputs, **arguments)
        else:
            function(outputs, labels, **arguments)

    def _converted(self, tree: Any) -> Any:
        if self._convert is None:
            return tree
        return keras.tree.map_structure(self._convert, tree)


def _method(
    metric: Any, names: Sequence[str]
) -> tuple[str, Callable[..., Any]]:
    for name in names:
        method = getattr(metric, name, None)
        if callable(method):
            return name, method
    raise ConfigError(
        f"WrappedMetric({type(metric).__name__}): it has none of the methods "
        f"{', '.join(names)}. It needs one of them, one of "
        f"{', '.join(_UPDATES)}, one of {', '.join(_RESULTS)} and one of "
        f"{', '.join(_RESETS)} (none with add_batch)."
    )


def _check_call(function: Callable[..., Any], arguments: dict) -> None:
    try:
        inspect.signature(function).bind(None, None, **arguments)
    except TypeError as error:
        raise ConfigError(
            f"SklearnMetric: {function!r} cannot be called with labels, "
            f"predictions and the arguments {sorted(arguments)}: {error}."
        ) from error
    except ValueError:  # it has no signature, as what is written in C
        pass


def _takes(
    function: Callable[..., Any], argument: str, *, named: bool = False
) -> bool:
    """Whether a function takes an argument; named: by its own name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return False
    return any(
        each.name == argument
        or (each.kind is inspect.Parameter.VAR_KEYWORD and not named)
        for each in parameters
    )


def _squeeze(array: np.ndarray) -> np.ndarray:
    return array[..., 0] if array.ndim > 1 and array.shape[-1] == 1 else array


def _without_padding(
    name: str, labels: Any, outputs: Any, weights: Any, takes_weights: bool
) -> tuple[Any, Any, np.ndarray]:
    """The examples that count, and their weights."""
    count = len(keras.tree.flatten(labels)[0])
    weights = np.ones(count) if weights is None else np.asarray(weights)
    if weights.size != count:
        raise DataError(
            f"{name}: sample_weight has the shape {weights.shape} for {count} "
            "examples: give one weight for each."
        )
    weights = weights.reshape(-1)
    is_there = weights != 0
    if not takes_weights and (weights[is_there] != 1).any():
        raise DataError(
            f"{name}: sample_weight has other values than 0 and 1, and the "
            "metric names no argument `sample_weight`. Pass it none."
        )
    kept: Any = keras.tree.map_structure(
        lambda array: np.asarray(array)[is_there], (labels, outputs)
    )
    return *kept, weights[is_there]


def _join(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _as_logs(name: str, value: Any) -> dict[str, Any]:
    """A value as floats by name; what has parts becomes groups of these."""
    plain = _plain(name, value)
    return plain if isinstance(value, Mapping) else {name: plain}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(name, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        # scikit-learn leaves places empty, such as that of a mean's support.
        return {
            str(index): _plain(name, each)
            for index, each in enumerate(value)
            if each is not None
        }
    if callable(getattr(value, "detach", None)):  # PyTorch's, on any device
        value = value.detach().cpu()
    if isinstance(value, np.ma.MaskedArray):
        value = without_mask(value)
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ConfigError(
            f"{name}: its result has {value!r}, of type "
            f"{type(value).__name__}: it must be made of numbers, arrays and "
            "dicts of these."
        )
    return _plain(name, [*array]) if array.ndim else float(array)
