"""Compiled models of many kinds, each with data: what users give to `fit`.

A kind is a function that returns a `Kind`; it seeds Keras, so that it returns
equal models each time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

EXAMPLES = 90
WHOLE = 80
"""Of these, all batches of 16 are full, those of a split's fifth too."""
CLASSES = 3


@dataclasses.dataclass
class Kind:
    """A compiled model and the arguments of `fit` that go with it."""

    model: keras.Model
    data: dict[str, Any]


def points(count: int = EXAMPLES, size: int = 6) -> tuple[Any, Any]:
    """Features and labels that have something to do with each other."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(count, size)).astype("float32")
    y = np.argmax(x[:, :CLASSES] + 0.3 * rng.normal(size=(count, CLASSES)), 1)
    return x, y.astype("int32")


def weights(count: int = EXAMPLES) -> Any:
    return np.random.default_rng(6).uniform(0, 2, count).astype("float32")


def cross_entropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def mlp(*middle: Callable[[], Any]) -> keras.Model:
    """A small classifier; layers draw their seeds when they are made."""
    keras.utils.set_random_seed(11)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(12, activation="tanh"),
            *(make() for make in middle),
            layers.Dense(CLASSES),
        ]
    )


def _arrays(count: int = WHOLE, **more: Any) -> dict[str, Any]:
    x, y = points(count)
    return {"x": x, "y": y, "batch_size": 16, **more}


def sequential() -> Kind:
    model = mlp()
    model.compile("adam", cross_entropy(), metrics=["accuracy"])
    return Kind(model, _arrays(EXAMPLES, validation_split=0.2))


def unbuilt() -> Kind:
    keras.utils.set_random_seed(12)
    model = keras.Sequential([layers.Dense(8), layers.Dense(CLASSES)])
    model.compile("sgd", cross_entropy(), metrics=["accuracy"])
    return Kind(model, _arrays())


def several_outputs() -> Kind:
    """Dicts in and out, loss weights, weighted and unweighted metrics."""
    keras.utils.set_random_seed(13)
    a, b = keras.Input((6,), name="a"), keras.Input((2,), name="b")
    hidden = layers.Dense(10, activation="relu")(layers.Concatenate()([a, b]))
    outputs = {
        "kind": layers.Dense(CLASSES, name="kind")(hidden),
        "size": layers.Dense(1, name="size")(hidden),
    }
    model = keras.Model({"a": a, "b": b}, outputs)
    model.compile(
        keras.optimizers.RMSprop(0.01),
        {"kind": cross_entropy(), "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.3},
        metrics={"kind": ["accuracy"], "size": ["mae"]},
        weighted_metrics={"kind": ["accuracy"], "size": ["mse"]},
    )
    x, y = points()
    features = {"a": x, "b": x[:, 2:4].copy()}
    labels = {"kind": y, "size": x[:, :1] * 2}
    weight = {"kind": weights(), "size": weights()[::-1].copy()}
    validation = (features, labels, weight)
    return Kind(
        model,
        {
            "x": features,
            "y": labels,
            "sample_weight": weight,
            "batch_size": 16,
            "validation_data": validation,
        },
    )


def lists_of_outputs() -> Kind:
    """Lists in and out; no loss for one of the outputs."""
    keras.utils.set_random_seed(14)
    a, b = keras.Input((6,)), keras.Input((2,))
    hidden = layers.Dense(10, activation="relu")(layers.Concatenate()([a, b]))
    model = keras.Model(
        [a, b],
        [
            layers.Dense(CLASSES, name="kind")(hidden),
            layers.Dense(1, name="size")(hidden),
        ],
    )
    model.compile("adam", [cross_entropy(), "mse"], metrics=[["acc"], None])
    x, y = points()
    return Kind(
        model,
        {"x": [x, x[:, :2].copy()], "y": [y, x[:, 3:4]], "batch_size": 16},
    )


def class_weights() -> Kind:
    model = mlp()
    model.compile("sgd", cross_entropy(), weighted_metrics=["accuracy"])
    return Kind(model, _arrays(class_weight={0: 1.0, 1: 3.0, 2: 0.5}))


def sample_weights() -> Kind:
    model = mlp()
    model.compile(
        "sgd",
        cross_entropy(),
        metrics=["accuracy"],
        weighted_metrics=["accuracy"],
    )
    return Kind(
        model, _arrays(EXAMPLES, sample_weight=weights(), validation_split=0.3)
    )


class Activity(layers.Layer):
    """Adds a loss, and keeps a metric of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = keras.metrics.Mean(name="activity")

    def call(self, x: Any) -> Any:
        self.add_loss(0.01 * ops.mean(ops.square(x)))
        if keras.config.backend() != "jax":  # Keras's own `fit` fails there
            self.mean.update_state(ops.abs(x))
        return x


