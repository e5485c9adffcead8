"""Differentiation of a stateful-looking forward pass on JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.extend import core as jax_core

from legato.backends.differentiation import (
    Result,
    require_reached,
)
from legato.backends.jax.scope import StepScope, Traced, merging_cond
from legato.compat import keras_tracing


def value_and_grad(
    forward: Callable[[], Any],
    variables: list[keras.Variable],
    optimizer: keras.optimizers.Optimizer | None = None,
    *,
    as_keras: bool = False,
) -> tuple[Any, list[Any]]:
    """See `Backend.value_and_grad`."""
    current = keras_tracing.current_scope()
    outer = current if isinstance(current, StepScope) else None
    scope = StepScope(parent=outer, losses=True)

    results: list[Result] = []

    def run(*values: Any) -> tuple[Any, Any, Any]:
        given = dict(zip(map(id, variables), values, strict=True))
        scope.state_mapping |= given
        # (In Keras's own `fit` they flow through assignments, on JAX.)
        if not as_keras:
            around = {} if outer is None else outer.origins or {}
            scope.origins = {**around, **given}
        result = Result(forward())
        results.append(result)
        loss, aux = result.loss, result.aux
        scaled = loss if optimizer is None else optimizer.scale_loss(loss)
        return scaled, loss, aux

    lookup = outer or StepScope()
    values = [lookup.get_current_value(v) for v in variables]
    with keras_tracing.bound_cond(merging_cond if outer is None else None):
        traced = Traced(run, scope, *values)
    reached = reached_inputs(
        traced.closed.jaxpr, traced.closed.jaxpr.outvars[0]
    )
    require_reached(variables, reached)

    def scaled_loss(chosen: list[Any]) -> tuple[Any, list[Any]]:
        rest = iter(chosen)
        full = [
            next(rest) if r else v for v, r in zip(values, reached, strict=True)
        ]
        out = traced.replay(*full)
        return out[0], out

    (_, out), gradients = jax.value_and_grad(scaled_loss, has_aux=True)(
        [v for v, r in zip(values, reached, strict=True) if r]
    )
    _, loss, aux = traced.unflatten(out[: traced.num_arrays])
    new_values = out[traced.num_arrays :]
    for (variable, _), value in zip(scope.updates(), new_values, strict=True):
        if outer is None:
            variable.assign(value)
        else:
            outer.add_update((variable, value))
    rest = iter(gradients)
    gradients = [next(rest) if r else None for r in reached]
    return results[0].like_returned(loss, aux), gradients


def reached_inputs(jaxpr: Any, output: Any) -> list[bool]:
    """Which inputs of a program an output depends on differentiably.

    JAX gives zeros where the other backends give None, so the program is
    walked backwards: `stop_gradient` and integers end a path. Where a
    construct is not understood, its inputs count as reached.
    """
    return _walk(jaxpr, [v is output for v in jaxpr.outvars])


def _walk(jaxpr: Any, wanted: list[bool]) -> list[bool]:
    needed = {
        v
        for v, w in zip(jaxpr.outvars, wanted, strict=True)
        if w and _carries_gradient(v)
    }
    for eqn in reversed(jaxpr.eqns):
        outs = [v in needed for v in eqn.outvars]
        if any(outs):
            ins = _walk_equation(eqn, outs)
            needed.update(
                v
                for v, i in zip(eqn.invars, ins, strict=True)
                if i and _carries_gradient(v)
            )
    return [v in needed for v in jaxpr.invars]


def _carries_gradient(atom: Any) -> bool:
    return not isinstance(atom, jax_core.Literal) and jnp.issubdtype(
        atom.aval.dtype, jnp.inexact
    )


def _walk_equation(eqn: Any, outs: list[bool]) -> list[bool]:
    everything = [True] * len(eqn.invars)
    params = eqn.params
    match eqn.primitive.name:
        case "stop_gradient":
            return [False]
        case "jit" | "pjit" | "remat2" | "checkpoint" | "closed_call":
            inner = _open(params["jaxpr"])
        case "custom_jvp_call":
            inner = _open(params["call_jaxpr"])
        case "cond":
            branches = [_walk(_open(b), outs) for b in params["branches"]]
            return [False] + [any(used) for used in zip(*branches, strict=True)]
        case "scan":
            return _walk_scan(_open(params["jaxpr"]), params, outs)
        case _:
            return everything
    if len(inner.invars) != len(eqn.invars):
        return everything
    return _walk(inner, outs)


def _walk_scan(jaxpr: Any, params: Any, outs: list[bool]) -> list[bool]:
    """A carry that is reached in one iteration is wanted in the one before."""
    consts, carries = params["num_consts"], params["num_carry"]
    wanted = list(outs)
    while True:
        ins = _walk(jaxpr, wanted)
        grown = [
            w or used
            for w, used in zip(
                wanted[:carries], ins[consts : consts + carries], strict=True
            )
        ] + wanted[carries:]
        if grown == wanted:
            return ins
        wanted = grown


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, jax_core.ClosedJaxpr) else jaxpr
