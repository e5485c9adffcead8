"""The step written by hand for JAX, and what it can be at most."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from problems import LEARNING_RATE, Problem
from turns import EpochEnd, Train


class _ByHand:
    """A functional Keras model, Optax, and sums for loss and metrics.

    Attributes:
        state: all that a step changes.
        step: `(state, x, y) -> state`, to be compiled.
    """

    def __init__(self, problem: Problem) -> None:
        model = problem.make()
        # Keras's epsilon, for the same losses.
        optimizer = optax.adam(LEARNING_RATE, eps=1e-7)

        def loss_of(trainable: Any, others: Any, x: Any, y: Any) -> Any:
            logits, others = model.stateless_call(
                trainable, others, x, training=True
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), (logits, others)

        def step(state: Any, x: Any, y: Any) -> Any:
            (loss, (logits, others)), gradients = jax.value_and_grad(
                loss_of, has_aux=True
            )(state["trainable"], state["others"], x, y)
            updates, optimizer_state = optimizer.update(
                gradients, state["optimizer"], state["trainable"]
            )
            sums = [loss, (logits.argmax(-1) == y).mean()]
            if problem.top3:
                _, best = jax.lax.top_k(logits, 3)
                sums.append((best == y[:, None]).any(-1).mean())
            return {
                "trainable": optax.apply_updates(state["trainable"], updates),
                "others": others,
                "optimizer": optimizer_state,
                "sums": state["sums"] + jnp.stack(sums),
            }

        trainable = [v.value for v in model.trainable_variables]
        self.step = step
        self._zeros = np.zeros(3 if problem.top3 else 2, "float32")
        self.state = {
            "trainable": trainable,
            "others": [v.value for v in model.non_trainable_variables],
            "optimizer": optimizer.init(trainable),
            "sums": jnp.array(self._zeros),
        }

    def take_loss(self, steps: int) -> float:
        """Wait; the mean loss, and begin another epoch."""
        sums = np.asarray(self.state["sums"])
        self.state["sums"] = jnp.array(self._zeros)
        return sums[0] / steps


def by_hand(problem: Problem) -> Train:
    """One donated `jax.jit` call for each batch, which comes from the host."""

    def train(epoch_end: EpochEnd) -> None:
        x, y = problem.data()
        run = _ByHand(problem)
        step = jax.jit(run.step, donate_argnums=0)
        while True:
            for first in range(0, len(x), problem.batch):
                batch = slice(first, first + problem.batch)
                run.state = step(run.state, x[batch], y[batch])
            if not epoch_end(run.take_loss(problem.steps)):
                return

    return train


def _on_device(problem: Problem) -> tuple[Any, Any]:
    x, y = problem.data()
    shape = (problem.steps, problem.batch)
    return (
        jax.device_put(x.reshape(*shape, *x.shape[1:])),
        jax.device_put(y.reshape(shape)),
    )


def limit_in_calls(problem: Problem) -> Train:
    """The same calls, on batches that lie on the device."""

    def train(epoch_end: EpochEnd) -> None:
        xs, ys = map(list, _on_device(problem))
        run = _ByHand(problem)
        step = jax.jit(run.step, donate_argnums=0)
        while True:
            for x, y in zip(xs, ys, strict=True):
                run.state = step(run.state, x, y)
            if not epoch_end(run.take_loss(problem.steps)):
                return

    return train


def limit_in_loop(problem: Problem) -> Train:
    """An epoch in one call, on batches that lie on the device."""

    def train(epoch_end: EpochEnd) -> None:
        xs, ys = _on_device(problem)
        run = _ByHand(problem)

        def epoch(state: Any, xs: Any, ys: Any) -> Any:
            def body(index: Any, state: Any) -> Any:
                return run.step(state, xs[index], ys[index])

            return jax.lax.fori_loop(0, len(xs), body, state)

        compiled = jax.jit(epoch, donate_argnums=0)
        while True:
            run.state = compiled(run.state, xs, ys)
            if not epoch_end(run.take_loss(problem.steps)):
                return

    return train
