"""Operators of ours, for what PyTorch's own cannot do in every kind of step.

They are the same where a step runs as Python, is replayed or compiled. (They
are registered like this and not by `custom_op`, whose wrapping takes longer
than a small operation.)
"""

from typing import Any

import torch

_LIBRARY = torch.library.Library("legato", "DEF")

# A copy that the compiler must make: Inductor (2.13) drops a clone of an input
# also where the input is changed in place later on, and the clone is read after
# that.
_LIBRARY.define(
    "own(Tensor value, *, MemoryFormat? memory_format=None) -> Tensor"
)
_LIBRARY.impl("own", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("legato::own", torch.clone)

# PyTorch's LSTM on a CPU, which is oneDNN's. (What it keeps for the gradient,
# its `workspace`, PyTorch's own operator returns only while autograd is on,
# which it is not where a recorded step runs; and it cannot be compiled.)
_LIBRARY.define(
    "lstm(Tensor inputs, Tensor kernel, Tensor recurrent, Tensor bias, "
    "Tensor h, Tensor c, bool training) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "lstm_backward(Tensor inputs, Tensor kernel, Tensor recurrent, "
    "Tensor bias, Tensor h, Tensor c, Tensor outputs, Tensor h_n, Tensor c_n, "
    "Tensor workspace, Tensor? outputs_grad, Tensor? h_grad, Tensor? c_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LSTM = 2  # among the kinds of recurrence that oneDNN knows


def _lstm(
    inputs: torch.Tensor,
    kernel: torch.Tensor,
    recurrent: torch.Tensor,
    bias: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    training: bool,
) -> tuple[torch.Tensor, ...]:
    # (oneDNN does not look, and reads and writes beyond what is too small.)
    state = inputs.shape[1], recurrent.shape[1]
    if not h.shape == c.shape == state or kernel.shape[1] != inputs.shape[2]:
        raise ValueError(f"states of the shape {tuple(h.shape)}, not {state}")
    with torch.set_grad_enabled(training):
        outputs, h_n, c_n, workspace = torch.ops.aten.mkldnn_rnn_layer(
            inputs, kernel, recurrent, bias, torch.zeros_like(bias), h, c,
            False, [], _LSTM, len(h[0]), 1, True, False, False, training,
        )  # fmt: skip
    if workspace is None:
        workspace = inputs.new_empty(0, dtype=torch.uint8)
    return outputs, h_n, c_n, workspace


def _lstm_backward(
    inputs: torch.Tensor,
    kernel: torch.Tensor,
    recurrent: torch.Tensor,
    bias: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    outputs: torch.Tensor,
    h_n: torch.Tensor,
    c_n: torch.Tensor,
    workspace: torch.Tensor,
    outputs_grad: torch.Tensor | None,
    h_grad: torch.Tensor | None,
    c_grad: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    found = torch.ops.aten.mkldnn_rnn_layer_backward(
        inputs, kernel, recurrent, bias, torch.zeros_like(bias), h, c, outputs,
        h_n, c_n, outputs_grad, h_grad, c_grad, False, _LSTM, len(h[0]), 1,
        True, True, False, [], False, workspace,
    )  # fmt: skip
    of_inputs, of_kernel, of_recurrent, of_bias, _, of_h, of_c = found
    return of_inputs, of_kernel, of_recurrent, of_bias, of_h, of_c


_LIBRARY.impl("lstm", _lstm, "CPU")
_LIBRARY.impl("lstm_backward", _lstm_backward, "CPU")


@torch.library.register_fake("legato::lstm")
def _(
    inputs: torch.Tensor, kernel: Any, recurrent: Any, bias: Any,
    h: torch.Tensor, c: torch.Tensor, training: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    outputs = inputs.new_empty((*inputs.shape[:2], h.shape[-1]))
    # How large it is nobody asks. (What is empty the compiler leaves out.)
    workspace = inputs.new_empty(1, dtype=torch.uint8)
    return outputs, torch.empty_like(h), torch.empty_like(c), workspace


@torch.library.register_fake("legato::lstm_backward")
def _(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(each.new_empty(each.shape) for each in given[:6])


own: Any = torch.ops.legato.own.default
lstm: Any = torch.ops.legato.lstm.default
lstm_backward: Any = torch.ops.legato.lstm_backward.default