class Centred(layers.Layer):
    """Uses what it assigned: how gradients go there is the backend's way."""

    def build(self, shape: Any) -> None:
        self.center = self.add_weight(
            shape=shape[1:], trainable=False, initializer="zeros"
        )

    def call(self, x: Any, training: Any = False) -> Any:
        if training:
            self.center.assign(0.5 * self.center + 0.5 * ops.mean(x, axis=0))
        return x - self.center


def regularized() -> Kind:
    keras.utils.set_random_seed(15)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(9, kernel_regularizer="l2", activation="relu"),
            Activity(),
            layers.BatchNormalization(),
            layers.Dense(8),
            Centred(),
            layers.Dense(CLASSES, activity_regularizer="l1"),
        ]
    )
    model.compile("adam", cross_entropy(), metrics=["accuracy"])
    return Kind(model, _arrays(validation_split=0.2))


def masked() -> Kind:
    keras.utils.set_random_seed(16)
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(20, 4, mask_zero=True),
            layers.GRU(6, return_sequences=True),
            layers.Dense(4),
        ]
    )
    model.compile("adam", cross_entropy(), metrics=["accuracy"])
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, 20, (WHOLE, 5)).astype("int32")
    return Kind(
        model,
        {
            "x": tokens,
            "y": tokens % 4,
            "batch_size": 16,
            "validation_data": (tokens[:32], tokens[:32] % 4),
        },
    )


class OwnLoss(keras.Model):
    """Overrides `compute_loss`, as Keras's documentation shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = layers.Dense(8, activation="relu")
        self.second = layers.Dense(CLASSES)
        self.tracker = keras.metrics.Mean(name="distance")

    def call(self, x: Any, training: Any = None) -> Any:
        return self.second(self.first(x))

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):  # fmt: skip
        del x, sample_weight, training
        wanted = ops.one_hot(y, CLASSES)
        loss = ops.mean(ops.square(y_pred - wanted)) + sum(self.losses)
        self.tracker.update_state(loss)
        return loss


def own_loss() -> Kind:
    keras.utils.set_random_seed(17)
    model = OwnLoss()
    model.compile("adam", metrics=["accuracy"])
    return Kind(model, _arrays(validation_split=0.2))


class OwnMetrics(keras.Model):
    """Overrides `compute_metrics`, as Keras's documentation shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(CLASSES)
        self.custom = keras.metrics.MeanSquaredError(name="custom")

    def call(self, x: Any) -> Any:
        return self.dense(x)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        self.custom.update_state(ops.one_hot(y, CLASSES), y_pred)
        results["custom"] = self.custom.result()
        return results


def own_metrics() -> Kind:
    keras.utils.set_random_seed(18)
    model = OwnMetrics()
    model.compile("adam", cross_entropy(), metrics=["accuracy"])
    return Kind(model, _arrays(validation_split=0.2))


