"""Differentiation of a forward pass on PyTorch."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import keras
import torch

from legato.backends.differentiation import (
    Result,
    require_reached,
)
from legato.backends.torch.conditional import plain_cond, probing_cond
from legato.backends.torch.layers import layers_of_step
from legato.backends.torch.randomness import kept_random_state
from legato.backends.torch.scope import (
    ExaminingScope,
    StepScope,
    leaf_of,
)
from legato.compat import keras_tracing


def value_and_grad(
    forward: Callable[[], Any],
    variables: list[keras.Variable],
    optimizer: keras.optimizers.Optimizer | None = None,
    *,
    as_keras: bool = False,
) -> tuple[Any, list[Any]]:
    """See `Backend.value_and_grad`."""
    del as_keras  # they are dense here
    outer = keras_tracing.current_scope()
    if isinstance(outer, StepScope):
        return _differentiate(forward, variables, optimizer, outer)
    # Outside of a step it is one by itself: examined, then run.
    probe = ExaminingScope()
    with (
        torch.no_grad(),
        keras_tracing.bound_cond(probing_cond),
        layers_of_step(),
        kept_random_state(),
    ):
        try:
            with probe:
                _differentiate(forward, variables, optimizer, probe)
        finally:
            probe.roll_back()
    scope = StepScope(reached=probe.reached)
    with (
        torch.no_grad(),
        keras_tracing.bound_cond(plain_cond),
        layers_of_step(),
    ):
        with scope:
            found = _differentiate(forward, variables, optimizer, scope)
        scope.commit()
    return found


def _differentiate(
    forward: Callable[[], Any],
    variables: list[keras.Variable],
    optimizer: keras.optimizers.Optimizer | None,
    outer: StepScope,
) -> tuple[Any, list[Any]]:
    # Steps run without autograd, and `forward` with it.
    is_nested = torch.is_grad_enabled()
    scope = StepScope(parent=outer, losses=True, in_forward=True)
    with torch.enable_grad(), scope:
        leaves = [leaf_of(scope.get_current_value(v)) for v in variables]
        for variable, leaf in zip(variables, leaves, strict=True):
            scope.hold(variable, leaf)
        found = {
            id(variable): [leaf]
            for variable, leaf in zip(variables, leaves, strict=True)
        }
        scope.leaves = (*outer.leaves, found)
        result = Result(forward())
        scaled = result.loss
        if optimizer is not None:
            scaled = optimizer.scale_loss(scaled)
        gradients = _gradients(
            scaled,
            [found[id(v)] for v in variables],
            create_graph=is_nested,
        )
    reached = outer.root.note_reached([g is not None for g in gradients])
    require_reached(variables, reached)
    gradients = [
        torch.zeros_like(leaf) if gradient is None and is_reached else gradient
        for leaf, gradient, is_reached in zip(
            leaves, gradients, reached, strict=True
        )
    ]
    if is_nested:
        scope.commit()
        return result.like_returned(result.loss, result.aux), gradients
    scope.commit(detached=True)
    own = outer.root.own
    aux = keras.tree.map_structure(own, result.aux)
    return result.like_returned(own(result.loss), aux), gradients


def _gradients(
    loss: torch.Tensor,
    leaves: list[list[torch.Tensor]],
    *,
    create_graph: bool,
) -> list[torch.Tensor | None]:
    """The gradient for each variable, which may have several leaves."""
    wanted = [leaf for each in leaves for leaf in each if leaf.requires_grad]
    if not wanted or not loss.requires_grad:
        return [None] * len(leaves)
    parts: Any = torch.autograd.grad(
        loss, wanted, allow_unused=True, create_graph=create_graph
    )
    by_leaf = dict(zip(map(id, wanted), parts, strict=True))
    gradients: list[torch.Tensor | None] = []
    for each in leaves:
        reached = [
            part for leaf in each if (part := by_leaf.get(id(leaf))) is not None
        ]
        gradients.append(
            functools.reduce(operator.add, reached) if reached else None
        )
    return gradients
