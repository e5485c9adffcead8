"""The steps written by hand on PyTorch: `torch.autograd.grad`."""

from collections.abc import Callable
from typing import Any

import keras
import torch
from torch.nn import functional

from tests.contracts.by_hand.step import Step


def gradients_of(loss: Any, variables: list[keras.Variable]) -> Any:
    return torch.autograd.grad(loss, [v.value for v in variables])


def apply(optimizer: Any, gradients: Any, variables: Any) -> None:
    with torch.no_grad():
        optimizer.apply(gradients, variables)


def detached(logs: dict[str, Any]) -> dict[str, Any]:
    """Copies without a graph: variables are changed in place."""
    return {name: value.detach().clone() for name, value in logs.items()}


def cross_entropy(labels: Any, logits: Any) -> Any:
    return functional.cross_entropy(logits.float(), labels.long())


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

    def step(batch: Any) -> Any:
        loss, logs = forward(batch)
        apply(optimizer, gradients_of(loss, variables), variables)
        return detached({"loss": loss, **logs})

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

    def update(name: str, loss: Any) -> None:
        variables = model[name].trainable_variables
        apply(optimizer[name], gradients_of(loss, variables), variables)

    def step(points: Any) -> Any:
        with torch.no_grad():
            fakes = g(latent(len(points)), training=True)
        real = d(points, training=True)
        penalty = sum(d.losses)
        fake = d(fakes, training=True)
        penalty = penalty + sum(d.losses)
        d_loss = functional.softplus(-real).mean()
        d_loss = d_loss + functional.softplus(fake).mean() + penalty
        update("discriminator", d_loss)

        fakes = g(latent(len(points)), training=True)
        scores = d(fakes, training=False)
        g_loss = functional.softplus(-scores).mean()
        update("generator", g_loss)
        return detached(
            {"loss": d_loss + g_loss, "d_loss": d_loss, "g_loss": g_loss}
        )

    return step


def vae(task: Any, model: Any, optimizer: Any) -> Step:
    encoder, decoder = model["encoder"], model["decoder"]

    def forward(pixels: Any) -> Any:
        noise = keras.random.normal((len(pixels), 3), seed=task.seeds)
        mean, log_variance = encoder(pixels).chunk(2, dim=1)
        restored = decoder(mean + torch.exp(log_variance / 2) * noise)
        error = ((restored - pixels) ** 2).sum(dim=1).mean()
        terms = 1 + log_variance - mean**2 - torch.exp(log_variance)
        kl = -0.5 * terms.sum(dim=1).mean()
        loss = error + task.kl_weight.value * kl
        return loss, {"error": error, "kl": kl}

    variables = [*encoder.trainable_variables, *decoder.trainable_variables]
    return minimize(forward, variables, optimizer)


def half_precision(task: Any, model: Any, optimizer: Any) -> Step:
    """The loss is scaled before it is differentiated."""
    variables = model.trainable_variables
    optimizer.build(variables)

    def step(batch: Any) -> Any:
        features, labels = batch
        loss = cross_entropy(labels, model(features))
        scaled = optimizer.scale_loss(loss)
        apply(optimizer, gradients_of(scaled, variables), variables)
        return detached({"loss": loss, "scale": optimizer.dynamic_scale.value})

    return step


def nested(task: Any, model: Any, optimizer: Any) -> Step:
    def forward(batch: Any) -> Any:
        features, labels = batch
        outputs = model(features)
        squares = (labels["size"] - outputs["size"]) ** 2
        of_class = cross_entropy(labels["class"], outputs["class"])
        return of_class + 0.5 * squares.mean(), {}

    return minimize(forward, model.trainable_variables, optimizer)


def subset(task: Any, model: Any, optimizer: Any) -> Step:
    """Only the head has gradients, and slots."""

    def forward(batch: Any) -> Any:
        features, labels = batch
        return cross_entropy(labels, model(features, training=True)), {}

    head = model.get_layer("head").trainable_variables
    return minimize(forward, head, optimizer)


def conditional(task: Any, model: Any, optimizer: Any) -> Step:
    """The conditionals are Python's own."""
    variables = model.trainable_variables
    optimizer.build(variables)

    def step(batch: Any) -> Any:
        features, labels = batch
        loss = cross_entropy(labels, model(features))
        gradients = gradients_of(loss, variables)
        loss = loss.detach()
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
            apply(optimizer, gradients, variables)
        return detached({"loss": loss, "best": task.best.value})

    return step


def recurrent(task: Any, model: Any, optimizer: Any) -> Step:
    """The classifier, with more logs."""
    variables = model.trainable_variables
    optimizer.build(variables)

    def step(batch: Any) -> Any:
        features, labels = batch
        outputs = model(features, training=True)
        loss = cross_entropy(labels, outputs)
        gradients = gradients_of(loss, variables)
        apply(optimizer, gradients, variables)
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        return detached(
            {
                "loss": loss,
                "gradient_norm": norm,
                "largest_output": outputs.max(),
            }
        )

    return step