class OwnStep(keras.Model):
    """Its own steps, in the signature of each backend: as in the guides."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = layers.Dense(8, activation="relu")
        self.dropout = layers.Dropout(0.2, seed=3)
        self.last = layers.Dense(CLASSES)
        self.mean = keras.metrics.Mean(name="loss")
        self.accuracy = keras.metrics.SparseCategoricalAccuracy(name="acc")

    def call(self, x: Any, training: bool = False) -> Any:
        return self.last(self.dropout(self.hidden(x), training=training))

    @property
    def metrics(self) -> list[Any]:
        return [self.mean, self.accuracy]

    # JAX: everything goes in and comes out.

    def of_state(
        self, trainable, non_trainable, x, y, training
    ):  # fmt: skip
        y_pred, non_trainable = self.stateless_call(
            trainable, non_trainable, x, training=training
        )
        return self.compute_loss(x, y, y_pred), (y_pred, non_trainable)

    def new_metrics(self, values, loss, y, y_pred):
        logs, new = {}, []
        for metric in self.metrics:
            own = values[len(new) : len(new) + len(metric.variables)]
            if metric is self.mean:
                own = metric.stateless_update_state(own, loss)
            else:
                own = metric.stateless_update_state(own, y, y_pred)
            logs[metric.name] = metric.stateless_result(own)
            new += own
        return logs, new

    def jax_train_step(self, state, data):
        import jax

        trainable, non_trainable, optimizer, metrics = state
        x, y = data
        gradient = jax.value_and_grad(self.of_state, has_aux=True)
        (loss, (y_pred, non_trainable)), gradients = gradient(
            trainable, non_trainable, x, y, True
        )
        trainable, optimizer = self.optimizer.stateless_apply(
            optimizer, gradients, trainable
        )
        logs, metrics = self.new_metrics(metrics, loss, y, y_pred)
        return logs, (trainable, non_trainable, optimizer, metrics)

    def jax_test_step(self, state, data):
        trainable, non_trainable, metrics = state
        x, y = data
        loss, (y_pred, non_trainable) = self.of_state(
            trainable, non_trainable, x, y, False
        )
        logs, metrics = self.new_metrics(metrics, loss, y, y_pred)
        return logs, (trainable, non_trainable, metrics)

    # TensorFlow and PyTorch: variables change in place.

    def measure(self, loss, y, y_pred):
        self.mean.update_state(loss)
        self.accuracy.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}

    def tensorflow_train_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply(gradients, variables)
        return self.measure(loss, y, y_pred)

    def torch_train_step(self, data):
        import torch

        x, y = data
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = self.compute_loss(y=y, y_pred=y_pred)
        loss.backward()
        variables = list(self.trainable_weights)
        gradients = [v.value.grad for v in variables]
        with torch.no_grad():
            self.optimizer.apply(gradients, variables)
        return self.measure(loss, y, y_pred)

    def train_step(self, *args: Any) -> Any:
        name = f"{keras.config.backend()}_train_step"
        return getattr(self, name)(*args)

    def test_step(self, *args: Any) -> Any:
        if keras.config.backend() == "jax":
            return self.jax_test_step(*args)
        x, y = args[0]
        y_pred = self(x, training=False)
        return self.measure(self.compute_loss(y=y, y_pred=y_pred), y, y_pred)


def own_step() -> Kind:
    keras.utils.set_random_seed(19)
    model = OwnStep()
    model.compile("adam", cross_entropy())
    return Kind(model, _arrays(validation_split=0.2))


class OwnTrainStep(keras.Model):
    """Only `train_step` is its own, and adds to what Keras's returns."""

    def train_step(self, *args: Any) -> Any:
        if keras.config.backend() == "jax":
            logs, state = super().train_step(*args)
            return {**logs, "twice": 2 * logs["loss"]}, state
        logs = super().train_step(*args)
        return {**logs, "twice": 2 * logs["loss"]}


def own_train_step() -> Kind:
    keras.utils.set_random_seed(20)
    inputs = keras.Input((6,))
    hidden = layers.BatchNormalization()(layers.Dense(8)(inputs))
    model = OwnTrainStep(inputs, layers.Dense(CLASSES)(hidden))
    model.compile("adam", cross_entropy(), metrics=["accuracy"])
    return Kind(model, _arrays(validation_split=0.2))


def loss_scaled() -> Kind:
    keras.utils.set_random_seed(21)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(12, activation="relu", dtype="mixed_float16"),
            layers.Dense(CLASSES, dtype="float32"),
        ]
    )
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), initial_scale=2.0**18
    )
    model.compile(optimizer, cross_entropy(), metrics=["accuracy"])
    return Kind(model, _arrays())


def accumulated() -> Kind:
    model = mlp()
    model.compile(
        keras.optimizers.Adam(0.01, gradient_accumulation_steps=3),
        cross_entropy(),
        metrics=["accuracy"],
    )
    return Kind(model, _arrays(validation_split=0.2))


