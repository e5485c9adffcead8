"""Random bits computed in one go are those that JAX computes in a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from legato.backends.jax import unrolled

DRAWS = {
    "bits": jax.random.bits,
    "bytes": lambda key, shape: jax.random.bits(key, shape, jnp.uint8),
    "normal": jax.random.normal,
    "bernoulli": lambda key, shape: jax.random.bernoulli(key, 0.3, shape),
    "randint": lambda key, shape: jax.random.randint(key, shape, 0, 7),
}


def check(function, key):
    closed = jax.make_jaxpr(function)(key)
    expected = jax.jit(function)(key)
    (found,) = jax.jit(lambda key: unrolled.replay(closed, key))(key)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    return closed


@pytest.mark.parametrize("shape", [(), (5,), (32, 64), (3, 0), (2, 3, 4)])
@pytest.mark.parametrize("draw", DRAWS)
def test_draws_are_those_of_jax(draw, shape):
    for seed in (0, 2**31):
        check(lambda key: DRAWS[draw](key, shape), jax.random.key(seed))


@pytest.mark.parametrize(
    "function",
    [
        lambda key: jax.vmap(lambda k: jax.random.normal(k, (3,)))(
            jax.random.split(key, 4)
        ),
        lambda key: jax.lax.cond(
            key[0] > 0,
            lambda: jax.random.normal(key, (2,)),
            lambda: jnp.ones(2),
        ),
        lambda key: jax.random.permutation(key, 10),
        lambda key: jax.random.normal(jax.random.key(3), (2,)) + key[0],
        lambda key: jax.random.bits(
            jax.random.key(key[0], impl="rbg"), (3,), jnp.uint32
        ),
    ],
)
def test_what_is_left_alone_still_runs(function):
    check(function, jax.random.PRNGKey(7))


def test_no_inner_loop_is_left():
    function = DRAWS["bernoulli"]
    key = jax.random.key(0)
    closed = jax.make_jaxpr(lambda key: function(key, (8,)))(key)
    replayed = jax.jit(lambda key: unrolled.replay(closed, key))
    assert "while" not in replayed.lower(key).as_text()
