"""TensorFlow's random numbers in a form that XLA compiles well.

Behind `keras.random`, and so behind dropout, is Philox. On a CPU XLA unrolls
it, fuses it with what uses it, and so computes each number, and the key they
share, many times over: 730 us for the 2,048 numbers of a small dropout, in a
step that takes 20 us without them. A loop cannot be fused; as one over its
rounds Philox takes 4 us, half of what TensorFlow's own kernel does.

The numbers are those of TensorFlow's kernels on a CPU: bit for bit where they
are uniform, but for rounding where they are normal.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

# Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3;
# 2011). Rows are its two multiplications.
_FACTORS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint32)
_ROUNDS = 10
_ROUNDS_AT_A_TIME = 2  # the quickest of 1, 2 and 5

_ALGORITHMS = (1, 3)  # Philox, and "auto", which is Philox on a CPU


def replace_draws(graph: Any, definition: Any) -> list[Any]:
    """Let a graph's nodes that draw numbers call functions of this module.

    Args:
        graph: a `tf.Graph`.
        definition: its `GraphDef`, which is changed.

    Returns:
        The functions, to be added to the graph that it is imported to.
    """
    nodes = {node.name: node for node in definition.node}
    return [
        _replace(nodes[operation.name], operation)
        for operation in graph.get_operations()
        if can_draw(operation)
    ]


def can_draw(operation: Any) -> bool:
    """Whether a random operation is one that this module knows."""
    if operation.type not in _DRAWS:
        return False
    (drawn,) = operation.outputs
    return (
        drawn.dtype == tf.float32
        and drawn.shape.is_fully_defined()
        and tf.get_static_value(operation.inputs[3]) in _ALGORITHMS
    )


def uniform(shape: list[int], key: Any, counter: Any) -> Any:
    """What `StatelessRandomUniformV2` draws: float32 in [0, 1).

    Args:
        shape: static.
        key: uint64 `[1]`.
        counter: uint64 `[2]`.
    """
    size = int(np.prod(shape))
    drawn = _to_floats(_bits(key, counter, -(-size // 4)))
    return tf.reshape(tf.reshape(drawn, [-1])[:size], shape)


def normal(shape: list[int], key: Any, counter: Any) -> Any:
    """What `StatelessRandomNormalV2` draws; see `uniform`."""
    size = int(np.prod(shape))
    drawn = _to_floats(_bits(key, counter, -(-size // 4)))
    # Box and Muller's method, on pairs.
    radius = tf.sqrt(-2 * tf.math.log(tf.maximum(drawn[:, 0::2], 1e-7)))
    # (In float64, as TensorFlow does.)
    angle = 2 * np.pi * tf.cast(drawn[:, 1::2], tf.float64)
    angle = tf.cast(angle, tf.float32)
    pairs = tf.stack([tf.sin(angle) * radius, tf.cos(angle) * radius], axis=-1)
    return tf.reshape(tf.reshape(pairs, [-1])[:size], shape)


_DRAWS: dict[str, Callable[[list[int], Any, Any], Any]] = {
    "StatelessRandomUniformV2": uniform,
    "StatelessRandomNormalV2": normal,
}


def _bits(key: Any, counter: Any, count: int) -> Any:
    """Philox for as many successive counters: uint32 `[count, 4]`."""
    low = counter[0] + tf.cast(tf.range(count), tf.uint64)
    carried = tf.cast(low < counter[0], tf.uint64)
    words = _halves(low), _halves(counter[1] + carried)
    even, odd = (tf.stack(halves) for halves in zip(*words, strict=True))
    key = tf.bitcast(key[0], tf.uint32)[:, None]

    def one_round(even: Any, odd: Any, key: Any) -> tuple[Any, Any, Any]:
        low, high = _halves(tf.cast(even, tf.uint64) * _FACTORS)
        return high[::-1] ^ odd ^ key, low[::-1], key + _KEY_STEPS

    def rounds(done: Any, *state: Any) -> Any:
        for _ in range(_ROUNDS_AT_A_TIME):
            state = one_round(*state)
        return done + _ROUNDS_AT_A_TIME, *state

    _, even, odd, _ = tf.while_loop(
        lambda done, *state: done < _ROUNDS,
        rounds,
        (tf.constant(0), even, odd, key),
    )
    return tf.stack([even[0], odd[0], even[1], odd[1]], axis=1)


def _halves(words: Any) -> tuple[Any, Any]:
    """The low and the high 32 bits of 64."""
    # XLA makes less of a bitcast, which puts the two next to each other.
    high = tf.bitwise.right_shift(words, np.uint64(32))
    return tf.cast(words, tf.uint32), tf.cast(high, tf.uint32)


def _to_floats(bits: Any) -> Any:
    # They become the mantissas of numbers in [1, 2).
    mantissas = (bits & np.uint32(0x7FFFFF)) | np.uint32(0x3F800000)
    return tf.bitcast(mantissas, tf.float32) - 1.0


def _replace(node: Any, operation: Any) -> Any:
    """Make a node that draws a call of a function; returns that."""
    draw = functools.partial(
        _DRAWS[operation.type], operation.outputs[0].shape.as_list()
    )
    # Keys and counters of Philox.
    specs = tf.TensorSpec([1], tf.uint64), tf.TensorSpec([2], tf.uint64)
    function: Any = tf.function(draw, autograph=False)
    function = function.get_concrete_function(*specs)
    _, key, counter, _, *after = node.input
    node.op = "PartitionedCall"
    node.input[:] = [key, counter, *after]
    node.ClearField("attr")
    node.attr["f"].func.name = function.function_def.signature.name
    types = [spec.dtype.as_datatype_enum for spec in specs]
    node.attr["Tin"].list.type.extend(types)
    node.attr["Tout"].list.type.append(tf.float32.as_datatype_enum)
    return function