def averaged() -> Kind:
    model = mlp()
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9, use_ema=True),
        cross_entropy(),
        metrics=["accuracy"],
    )
    return Kind(model, _arrays(validation_split=0.2))


def convolutional() -> Kind:
    keras.utils.set_random_seed(22)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(CLASSES),
        ]
    )
    model.compile("adam", cross_entropy(), metrics=["accuracy"])
    images = np.random.default_rng(8).normal(size=(WHOLE, 8, 8, 1))
    return Kind(
        model,
        {
            "x": images.astype("float32"),
            "y": points(WHOLE)[1],
            "batch_size": 16,
        },
    )


def unsupervised() -> Kind:
    """No labels: `add_loss` is all there is."""
    keras.utils.set_random_seed(23)

    class Restorer(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = layers.Dense(2), layers.Dense(6)

        def call(self, x: Any) -> Any:
            restored = self.wide(self.narrow(x))
            self.add_loss(ops.mean(ops.square(restored - x)))
            return restored

    model = Restorer()
    model.compile("adam")
    return Kind(model, {"x": points()[0], "batch_size": 16})


class Adversaries(keras.Model):
    """Two models, two optimizers, a step of its own: as in Keras's guides."""

    def __init__(self, judge: keras.Model, forger: keras.Model) -> None:
        super().__init__()
        self.judge, self.forger = judge, forger
        self.noise = keras.random.SeedGenerator(7)
        self.means = [keras.metrics.Mean(name=n) for n in ("judge", "forger")]
        self.built = True

    def compile(self, judge_optimizer: Any, forger_optimizer: Any) -> None:
        super().compile()
        self.judge_optimizer = judge_optimizer
        self.forger_optimizer = forger_optimizer
        self.loss_of = keras.losses.BinaryCrossentropy(from_logits=True)

    @property
    def metrics(self) -> list[Any]:
        return self.means

    def forged(self, count: int) -> Any:
        return self.forger(keras.random.normal((count, 4), seed=self.noise))

    def improve(self, optimizer: Any, model: Any, loss_of: Any) -> Any:
        variables = model.trainable_weights
        if keras.config.backend() == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                loss = loss_of()
            gradients = tape.gradient(loss, variables)
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
            return loss
        import torch

        self.zero_grad()
        loss = loss_of()
        loss.backward()
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in variables], variables)
        return loss

    def train_step(self, real: Any) -> dict[str, Any]:
        real = real[0] if isinstance(real, tuple) else real
        count = ops.shape(real)[0]
        forged = ops.stop_gradient(self.forged(count))

        def judging() -> Any:
            scores = self.judge(ops.concatenate([forged, real]), training=True)
            wanted = ops.concatenate(
                [ops.ones((count, 1)), ops.zeros((count, 1))]
            )
            return self.loss_of(wanted, scores)

        def forging() -> Any:
            scores = self.judge(self.forged(count))
            return self.loss_of(ops.zeros((count, 1)), scores)

        losses = (
            self.improve(self.judge_optimizer, self.judge, judging),
            self.improve(self.forger_optimizer, self.forger, forging),
        )
        for mean, loss in zip(self.means, losses, strict=True):
            mean.update_state(loss)
        return {mean.name: mean.result() for mean in self.means}


def adversaries() -> Kind:
    keras.utils.set_random_seed(24)
    judge = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu"),
            layers.Dense(1),
        ]
    )
    forger = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, activation="relu"),
            layers.Dense(6),
        ]
    )
    model = Adversaries(judge, forger)
    model.compile(keras.optimizers.Adam(), keras.optimizers.RMSprop())
    return Kind(model, {"x": points()[0], "batch_size": 16})


KINDS: dict[str, Callable[[], Kind]] = {
    kind.__name__: kind
    for kind in (
        sequential, unbuilt, several_outputs, lists_of_outputs, class_weights,
        sample_weights, regularized, masked, own_loss, own_metrics, own_step,
        own_train_step, loss_scaled, accumulated, averaged, convolutional,
        unsupervised,
    )
}  # fmt: skip
if keras.config.backend() != "jax":
    # Where a step of its own has the state of one optimizer only.
    KINDS["adversaries"] = adversaries
