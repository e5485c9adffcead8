"""Runs with one fault each that keeps them from resuming exactly."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

import legato

COUNT = 0


def model(*middle: Callable[[], layers.Layer]) -> keras.Model:
    keras.utils.set_random_seed(1)
    inner = [make() for make in middle]
    made = keras.Sequential(
        [keras.Input((4,)), layers.Dense(8, "relu"), *inner, layers.Dense(2)]
    )
    made.compile(
        keras.optimizers.SGD(0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return made


def data(count: int = 64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(count, 4)).astype("float32")
    return x, (x.sum(axis=1) > 0).astype("int32")


def fit(made: keras.Model, run_dir: Path, x: Any = None, **more: Any) -> Any:
    given = {"x": x} if x is not None else dict(zip("xy", data(), strict=True))
    return legato.fit(
        made, **given, epochs=5, verbose=0, run_dir=run_dir, **more
    )


def sound(run_dir: Path) -> Any:
    """Without a fault."""
    x, y = data(20)
    return fit(
        model(lambda: layers.Dropout(0.2)),
        run_dir,
        batch_size=8,
        validation_data=(x, y),
        callbacks=[keras.callbacks.ReduceLROnPlateau(patience=1)],
    )


class Rates(keras.callbacks.Callback):
    """Takes the rates from a generator, whose position cannot be saved."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = (0.05 / (1 + i) for i in range(10_000))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = next(self.rates)


def uncapturable(run_dir: Path) -> Any:
    return fit(model(), run_dir, batch_size=8, callbacks=[Rates()])


def generator(run_dir: Path) -> Any:
    """A generator with random numbers that no one can begin again."""

    def batches() -> Any:
        rng = np.random.default_rng()
        x, y = data()
        while True:
            rows = rng.integers(0, len(x), 8)
            yield x[rows], y[rows]

    return fit(model(), run_dir, batches(), steps_per_epoch=8)


def transform(run_dir: Path) -> Any:
    """Augmentation in tf.data by NumPy's global generator."""
    import tensorflow as tf

    def jittered(x: np.ndarray) -> np.ndarray:
        return x + np.random.normal(0, 0.1, x.shape).astype("float32")

    def augment(x: Any, y: Any) -> Any:
        moved = tf.numpy_function(jittered, [x], tf.float32)
        return tf.ensure_shape(moved, [4]), y

    made = tf.data.Dataset.from_tensor_slices(data()).map(augment).batch(8)
    return fit(model(), run_dir, made)


def clock(run_dir: Path) -> Any:
    """A learning rate that depends on the time of the day."""

    def rate(epoch: int, before: float) -> float:
        return 0.05 + 0.01 * (time.time() % 1)

    scheduler = keras.callbacks.LearningRateScheduler(rate)
    return fit(model(), run_dir, batch_size=8, callbacks=[scheduler])


def unseeded(run_dir: Path) -> Any:
    """A layer that is made before the seed is set."""
    dropout = layers.Dropout(0.2)
    return fit(model(lambda: dropout), run_dir, batch_size=8)


class Reseeding(layers.Layer):
    """Makes a generator at each call, and so new noise of no seed."""

    def call(self, x: Any) -> Any:
        seeds = keras.random.SeedGenerator()
        return x + keras.random.normal(keras.ops.shape(x), seed=seeds)


def reseeded(run_dir: Path) -> Any:
    return fit(model(Reseeding), run_dir, batch_size=8)


class Counting(legato.Task):
    """Its step counts in a global variable, and weighs the loss by it."""

    def build_model(self) -> keras.Model:
        return keras.Sequential([keras.Input((4,)), layers.Dense(2)])

    def build_optimizer(self) -> keras.optimizers.Optimizer:
        return keras.optimizers.SGD(0.05)

    def build_inputs(self, split: str) -> Any:
        if split == "validation":
            return None
        return legato.ArraySource(data(), batch_size=8)

    def build_losses(
        self, labels: Any, model_outputs: Any, aux_losses: Any = None
    ) -> Any:
        losses = keras.losses.sparse_categorical_crossentropy(
            labels, model_outputs, from_logits=True
        )
        return keras.ops.mean(losses)

    def train_step(
        self, inputs: Any, model: Any, optimizer: Any, metrics: Any = None
    ) -> Any:
        global COUNT
        COUNT += 1
        features, labels = inputs

        def forward() -> Any:
            outputs = model(features, training=True)
            return self.build_losses(labels, outputs) * (1 + COUNT % 3)

        loss, gradients = legato.value_and_grad(
            forward, model.trainable_variables, optimizer
        )
        optimizer.apply(gradients, model.trainable_variables)
        return {self.loss: loss}


def counted(run_dir: Path) -> Any:
    config = legato.TrainerConfig(train_steps=40, checkpoint_interval=5)
    return legato.Trainer(Counting(), run_dir=run_dir, config=config).train()
