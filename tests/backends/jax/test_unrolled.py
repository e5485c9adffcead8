"""What is computed in another way is what JAX computes, to the bit."""

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


def pooling(windows, strides=None, padding="VALID", extreme="max"):
    """The gradient of pooling, as a function of the images."""
    init, reduce = {
        "max": (-jnp.inf, jax.lax.max),
        "min": (jnp.inf, jax.lax.min),
    }[extreme]

    def gradient(images):
        pooled, backwards = jax.vjp(
            lambda x: jax.lax.reduce_window(
                x, init, reduce, windows, strides or windows, padding
            ),
            images,
        )
        given = jax.random.normal(jax.random.key(1), pooled.shape)
        return backwards(given)[0]

    return gradient


def images(shape):
    """With equal numbers in a window, also NaN and infinite ones."""
    drawn = np.random.default_rng(0).integers(-3, 4, shape).astype("float32")
    drawn[drawn == -3] = -np.inf
    drawn[:1][drawn[:1] == 3] = np.nan
    return drawn


def lowered(function, argument):
    closed = jax.make_jaxpr(function)(argument)
    replayed = jax.jit(lambda x: unrolled.replay(closed, x))
    return replayed.lower(argument).as_text()


@pytest.mark.parametrize(
    ("shape", "windows"),
    [
        ((4, 6, 6, 3), (1, 2, 2, 1)),
        ((4, 3, 7, 8), (1, 1, 2, 3)),
        ((4, 7, 2), (1, 3, 1)),
        ((2, 5, 9, 4, 2), (1, 2, 4, 2, 1)),
        ((2, 4, 4, 1), (1, 1, 1, 1)),
    ],
)
def test_gradients_of_pooling_are_those_of_jax(shape, windows):
    drawn = images(shape)
    check(pooling(windows), drawn)
    assert "select_and_scatter" not in lowered(pooling(windows), drawn)


@pytest.mark.parametrize(
    "function",
    [
        pooling((1, 2, 2, 1), (1, 1, 1, 1)),
        pooling((1, 3, 3, 1), padding="SAME"),
        pooling((1, 2, 2, 1), extreme="min"),
        pooling((1, 5, 5, 1)),
    ],
)
def test_other_pooling_is_left_alone(function):
    drawn = images((2, 11, 11, 3))
    check(function, drawn)
    assert "select_and_scatter" in lowered(function, drawn)
