"""The steps written by hand on TensorFlow: a `GradientTape`."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tests.contracts.by_hand.step import Step


def apply(optimizer: Any, gradients: Any, variables: Any) -> None:
    optimizer.apply(gradients, variables)


def cross_entropy(labels: Any, logits: Any) -> Any:
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels, tf.cast(logits, "float32")
    )
    return tf.reduce_mean(losses)


def minimize(
    forward: Callable[[Any], Any], variables: Any, optimizer: Any
) -> Step:
    """The step of one optimizer.

    Args:
        forward: `forward(batch)` returns the loss and the other logs.
        variables: those to differentiate by.
        optimizer: built with them here.
    """
    optimizer.build(variables)

    @tf.function
    def step(batch: Any) -> Any:
        with tf.GradientTape() as tape:
            loss, logs = forward(batch)
        optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss, **logs}

    return step


def classifier(task: Any, model: Any, optimizer: Any) -> Step:
    """One model, one optimizer of all its variables."""

    def forward(batch: Any) -> Any:
        features, labels = batch
        outputs = model(features, training=True)
        return cross_entropy(labels, outputs) + sum(model.losses), {}

    return minimize(forward, model.trainable_variables, optimizer)


def gan(task: Any, model: Any, optimizer: Any) -> Step:
    g, d = model["generator"], model["discriminator"]
    for name in model:
        optimizer[name].build(model[name].trainable_variables)

    def latent(count: int) -> Any:
        return keras.random.normal((count, task.latent_size), seed=task.noise)

    @tf.function
    def step(points: Any) -> Any:
        fakes = g(latent(len(points)), training=True)
        with tf.GradientTape() as tape:
            real = d(points, training=True)
            penalty = sum(d.losses)
            fake = d(fakes, training=True)
            penalty += sum(d.losses)
            d_loss = tf.reduce_mean(tf.nn.softplus(-real))
            d_loss += tf.reduce_mean(tf.nn.softplus(fake)) + penalty
        optimizer["discriminator"].apply(
            tape.gradient(d_loss, d.trainable_variables), d.trainable_variables
        )
        with tf.GradientTape() as tape:
            fakes = g(latent(len(points)), training=True)
            scores = d(fakes, training=False)
            g_loss = tf.reduce_mean(tf.nn.softplus(-scores))
        optimizer["generator"].apply(
            tape.gradient(g_loss, g.trainable_variables), g.trainable_variables
        )
        return {"loss": d_loss + g_loss, "d_loss": d_loss, "g_loss": g_loss}

    return step


def vae(task: Any, model: Any, optimizer: Any) -> Step:
    encoder, decoder = model["encoder"], model["decoder"]

    def forward(pixels: Any) -> Any:
        noise = keras.random.normal((len(pixels), 3), seed=task.seeds)
        mean, log_variance = tf.split(encoder(pixels), 2, axis=1)
        restored = decoder(mean + tf.exp(log_variance / 2) * noise)
        squares = (restored - pixels) ** 2
        error = tf.reduce_mean(tf.reduce_sum(squares, axis=1))
        terms = 1 + log_variance - mean**2 - tf.exp(log_variance)
        kl = -0.5 * tf.reduce_mean(tf.reduce_sum(terms, axis=1))
        loss = error + task.kl_weight.value * kl
        return loss, {"error": error, "kl": kl}

    variables = [*encoder.trainable_variables, *decoder.trainable_variables]
    return minimize(forward, variables, optimizer)


def half_precision(task: Any, model: Any, optimizer: Any) -> Step:
    """The loss is scaled before it is differentiated."""
    variables = model.trainable_variables
    optimizer.build(variables)

    @tf.function
    def step(batch: Any) -> Any:
        features, labels = batch
        with tf.GradientTape() as tape:
            loss = cross_entropy(labels, model(features))
            scaled = optimizer.scale_loss(loss)
        optimizer.apply(tape.gradient(scaled, variables), variables)
        return {"loss": loss, "scale": optimizer.dynamic_scale.value}

    return step


def nested(task: Any, model: Any, optimizer: Any) -> Step:
    def forward(batch: Any) -> Any:
        features, labels = batch
        outputs = model(features)
        squares = (labels["size"] - outputs["size"]) ** 2
        of_class = cross_entropy(labels["class"], outputs["class"])
        return of_class + 0.5 * tf.reduce_mean(squares), {}

    return minimize(forward, model.trainable_variables, optimizer)


def subset(task: Any, model: Any, optimizer: Any) -> Step:
    """Only the head has gradients, and slots."""

    def forward(batch: Any) -> Any:
        features, labels = batch
        return cross_entropy(labels, model(features, training=True)), {}

    head = model.get_layer("head").trainable_variables
    return minimize(forward, head, optimizer)


def conditional(task: Any, model: Any, optimizer: Any) -> Step:
    """Not compiled: the conditionals are Python's own."""
    variables = model.trainable_variables
    optimizer.build(variables)

    def step(batch: Any) -> Any:
        features, labels = batch
        with tf.GradientTape() as tape:
            loss = cross_entropy(labels, model(features))
        gradients = tape.gradient(loss, variables)
        if loss > 0.9:
            task.large.assign_add(1)
        if loss < task.best.value:
            task.best.assign(loss)
            task.improved.assign_add(10 if loss < 0.8 else 1)
        else:
            task.best.assign(task.best.value * 1.01)
        if loss > 1.1 * task.best.value:
            task.skipped.assign_add(1)
        else:
            optimizer.apply(gradients, variables)
        # A copy: the variable goes on.
        return {"loss": loss, "best": tf.identity(task.best.value)}

    return step


def recurrent(task: Any, model: Any, optimizer: Any) -> Step:
    """The classifier, with more logs."""
    variables = model.trainable_variables
    optimizer.build(variables)

    @tf.function
    def step(batch: Any) -> Any:
        features, labels = batch
        with tf.GradientTape() as tape:
            outputs = model(features, training=True)
            loss = cross_entropy(labels, outputs)
        gradients = tape.gradient(loss, variables)
        optimizer.apply(gradients, variables)
        squares = [tf.reduce_sum(g**2) for g in gradients]
        return {
            "loss": loss,
            "gradient_norm": tf.sqrt(sum(squares)),
            "largest_output": tf.reduce_max(outputs),
        }

    return step
