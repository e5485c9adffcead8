"""The step written by hand for TensorFlow, and what it can be at most."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from problems import ENGINE, LEARNING_RATE, Problem
from turns import EpochEnd, Train


def _step(problem: Problem) -> tuple[Callable, tf.Variable]:
    """`step(x, y)`, and the sums of loss and metrics, which it adds to."""
    model, loss_of = problem.make(), ENGINE.build_loss()
    optimizer = keras.optimizers.Adam(LEARNING_RATE)
    optimizer.build(model.trainable_variables)
    sums = tf.Variable(tf.zeros(3 if problem.top3 else 2))

    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            loss = loss_of(y, logits)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        right = tf.argmax(logits, -1, output_type=y.dtype) == y
        added = [loss, tf.reduce_mean(tf.cast(right, tf.float32))]
        if problem.top3:
            best = tf.math.in_top_k(y, logits, 3)
            added.append(tf.reduce_mean(tf.cast(best, tf.float32)))
        sums.assign_add(tf.stack(added))

    return step, sums


def _take_loss(sums: tf.Variable, steps: int) -> float:
    loss = float(sums[0]) / steps
    sums.assign(tf.zeros_like(sums))
    return loss


def by_hand(problem: Problem) -> Train:
    """`tf.function`, with a tape and a Keras optimizer."""

    def train(epoch_end: EpochEnd) -> None:
        x, y = problem.data()
        step, sums = _step(problem)
        compiled = tf.function(step)
        while True:
            for first in range(0, len(x), problem.batch):
                batch = slice(first, first + problem.batch)
                # (Quicker than a tf.data pipeline.)
                compiled(tf.constant(x[batch]), tf.constant(y[batch]))
            if not epoch_end(_take_loss(sums, problem.steps)):
                return

    return train


def _on_device(problem: Problem) -> tuple[tf.Tensor, tf.Tensor]:
    x, y = problem.data()
    shape = (problem.steps, problem.batch)
    return (
        tf.constant(x.reshape(*shape, *x.shape[1:])),
        tf.constant(y.reshape(shape)),
    )


def limit_in_calls(problem: Problem, *, xla: bool) -> Train:
    """The same calls, on batches that lie on the device."""

    def train(epoch_end: EpochEnd) -> None:
        xs, ys = map(tf.unstack, _on_device(problem))
        step, sums = _step(problem)
        compiled = tf.function(step, jit_compile=xla)
        while True:
            for x, y in zip(xs, ys, strict=True):
                compiled(x, y)
            if not epoch_end(_take_loss(sums, problem.steps)):
                return

    return train


def limit_in_loop(problem: Problem, *, xla: bool) -> Train:
    """An epoch in one call, on batches that lie on the device."""

    def train(epoch_end: EpochEnd) -> None:
        xs, ys = _on_device(problem)
        step, sums = _step(problem)

        @tf.function(jit_compile=xla)
        def epoch() -> None:
            for index in tf.range(problem.steps):
                step(xs[index], ys[index])

        while True:
            epoch()
            if not epoch_end(_take_loss(sums, problem.steps)):
                return

    return train
