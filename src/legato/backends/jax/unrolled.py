"""Replays a traced program with what XLA is slow at on a CPU written anew.

JAX computes Threefry, which stands behind dropout, in a loop of five rounds
on a CPU (elsewhere it is unrolled). Inside a device loop that is a loop in a
loop, whose parts XLA cannot fuse with what surrounds them: for a small network
with dropout it took half of the time of a step. The bits are the same either
way: they are integers.

The gradient of a maximum over windows is, for XLA, a search through each
window, and then a sum over all places that a gradient may go to: a third of
the time of a small convolutional network. Where windows do not overlap, as in
most networks, each place has one gradient or none, and no sum is needed.
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

_MAX_WINDOW = 16
"""Numbers in a window: each becomes an operation of its own."""


def replay(closed: jax_core.ClosedJaxpr, *inputs: Any) -> list[Any]:
    """What the program computes, some of it in another way on a CPU."""
    if jax.default_backend() != "cpu" or not _is_slow(closed.jaxpr):
        return jax_core.jaxpr_as_fun(closed)(*inputs)
    return _evaluate(closed, inputs)


def _is_slow(jaxpr: Any) -> bool:
    return any(
        eqn.primitive is primitives.random_bits_p
        or eqn.primitive is primitives.select_and_scatter_add_p
        or any(map(_is_slow, jax_core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _evaluate(closed: Any, inputs: Any) -> list[Any]:
    """Equation by equation; only calls of what is slow are looked into."""
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
            elif eqn.primitive is primitives.select_and_scatter_add_p:
                out = _scatter_to_selected(*read, eqn)
            elif eqn.primitive is primitives.jit_p and _is_slow(inner.jaxpr):
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


def _scatter_to_selected(source: Any, operand: Any, eqn: Any) -> Any:
    """Each number of `source` at the place of the maximum of its window.

    As `lax.select_and_scatter_add`: at the first of those that are equal.
    What is unlike the gradient of usual max-pooling is left to it.
    """
    windows = eqn.params["window_dimensions"]
    if (
        eqn.params["select_prim"] is not primitives.ge_p
        or windows != eqn.params["window_strides"]
        or any(map(any, eqn.params["padding"]))
        or math.prod(windows) > _MAX_WINDOW
    ):
        return _bind(eqn, [source, operand])
    counts = source.shape
    best, stays = None, []
    for offsets in np.ndindex(*windows):
        part = jax.lax.slice(
            operand,
            offsets,
            [o + (c - 1) * w + 1
             for o, c, w in zip(offsets, counts, windows, strict=True)],
            windows,
        )  # fmt: skip
        if best is None:
            best = part
            continue
        stays.append(best >= part)
        best = jnp.where(stays[-1], best, part)
    # The last that took the place of the best one is it. (The place as a
    # number would be shorter; XLA takes three times as long for it.)
    parts, stayed = [], jnp.ones(counts, bool)
    zero = np.zeros((), source.dtype)
    for stay in reversed(stays):
        parts.insert(0, jnp.where(~stay & stayed, source, zero))
        stayed = stay & stayed
    parts.insert(0, jnp.where(stayed, source, zero))
    # Interleaved, axis by axis.
    for axis in reversed(range(len(windows))):
        size = windows[axis]
        parts = [
            _interleave(parts[first : first + size], axis)
            for first in range(0, len(parts), size)
        ]
    (spread,) = parts
    rest = [
        (0, whole - covered, 0)
        for whole, covered in zip(operand.shape, spread.shape, strict=True)
    ]
    return jax.lax.pad(spread, zero, rest)


def _interleave(parts: list[Any], axis: int) -> Any:
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] *= len(parts)
    return jnp.stack(parts, axis + 1).reshape(shape)
