"""Layers whose `call` is not what a step should run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import torch

from legato.backends.torch import operators
from legato.backends.torch.scope import StepScope
from legato.compat import keras_torch, keras_tracing
from legato.errors import StepError


@contextlib.contextmanager
def layers_of_step() -> Iterator[None]:
    """While a step runs: PyTorch's modules use the scope's values.

    A module in a `TorchModuleWrapper` reads its own parameters, past the Keras
    variables that stand for them, so that autograd would not reach these.

    And Keras's do without what makes them slow on PyTorch: images are not
    copied before convolutions, LSTM and GRU are no loops in Python, and
    accuracies among the first k sort nothing.
    """
    cls: Any = keras.layers.TorchModuleWrapper
    original = cls.call
    cls.call = keras_tracing.only_here(_call_module, original)
    try:
        with keras_torch.replaced(_REPLACEMENTS):
            yield
    finally:
        cls.call = original


def _call_module(
    layer: Any, *args: Any, training: bool | None = None, **kwargs: Any
) -> Any:
    module = layer.module
    buffers = [name for name, _ in module.named_buffers()]
    if buffers:
        raise StepError(
            f"The PyTorch module in the layer {layer.name!r} has buffers "
            f"({', '.join(buffers[:3])}), which are no Keras variables and "
            "would not be part of the run's state. Use Keras's own layer in "
            "its place, such as keras.layers.BatchNormalization."
        )
    variables = {id(v._value): v for v in layer.variables}
    values = {
        name: variables[id(parameter)].value
        for name, parameter in module.named_parameters()
        if id(parameter) in variables
    }
    # As Keras's own `call` does.
    layer.train(training is not False)
    return torch.func.functional_call(module, values, args, kwargs)


def _may_replace() -> bool:
    """Whether layers run in a step of ours, on whole tensors.

    A model's own step runs as in Keras. `vmap`, as in
    keras.ops.vectorized_map, knows no formats of memory, nor what is fused.
    """
    return (
        isinstance(keras_tracing.current_scope(), StepScope)
        and not torch._C._are_functorch_transforms_active()
    )


def _are_images(inputs: torch.Tensor) -> bool:
    return inputs.ndim in _CHANNELS_LAST and _may_replace()


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _transposed(inputs: torch.Tensor) -> torch.Tensor:
    """Channels first to whoever asks, and last in memory, as they come."""
    # (A copy only of what is not in one piece.)
    return inputs.movedim(-1, 1).contiguous(
        memory_format=_CHANNELS_LAST[inputs.ndim]
    )


def _can_fuse(inputs: torch.Tensor) -> bool:
    """Whether a recurrence may be one operation here."""
    return (
        _may_replace()
        and inputs.device.type == "cpu"
        and inputs.dtype is torch.float32
        and inputs.numel() > 0
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
    )


def _lstm(
    inputs: torch.Tensor, *others: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Replacements`: 4 to 20 times as fast as Keras's."""
    outputs, h, c = _Lstm.apply(inputs.transpose(0, 1), *others)
    return outputs.transpose(0, 1), h, c


class _Lstm(torch.autograd.Function):
    """The same of `[time, batch, features]`."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        h: torch.Tensor,
        c: torch.Tensor,
        kernel: torch.Tensor,
        recurrent: torch.Tensor,
        bias: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        given = (
            inputs.contiguous(),
            kernel.t().contiguous(),
            recurrent.t().contiguous(),
            bias,
            h.contiguous(),
            c.contiguous(),
        )
        training = any(ctx.needs_input_grad)
        *found, workspace = operators.lstm(*given, training)
        if training:
            ctx.set_materialize_grads(False)
            taken = inputs, h, c, kernel, recurrent, bias
            ctx.save_for_backward(*taken, *given, *found, workspace)
        return tuple(found)

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Who differentiates a gradient has it from the loop.
            return _by_loop(ctx.saved_tensors[:6], gradients)
        x, kernel, recurrent, bias, h, c = operators.lstm_backward(
            *ctx.saved_tensors[6:], *gradients
        )
        return x, h, c, kernel.t(), recurrent.t(), bias


def _by_loop(
    given: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor | None, ...]:
    # Each is cut off from the others, one of which it may be made of.
    inputs, *others = given = tuple(t.view_as(t) for t in given)
    outputs, h, c = keras_torch.lstm_by_loop(inputs.transpose(0, 1), *others)
    found = zip((outputs.transpose(0, 1), h, c), gradients, strict=True)
    used = [(out, g) for out, g in found if g is not None]
    wanted = [tensor for tensor in given if tensor.requires_grad]
    parts = iter(
        torch.autograd.grad(
            [out for out, _ in used],
            wanted,
            [g for _, g in used],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(parts) if t.requires_grad else None for t in given)


def _in_top_k(targets: Any, predictions: Any, k: int) -> torch.Tensor:
    """By counting, which can be part of a compiled program as sorting cannot.

    A NaN is above all others, and a target that is one is never among them.
    """
    targets, predictions = map(
        keras.ops.convert_to_tensor, (targets, predictions)
    )
    targets = targets.to(torch.int64)[:, None]
    values = torch.take_along_dim(predictions, targets, dim=-1)
    not_above = (predictions <= values).sum(-1)
    return not_above > predictions.shape[-1] - k


_REPLACEMENTS = keras_torch.Replacements(
    _lstm, _can_fuse, _transposed, _are_images, _in_top_k
)
