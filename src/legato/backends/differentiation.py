"""What `value_and_grad` asks of its arguments, on every backend."""

from collections.abc import Sequence
from typing import Any

import keras

from legato.errors import StepError


def require_variables(
    variables: Sequence[keras.Variable],
) -> list[keras.Variable]:
    """The variables to differentiate by.

    Raises:
        StepError: there are none.
    """
    found = list(variables)
    if not found:
        raise StepError(
            "value_and_grad was given no variables. Give it the trainable "
            "ones, such as model.trainable_variables; the model must be built "
            "and not frozen."
        )
    return found


class Result:
    """What `forward` returned: a loss, or a pair of a loss and `aux`.

    Args:
        returned: by `forward`.

    Attributes:
        loss: a float scalar tensor.
        aux: the rest; None where there is none.

    Raises:
        StepError: the loss is not a scalar.
    """

    def __init__(self, returned: Any) -> None:
        self._is_pair = isinstance(returned, tuple) and len(returned) == 2
        loss, self.aux = returned if self._is_pair else (returned, None)
        self.loss = _check_loss(loss)

    def like_returned(self, loss: Any, aux: Any) -> Any:
        """These values in the structure that `forward` returned."""
        return (loss, aux) if self._is_pair else loss


def _check_loss(loss: Any) -> Any:
    what = "`forward` returned"
    if loss is None or isinstance(loss, str | dict):
        raise StepError(
            f"{what} {loss!r} as the loss: it must be a scalar tensor."
        )
    loss = keras.ops.convert_to_tensor(loss)
    if tuple(loss.shape) != ():
        raise StepError(
            f"{what} a loss of shape {tuple(loss.shape)}: it must be a "
            "scalar. Reduce it, for example with keras.ops.mean."
        )
    dtype = keras.backend.standardize_dtype(loss.dtype)
    if not keras.backend.is_float_dtype(dtype):
        raise StepError(f"{what} a loss of dtype {dtype}: it must be a float.")
    return loss


def require_reached(
    variables: Sequence[keras.Variable], reached: Sequence[bool]
) -> None:
    """Check that the loss depends on any of the variables.

    Raises:
        StepError: on none of them.
    """
    if not any(reached):
        names = ", ".join(v.path for v in variables[:5])
        raise StepError(
            f"The loss depends on none of the {len(variables)} variables "
            f"({names}, ...): every gradient would be None. Compute the loss "
            "inside `forward` from what the model returned there."
        )
