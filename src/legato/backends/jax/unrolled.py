"""Replays a traced program with its random bits computed in one go.

JAX computes Threefry, which stands behind dropout, in a loop of five rounds
on a CPU (elsewhere it is unrolled). Inside a device loop that is a loop in a
loop, whose parts XLA cannot fuse with what surrounds them: for a small network
with dropout it took half of the time of a step. The bits are the same either
way: they are integers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core
from jax.extend.core import primitives

# Threefry-2x32 with 20 rounds (Salmon et al., Parallel random numbers: as easy
# as 1, 2, 3; 2011).
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def replay(closed: jax_core.ClosedJaxpr, *inputs: Any) -> list[Any]:
    """What the program computes, with unrolled random bits on a CPU."""
    if jax.default_backend() != "cpu" or not _draws(closed.jaxpr):
        return jax_core.jaxpr_as_fun(closed)(*inputs)
    return _evaluate(closed, inputs)


def _draws(jaxpr: Any) -> bool:
    return any(
        eqn.primitive is primitives.random_bits_p
        or any(map(_draws, jax_core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _evaluate(closed: Any, inputs: Any) -> list[Any]:
    """Equation by equation; only calls that draw bits are looked into."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, inputs, strict=True)
    for eqn in jaxpr.eqns:
        read = [
            v.val if isinstance(v, jax_core.Literal) else values[v]
            for v in eqn.invars
        ]
        inner = eqn.params.get("jaxpr")
        with eqn.ctx.manager:
            if eqn.primitive is primitives.random_bits_p:
                out: Any = _random_bits(*read, eqn)
            elif eqn.primitive is primitives.jit_p and _draws(inner.jaxpr):
                out = _evaluate(inner, read)
            else:
                out = _bind(eqn, read)
        if not eqn.primitive.multiple_results:
            out = [out]
        values |= zip(eqn.outvars, out, strict=True)
    return [
        v.val if isinstance(v, jax_core.Literal) else values[v]
        for v in jaxpr.outvars
    ]


def _bind(eqn: Any, inputs: list[Any]) -> Any:
    params = eqn.primitive.get_bind_params(eqn.params)
    return eqn.primitive.bind(*inputs, **params)


def _random_bits(key: Any, eqn: Any) -> Any:
    """As `jax.random.bits` with 32 bits; what is unlike that is left to it."""
    config: Any = jax.config  # its flags are not typed
    shape = eqn.params["shape"]
    size = math.prod(shape)
    if (
        eqn.params["bit_width"] != 32
        or key.shape != ()
        or str(jax.random.key_impl(key)) != "threefry2x32"
        or not config.jax_threefry_partitionable
        or not 0 < size < 2**32
    ):
        return _bind(eqn, [key])
    first, second = jax.random.key_data(key)
    keys = [first, second, first ^ second ^ _PARITY]
    # The counter of each number is its position: the high words are zero.
    x = jnp.full(shape, first)
    y = jax.lax.iota(np.uint32, size).reshape(shape) + second
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
            y = x ^ y
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x ^ y
