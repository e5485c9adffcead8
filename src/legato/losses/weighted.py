"""Several losses as one, with each of them in the logs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from legato.errors import ConfigError, StepError
from legato.losses.base import is_number

Part = keras.losses.Loss | Callable[[Any, Any], Any]
Weight = float | keras.Variable


class WeightedSum:
    """A weighted sum of named losses.

    Args:
        parts: by name, each a `keras.losses.Loss`, which is given the labels
            and the outputs of its name; or any other callable, which is given
            all labels and all outputs and returns a scalar.
        weights: by name, finite numbers; or `keras.Variable` objects, for
            weights that change during training. A part without one has 1.
        total: the name of the sum in the logs; that of the Task's `loss`.
        auxiliary: the name of the sum of `aux_losses` in the logs.

    Raises:
        ConfigError: an argument is wrong; the message names all that are.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        weights: Mapping[str, Weight] | None = None,
        total: str = "loss",
        auxiliary: str = "auxiliary",
    ) -> None:
        problems = _problems(parts, weights, total, auxiliary)
        if problems:
            raise ConfigError(f"WeightedSum: {'; '.join(problems)}.")
        given = dict(weights or {})
        self.parts = dict(parts)
        self.weights: dict[str, Weight] = {
            name: weight
            if isinstance(weight := given.get(name, 1.0), keras.Variable)
            else float(weight)
            for name in parts
        }
        self.total = total
        self.auxiliary = auxiliary

    def __call__(
        self,
        labels: Any,
        outputs: Any,
        aux_losses: Sequence[Any] | None = None,
        sample_weights: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Compute the sum and its parts.

        Args:
            labels: by name of the part, tensors; whatever the parts take
                where these are callables.
            outputs: the model's outputs, in the same way.
            aux_losses: `model.losses`; scalars, added with the weight 1.
            sample_weights: by name of the part, for `keras.losses.Loss`.

        Returns:
            Scalars by name: the sum; each part before it is weighted; and the
            sum of `aux_losses`, where there are any.

        Raises:
            StepError: labels, outputs or weights do not fit the parts, or a
                part is not a scalar.
        """
        if not isinstance(sample_weights, Mapping | None):
            raise StepError(
                "WeightedSum was given sample_weights of type "
                f"{type(sample_weights).__name__}: they must be a dict by the "
                f"names of the parts, {sorted(self.parts)}."
            )
        if not isinstance(aux_losses, list | tuple | None):
            raise StepError(
                "WeightedSum was given aux_losses of type "
                f"{type(aux_losses).__name__}: they must be a list of scalars, "
                "such as model.losses."
            )
        chosen = dict(sample_weights or {})
        if unknown := sorted(map(str, chosen.keys() - self.parts)):
            raise StepError(
                f"WeightedSum was given sample_weights for {unknown}: the "
                f"parts are {sorted(self.parts)}. Name those."
            )
        losses = {
            name: _scalar(
                name,
                _apply(name, part, labels, outputs, chosen.get(name)),
            )
            for name, part in self.parts.items()
        }
        total = None
        for name, loss in losses.items():
            weighted = ops.multiply(loss, self.weights[name])
            total = weighted if total is None else ops.add(total, weighted)
        if aux_losses:
            losses[self.auxiliary] = _scalar(self.auxiliary, sum(aux_losses))
            total = ops.add(total, losses[self.auxiliary])
        return {self.total: total, **losses}


def _apply(
    name: str, part: Part, labels: Any, outputs: Any, weight: Any
) -> Any:
    if isinstance(part, keras.losses.Loss):
        y_true = _pick(name, "labels", labels)
        return part(y_true, _pick(name, "outputs", outputs), weight)
    if weight is not None:
        raise StepError(
            f"WeightedSum was given sample_weights for {name!r}, which is a "
            "callable of all labels and outputs and takes none. Weigh inside "
            "of it."
        )
    return part(labels, outputs)


def _pick(name: str, what: str, values: Any) -> Any:
    if isinstance(values, Mapping) and name in values:
        return values[name]
    found = (
        f"a dict of {sorted(map(str, values))}"
        if isinstance(values, Mapping)
        else f"a {type(values).__name__}"
    )
    raise StepError(
        f"WeightedSum looks up {name!r} in the {what}, which are {found}. Name "
        "them like the parts, or make this part a callable of all labels and "
        "outputs."
    )


def _scalar(name: str, loss: Any) -> Any:
    if loss is None:
        raise StepError(
            f"The part {name!r} of a WeightedSum returned None: it must return "
            "a scalar."
        )
    loss = ops.convert_to_tensor(loss)
    if tuple(loss.shape) != ():
        raise StepError(
            f"The part {name!r} of a WeightedSum has the shape "
            f"{tuple(loss.shape)}: it must be a scalar. Give the loss a "
            "reduction, or take the mean."
        )
    return loss


def _problems(
    parts: Any, weights: Any, total: Any, auxiliary: Any
) -> list[str]:
    problems = []
    if not isinstance(parts, Mapping) or not parts:
        problems.append(
            f"parts={parts!r} must be a dict with at least one loss, such as "
            "{'box': legato.losses.SmoothL1Loss()}"
        )
        parts = {}
    for name, part in parts.items():
        if inspect.isclass(part):
            problems.append(
                f"parts[{name!r}]={part!r} is a class: give an object of it, "
                f"{part.__name__}()"
            )
        elif not callable(part):
            problems.append(
                f"parts[{name!r}]={part!r} must be a keras.losses.Loss or a "
                "callable of labels and outputs"
            )
    names = [*parts, total, auxiliary]
    for name in names:
        if not isinstance(name, str) or not name:
            problems.append(f"the name {name!r} must be a text")
    for what, name in (("total", total), ("auxiliary", auxiliary)):
        if names.count(name) > 1:
            problems.append(
                f"{what}={name!r} must not be the name of anything else in the "
                "logs: rename it or that"
            )
    if weights is not None and not isinstance(weights, Mapping):
        problems.append(f"weights={weights!r} must be a dict by name, or None")
        weights = {}
    for name, weight in (weights or {}).items():
        if name not in parts:
            problems.append(
                f"weights has {name!r}, which is no part: the parts are "
                f"{list(parts)}"
            )
        if not (is_number(weight) or isinstance(weight, keras.Variable)):
            problems.append(
                f"weights[{name!r}]={weight!r} must be a finite number or a "
                "keras.Variable"
            )
    return problems
