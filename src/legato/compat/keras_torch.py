"""Keras's layers on PyTorch, without what makes them slow there."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras

from legato.compat.keras_tracing import only_here

Lstm = Callable[..., tuple[Any, Any, Any]]
"""Of `(inputs, h, c, kernel, recurrent_kernel, bias)`, the first of them
`[batch, time, features]`, the others as Keras has them: the outputs at all
times and the last h and c."""


def lstm_by_loop(*given: Any) -> tuple[Any, Any, Any]:
    """Keras's loop over time, as an `Lstm`."""
    _, outputs, states = _LOOP(*given, *_USUAL, True, True)
    return outputs, *states


# (`keras.src.backend.torch.rnn` is a function of that name.)
_RNN: Any = sys.modules["keras.src.backend.torch.rnn"]
_NN: Any = sys.modules["keras.src.backend.torch.nn"]
_LOOP: Any = _RNN._fallback_lstm
_USUAL = keras.activations.tanh, keras.activations.sigmoid


@contextlib.contextmanager
def bound_loops(lstm: Lstm, *, when: Callable[[Any], bool]) -> Iterator[None]:
    """While active: LSTM and GRU are not loops of Python.

    Not those with other functions than tanh and sigmoid, or without biases.
    (What has a mask, or dropout of its state, does not come to these loops.)

    Args:
        lstm: takes the place of one loop; PyTorch's own GRU that of the other.
        when: whether it may, for these inputs.
    """
    lstm_loop = _RNN._fallback_lstm
    gru_loop = _RNN._fallback_gru

    def is_usual(inputs: Any, bias: Any, *activations: Any) -> bool:
        return bias is not None and activations == _USUAL and when(inputs)

    @functools.wraps(lstm_loop)
    def chosen_lstm(
        inputs: Any, h: Any, c: Any, kernel: Any, recurrent: Any, bias: Any,
        activation: Any, recurrent_activation: Any, return_sequences: bool,
        batch_first: bool,
    ) -> Any:  # fmt: skip
        given = inputs, h, c, kernel, recurrent, bias
        functions = activation, recurrent_activation
        if not batch_first or not is_usual(inputs, bias, *functions):
            return lstm_loop(*given, *functions, return_sequences, batch_first)
        outputs, h, c = lstm(*given)
        last = outputs[:, -1]
        return last, outputs if return_sequences else last[:, None], [h, c]

    @functools.wraps(gru_loop)
    def chosen_gru(
        inputs: Any, h: Any, kernel: Any, recurrent: Any, bias: Any,
        activation: Any, recurrent_activation: Any, return_sequences: bool,
    ) -> Any:  # fmt: skip
        given = inputs, h, kernel, recurrent, bias
        functions = activation, recurrent_activation
        if not is_usual(inputs, bias, *functions):
            return gru_loop(*given, *functions, return_sequences)
        # (It is for GPUs that Keras has it.)
        return _RNN._cudnn_gru(*given, return_sequences, inputs.device)

    _RNN._fallback_lstm = only_here(chosen_lstm, lstm_loop)
    _RNN._fallback_gru = only_here(chosen_gru, gru_loop)
    try:
        yield
    finally:
        _RNN._fallback_lstm = lstm_loop
        _RNN._fallback_gru = gru_loop


@contextlib.contextmanager
def bound_transposition(
    transposed: Callable[[Any], Any], *, when: Callable[[Any], bool]
) -> Iterator[None]:
    """While active: convolutions and poolings copy no images.

    Keras copies what they are given so that the channels come first in memory,
    and before a convolution back again.

    Args:
        transposed: of `[batch, ..., channels]`, the same as `[batch, channels,
            ...]`.
        when: whether it can do it.
    """
    copied = _NN._transpose_spatial_inputs

    @functools.wraps(copied)
    def chosen(inputs: Any) -> Any:
        return (transposed if when(inputs) else copied)(inputs)

    _NN._transpose_spatial_inputs = only_here(chosen, copied)
    try:
        yield
    finally:
        _NN._transpose_spatial_inputs = copied
