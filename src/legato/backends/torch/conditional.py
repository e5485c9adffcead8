"""`keras.ops.cond` on PyTorch.

Keras's own is an `if`: it runs one branch. That is right while steps run one
by one (`plain_cond`), but not while a step is examined (`probing_cond`: what
does it use, in whichever branch?) or captured whole (`merging_cond`).
"""

from collections.abc import Callable
from typing import Any

import keras
import torch

from legato.backends.torch.randomness import kept_random_state
from legato.backends.torch.scope import ExaminingScope, IsolatedScope, StepScope
from legato.compat import keras_tracing
from legato.errors import StepError

Branch = Callable[[], Any]


def plain_cond(pred: Any, true_fn: Branch, false_fn: Branch) -> Any:
    """Run the branch that is taken."""
    taken = bool(pred)
    scope = keras_tracing.current_scope()
    branch = true_fn if taken else false_fn
    if not isinstance(scope, StepScope):
        return _run(branch)
    with scope.root.branch(scope.root.meet("cond"), taken):
        return _run(branch)


def probing_cond(pred: Any, true_fn: Branch, false_fn: Branch) -> Any:
    """Run both branches; the one not taken leaves nothing behind.

    Its variables become known, and autograd connects it: with zeros, which
    tell only that a variable is reached.
    """
    outer = keras_tracing.current_scope()
    if not isinstance(outer, StepScope):
        return plain_cond(pred, true_fn, false_fn)
    root = outer.root
    place = root.meet("cond")
    is_true = bool(pred)
    taken, other = (true_fn, false_fn) if is_true else (false_fn, true_fn)
    scope = ExaminingScope(parent=outer, losses=outer.collect_losses)
    with kept_random_state():
        try:
            with root.branch(place, not is_true), scope:
                unused = _run(other)
        finally:
            changed = scope.roll_back()
    if isinstance(root, ExaminingScope):
        root.changed_elsewhere |= changed
    with root.branch(place, is_true):
        used = _run(taken)
    _check_structures(used, unused)
    return keras.tree.map_structure(_connected, used, unused)


Note = Callable[[Any, str], None]
"""Called with a condition, and with what of it comes now or is done."""


def merging_cond(
    pred: Any,
    true_fn: Branch,
    false_fn: Branch,
    *,
    note: Note,
) -> Any:
    """Run both branches, and select what they return and assign.

    For steps that are captured whole. Nothing may be differentiated through
    it: the gradient of a selection is wrong where the branch not taken is not
    finite.

    Args:
        pred: the condition.
        true_fn: one branch.
        false_fn: the other.
        note: is told what begins: "true", "false", "select", "end".

    Raises:
        NotImplementedError: in `forward`.
    """
    outer = keras_tracing.current_scope()
    if not isinstance(outer, StepScope):
        return plain_cond(pred, true_fn, false_fn)
    if torch.is_grad_enabled():
        raise NotImplementedError("keras.ops.cond is used inside `forward`")
    place = outer.root.meet("cond")
    pred = keras.ops.convert_to_tensor(pred, "bool")
    results, scopes = [], []
    for taken, branch in ((True, true_fn), (False, false_fn)):
        note(pred, "true" if taken else "false")
        scope = IsolatedScope(outer)
        with outer.root.branch(place, taken), scope:
            results.append(_run(branch))
        scopes.append(scope)
    _check_structures(*results)
    note(pred, "select")

    def select(a: Any, b: Any) -> Any:
        return torch.where(pred, a, b) if isinstance(a, torch.Tensor) else a

    first, second = scopes
    for key, variable in (first.changed() | second.changed()).items():
        value = outer.get_current_value(variable)
        values = [s.state_mapping.get(key, value) for s in scopes]
        outer.add_update((variable, select(*values)))
    selected = keras.tree.map_structure(select, *results)
    note(pred, "end")
    return selected


def _run(branch: Branch) -> Any:
    """Numbers become tensors, as they do on the other backends."""
    return keras.tree.map_structure(
        lambda x: x if x is None else keras.ops.convert_to_tensor(x), branch()
    )


def _check_structures(a: Any, b: Any) -> None:
    structures = [
        keras.tree.map_structure(lambda x: None if x is None else ".", each)
        for each in (a, b)
    ]
    if structures[0] != structures[1]:
        raise StepError(
            "The two branches of keras.ops.cond return different structures: "
            f"{structures[0]} and {structures[1]}. Return the same from both."
        )


def _connected(used: Any, unused: Any) -> Any:
    """`used`, through which autograd also reaches what made `unused`."""
    tensors = isinstance(used, torch.Tensor) and used.is_floating_point()
    if not tensors or not (used.requires_grad or unused.requires_grad):
        return used
    return _Connected.apply(used, unused)


class _Connected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, used: Any, unused: Any) -> Any:
        ctx.save_for_backward(unused)
        return used.view_as(used)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (unused,) = ctx.saved_tensors
        return gradients[0], torch.zeros_like(unused)
