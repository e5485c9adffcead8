"""Keras's layers and metrics on PyTorch, without what makes them slow there.

Keras is patched once, when this is imported, by functions that do what Keras
does but in a thread that asks for something else (`replaced`).
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras

_USUAL = keras.activations.tanh, keras.activations.sigmoid


class Replacements(NamedTuple):
    """What takes the place of Keras's.

    Attributes:
        lstm: of `(inputs, h, c, kernel, recurrent_kernel, bias)`, the first of
            them `[batch, time, features]`, the states `[batch, units]`, the
            others as Keras has them: the outputs at all times, and the last h
            and c.
        may_fuse: whether a recurrence of such inputs may be one operation:
            `lstm`, or PyTorch's own GRU, which Keras has for GPUs.
        transposed: of `[batch, ..., channels]`, the same as `[batch, channels,
            ...]`: Keras copies images so that the channels come first in
            memory, and before a convolution back again.
        may_transpose: whether that can be done.
        in_top_k: of targets `[batch]`, predictions `[batch, classes]` and k:
            whether each is among the k largest of its row, `[batch]`.
    """

    lstm: Callable[..., tuple[Any, Any, Any]]
    may_fuse: Callable[[Any], bool]
    transposed: Callable[[Any], Any]
    may_transpose: Callable[[Any], bool]
    in_top_k: Callable[[Any, Any, int], Any]


_in_thread = threading.local()


@contextlib.contextmanager
def replaced(replacements: Replacements) -> Iterator[None]:
    """While active, in this thread: layers run these."""
    before = getattr(_in_thread, "replacements", None)
    _in_thread.replacements = replacements
    try:
        yield
    finally:
        _in_thread.replacements = before


def lstm_by_loop(*given: Any) -> tuple[Any, Any, Any]:
    """Keras's loop over time, as `Replacements.lstm`."""
    loop = _RNN._fallback_lstm.__wrapped__
    _, outputs, states = loop(*given, *_USUAL, True, True)
    return outputs, *states


def _replacing(
    loop: Callable[..., Any], choose: Callable[..., Any]
) -> Callable[..., Any]:
    """Keras's function where nothing else is asked for, else a choice."""

    @functools.wraps(loop)
    def chosen(*given: Any, **named: Any) -> Any:
        replacements = getattr(_in_thread, "replacements", None)
        if replacements is None or named:
            return loop(*given, **named)
        return choose(replacements, loop, *given)

    return chosen


def _is_usual(
    replacements: Replacements, inputs: Any, states: tuple[Any, ...],
    recurrent: Any, bias: Any, *activations: Any,
) -> bool:  # fmt: skip
    """Whether it is the recurrence that PyTorch has too.

    (What has a mask, or dropout of its state, does not come here.)
    """
    # Keras's loops take a state of another shape that can be broadcast.
    shape = inputs.shape[0], recurrent.shape[0]
    return (
        bias is not None
        and activations == _USUAL
        and all(tuple(state.shape) == shape for state in states)
        and replacements.may_fuse(inputs)
    )


def _choose_lstm(
    replacements: Replacements, loop: Any, inputs: Any, h: Any, c: Any,
    kernel: Any, recurrent: Any, bias: Any, activation: Any,
    recurrent_activation: Any, return_sequences: bool, batch_first: bool,
) -> Any:  # fmt: skip
    given = inputs, h, c, kernel, recurrent, bias
    functions = activation, recurrent_activation
    if not batch_first or not _is_usual(
        replacements, inputs, (h, c), recurrent, bias, *functions
    ):
        return loop(*given, *functions, return_sequences, batch_first)
    outputs, h, c = replacements.lstm(*given)
    last = outputs[:, -1]
    return last, outputs if return_sequences else last[:, None], [h, c]


def _choose_gru(
    replacements: Replacements, loop: Any, inputs: Any, h: Any, kernel: Any,
    recurrent: Any, bias: Any, activation: Any, recurrent_activation: Any,
    return_sequences: bool,
) -> Any:  # fmt: skip
    given = inputs, h, kernel, recurrent, bias
    functions = activation, recurrent_activation
    if not _is_usual(replacements, inputs, (h,), recurrent, bias, *functions):
        return loop(*given, *functions, return_sequences)
    return _RNN._cudnn_gru(*given, return_sequences, inputs.device)


def _choose_transposition(
    replacements: Replacements, copied: Any, inputs: Any
) -> Any:
    if replacements.may_transpose(inputs):
        return replacements.transposed(inputs)
    return copied(inputs)


def _choose_in_top_k(
    replacements: Replacements,
    sorting: Any,
    targets: Any,
    predictions: Any,
    k: int,
) -> Any:
    shape = getattr(predictions, "shape", (0,))
    if not 1 <= k <= shape[-1]:  # Keras takes lists, and refuses such a k
        return sorting(targets, predictions, k)
    return replacements.in_top_k(targets, predictions, k)


# (`keras.src.backend.torch.rnn` is a function of that name.)
_RNN: Any = sys.modules["keras.src.backend.torch.rnn"]
_NN: Any = sys.modules["keras.src.backend.torch.nn"]
_MATH: Any = sys.modules["keras.src.backend.torch.math"]

for module, name, choose in (
    (_RNN, "_fallback_lstm", _choose_lstm),
    (_RNN, "_fallback_gru", _choose_gru),
    (_NN, "_transpose_spatial_inputs", _choose_transposition),
    (_MATH, "in_top_k", _choose_in_top_k),
):
    # Where another version of Keras has none, it is left as it is.
    if hasattr(module, name):
        setattr(module, name, _replacing(getattr(module, name), choose))
