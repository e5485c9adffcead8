"""Where the values of variables live while a step is traced on JAX."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.extend import core as jax_core

from legato.backends.scope import (
    RecordingScope,
    initial_value,
    own_dtype,
)
from legato.compat import keras_tracing
from legato.errors import StepError


class StepScope(RecordingScope):
    """Holds the values of variables; see `RecordingScope`.

    The outermost one of a step holds the loop's state, and notes each
    variable that is asked for and not among it: a variable unknown to the
    loop would be baked into the program as a constant.

    Args:
        values: variables and their values.
        parent: the scope around this one.
        losses: whether `add_loss` collects here and `model.losses` may be
            read.

    Attributes:
        origins: by ids of variables, what is differentiated by here: no
            gradient flows through what is assigned. None where nothing is,
            or where gradients do flow.
    """

    def __init__(
        self,
        values: Iterable[tuple[keras.Variable, Any]] = (),
        *,
        parent: "StepScope | None" = None,
        losses: bool = False,
    ) -> None:
        super().__init__(parent=parent, losses=losses)
        self.state_mapping = {id(v): value for v, value in values}
        self.unknown: dict[int, keras.Variable] = {}
        self.origins: Mapping[int, Any] | None = parent and parent.origins

    def get_current_value(self, variable: keras.Variable) -> Any:
        value = self.state_mapping.get(id(variable))
        if self.parent is None:
            self.read[id(variable)] = variable
        if value is not None:
            return value
        if self.parent is not None:
            return self.parent.get_current_value(variable)
        self.unknown[id(variable)] = variable
        return initial_value(variable)

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        variable, value = update
        if self.parent is None and id(variable) not in self.state_mapping:
            self.unknown[id(variable)] = variable
        self.updated[id(variable)] = variable
        # A weak type (from a Python number) would change the carry's type.
        value = jax.lax.convert_element_type(value, own_dtype(variable))
        if self.origins is not None and jnp.issubdtype(
            value.dtype, jnp.inexact
        ):
            value = jax.lax.stop_gradient(value)
            if id(variable) in self.origins:
                value = _assigned(value, self.origins[id(variable)])
        self.state_mapping[id(variable)] = value

    def updates(self) -> list[tuple[keras.Variable, Any]]:
        """Variables assigned in this scope, and their last values."""
        return [(v, self.state_mapping[key]) for key, v in self.updated.items()]


@jax.custom_jvp
def _assigned(value: Any, origin: Any) -> Any:
    """A value that was assigned to a variable: its gradient is the variable's.

    Args:
        value: the value.
        origin: what is differentiated by, for the variable.
    """
    # (So that it can be seen in the program that it depends on both.)
    return jnp.where(True, value, origin)


@_assigned.defjvp
def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
    return _assigned(*primals), tangents[1]


class Traced:
    """A function run once in a scope, as a JAX program that can be replayed.

    Attributes:
        scope: where it ran.
        tree: the structure of what the function returned.
        is_array: which leaves of it are arrays.
        closed: the program, with outputs `[array leaves of out]` followed by
            `[new values of scope.updates()]`.
    """

    def __init__(
        self, function: Callable[[], Any], scope: StepScope, *inputs: Any
    ) -> None:
        self.scope = scope
        self.tree: Any = None
        self.is_array: list[bool] = []
        self._static: list[Any] = []

        def run(*arguments: Any) -> list[Any]:
            with scope:
                out = function(*arguments)
            leaves, self.tree = jax.tree.flatten(out)
            self.is_array = [_is_array(leaf) for leaf in leaves]
            self._static = [
                None if is_array else leaf
                for leaf, is_array in zip(leaves, self.is_array, strict=True)
            ]
            arrays = [leaf for leaf in leaves if _is_array(leaf)]
            return arrays + [value for _, value in scope.updates()]

        self.closed = jax.make_jaxpr(run)(*inputs)
        self.num_arrays = sum(self.is_array)

    def replay(self, *inputs: Any) -> list[Any]:
        """The flat outputs; see `closed`."""
        return jax_core.jaxpr_as_fun(self.closed)(*inputs)

    def unflatten(self, arrays: list[Any]) -> Any:
        """What the function returned, with these in place of its arrays."""
        rest = iter(arrays)
        leaves = [
            next(rest) if is_array else static
            for static, is_array in zip(
                self._static, self.is_array, strict=True
            )
        ]
        return jax.tree.unflatten(self.tree, leaves)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)


def merging_cond(
    pred: Any, true_fn: Callable[[], Any], false_fn: Callable[[], Any]
) -> Any:
    """`ops.cond` in which a branch may assign variables.

    Each branch is traced in a scope of its own; the conditional returns, with
    its result, the new value of every variable that either one assigns.
    """
    outer = keras_tracing.current_scope()
    if not isinstance(outer, StepScope):
        return keras_tracing.native_cond(pred, true_fn, false_fn)
    branches = [
        # Numbers become arrays, since only those leave a conditional.
        Traced(
            lambda fn=fn: jax.tree.map(jnp.asarray, fn()),
            StepScope(parent=outer),
        )
        for fn in (true_fn, false_fn)
    ]
    assigned = branches[0].scope.updated | branches[1].scope.updated
    if branches[0].tree != branches[1].tree or (
        branches[0].is_array != branches[1].is_array
    ):
        raise StepError(
            "The two branches of keras.ops.cond return different structures: "
            f"{branches[0].tree} and {branches[1].tree}. Return the same "
            "from both."
        )

    def make(branch: Traced) -> Callable[[], Any]:
        def run() -> tuple[list[Any], list[Any]]:
            flat = branch.replay()
            new = dict(
                zip(
                    branch.scope.updated,
                    flat[branch.num_arrays :],
                    strict=True,
                )
            )
            values = [
                new[key] if key in new else outer.get_current_value(variable)
                for key, variable in assigned.items()
            ]
            return flat[: branch.num_arrays], values

        return run

    arrays, values = jax.lax.cond(pred, make(branches[0]), make(branches[1]))
    for variable, value in zip(assigned.values(), values, strict=True):
        outer.add_update((variable, value))
    return branches[0].unflatten(arrays)
