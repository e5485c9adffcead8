"""The loop that a JAX user would write around data that wait."""

import itertools
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import model
import numpy as np
import optax

Batch = tuple[np.ndarray, np.ndarray]

_WAITING = 16


def in_a_thread(data: Any, batches: int) -> Iterator[Batch]:
    """Random batches of examples: a thread makes them, a queue holds them."""
    made: queue.Queue[Batch] = queue.Queue(_WAITING)
    rng = np.random.default_rng(0)

    def work() -> None:
        for _ in range(batches):
            indices = rng.integers(0, len(data), model.BATCH).tolist()
            x, y = zip(*data.__getitems__(indices), strict=True)
            made.put((np.stack(x), np.array(y, "int32")))

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(batches):
        yield made.get()
    thread.join()


def drawn(batches: Iterable[Batch]) -> float:
    """How many come in a second, when nothing else is done."""
    began, done = time.perf_counter(), sum(1 for _ in batches)
    return done / (time.perf_counter() - began)


class Loop:
    """A donated `jax.jit` call for each batch: the network of `data.py`.

    Args:
        width: of its four layers.
    """

    def __init__(self, width: int) -> None:
        sizes = [64, *[width] * 4, 10]
        rng = np.random.default_rng(0)
        optimizer = optax.adam(model.LEARNING_RATE)
        weights = [
            (jnp.array(rng.normal(0, i**-0.5, (i, o)), "float32"), jnp.zeros(o))
            for i, o in itertools.pairwise(sizes)
        ]
        self._state: Any = weights, optimizer.init(weights)

        def loss_of(weights: Any, x: Any, y: Any) -> Any:
            *hidden, (kernel, bias) = weights
            for each in hidden:
                x = jax.nn.relu(x @ each[0] + each[1])
            logits = x @ kernel + bias
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, y
            ).mean()

        def step(state: Any, x: Any, y: Any) -> Any:
            weights, moments = state
            loss, gradients = jax.value_and_grad(loss_of)(weights, x, y)
            updates, moments = optimizer.update(gradients, moments, weights)
            return (optax.apply_updates(weights, updates), moments), loss

        self._step = jax.jit(step, donate_argnums=0)

    def rate(self, batches: Iterable[Batch]) -> float:
        """Batches per second."""
        began, done, loss = time.perf_counter(), 0, None
        for x, y in batches:
            self._state, loss = self._step(self._state, x, y)
            done += 1
        jax.block_until_ready(loss)
        return done / (time.perf_counter() - began)
