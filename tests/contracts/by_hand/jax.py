"""The steps written by hand on JAX: pure functions and `jax.grad`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras

from tests.contracts.by_hand.step import Step


def on_variables(
    groups: list[list[keras.Variable]], step: Callable[..., Any]
) -> Step:
    """A pure step, run on the values that Keras variables hold.

    Args:
        groups: lists of variables.
        step: `(batch, *values) -> (values, logs)`, with a list of values for
            each group.
    """

    def run(batch: Any) -> dict[str, Any]:
        values = [[v.value for v in group] for group in groups]
        values, logs = step(batch, *values)
        for group, new in zip(groups, values, strict=True):
            write(group, new)
        return logs

    return run


def write(variables: list[keras.Variable], values: list[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def apply(optimizer: Any, gradients: Any, variables: Any) -> None:
    weights, slots = optimizer.stateless_apply(
        [v.value for v in optimizer.variables],
        gradients,
        [v.value for v in variables],
    )
    write(variables, weights)
    write(optimizer.variables, slots)


def cross_entropy(labels: Any, logits: Any) -> Any:
    logits = logits.astype("float32")
    picked = jnp.take_along_axis(
        jax.nn.log_softmax(logits), labels[:, None], axis=1
    )
    return -jnp.mean(picked)


def classifier(task: Any, model: Any, optimizer: Any) -> Step:
    """One model, one optimizer of all its variables."""
    optimizer.build(model.trainable_variables)

    @jax.jit
    def step(batch: Any, weights: Any, others: Any, slots: Any) -> Any:
        features, labels = batch

        def loss_of(weights: Any) -> Any:
            outputs, new, losses = model.stateless_call(
                weights, others, features, training=True, return_losses=True
            )
            return cross_entropy(labels, outputs) + sum(losses), new

        (loss, others), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            weights
        )
        weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        return (weights, others, slots), {"loss": loss}

    return on_variables(
        [
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        ],
        step,
    )


def gan(task: Any, model: Any, optimizer: Any) -> Step:
    g, d = model["generator"], model["discriminator"]
    for name in model:
        optimizer[name].build(model[name].trainable_variables)

    def latent(seed: Any, count: int) -> Any:
        return draw(task.noise, seed, (count, task.latent_size))

    @jax.jit
    def step(
        points: Any, g_w: Any, g_o: Any, d_w: Any, d_o: Any, g_s: Any,
        d_s: Any, seed: Any,
    ) -> Any:  # fmt: skip
        (seed,) = seed
        noise, seed = latent(seed, len(points))
        fakes, g_o = g.stateless_call(g_w, g_o, noise, training=True)

        def d_loss_of(d_w: Any) -> Any:
            real, new, of_real = d.stateless_call(
                d_w, d_o, points, training=True, return_losses=True
            )
            fake, new, of_fake = d.stateless_call(
                d_w, new, fakes, training=True, return_losses=True
            )
            loss = jnp.mean(jax.nn.softplus(-real))
            loss += jnp.mean(jax.nn.softplus(fake))
            return loss + sum(of_real) + sum(of_fake), new

        (d_loss, d_o), gradients = jax.value_and_grad(d_loss_of, has_aux=True)(
            d_w
        )
        d_w, d_s = optimizer["discriminator"].stateless_apply(
            d_s, gradients, d_w
        )
        noise, seed = latent(seed, len(points))

        def g_loss_of(g_w: Any) -> Any:
            fakes, new = g.stateless_call(g_w, g_o, noise, training=True)
            scores, _ = d.stateless_call(d_w, d_o, fakes, training=False)
            return jnp.mean(jax.nn.softplus(-scores)), new

        (g_loss, g_o), gradients = jax.value_and_grad(g_loss_of, has_aux=True)(
            g_w
        )
        g_w, g_s = optimizer["generator"].stateless_apply(g_s, gradients, g_w)
        logs = {"loss": d_loss + g_loss, "d_loss": d_loss, "g_loss": g_loss}
        return (g_w, g_o, d_w, d_o, g_s, d_s, [seed]), logs

    return on_variables(
        [
            g.trainable_variables,
            g.non_trainable_variables,
            d.trainable_variables,
            d.non_trainable_variables,
            optimizer["generator"].variables,
            optimizer["discriminator"].variables,
            [task.noise.state],
        ],
        step,
    )


def vae(task: Any, model: Any, optimizer: Any) -> Step:
    encoder, decoder = model["encoder"], model["decoder"]
    variables = [*encoder.trainable_variables, *decoder.trainable_variables]
    split = len(encoder.trainable_variables)
    optimizer.build(variables)

    @jax.jit
    def step(
        pixels: Any, weights: Any, slots: Any, kl_weight: Any, seed: Any
    ) -> Any:
        noise, seed = draw(task.seeds, seed[0], (len(pixels), 3))

        def loss_of(weights: Any) -> Any:
            moments, _ = encoder.stateless_call(weights[:split], [], pixels)
            mean, log_variance = jnp.split(moments, 2, axis=1)
            latent = mean + jnp.exp(log_variance / 2) * noise
            restored, _ = decoder.stateless_call(weights[split:], [], latent)
            error = jnp.mean(jnp.sum((restored - pixels) ** 2, axis=1))
            terms = 1 + log_variance - mean**2 - jnp.exp(log_variance)
            kl = -0.5 * jnp.mean(jnp.sum(terms, axis=1))
            return error + kl_weight[0] * kl, (error, kl)

        (loss, (error, kl)), gradients = jax.value_and_grad(
            loss_of, has_aux=True
        )(weights)
        weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        logs = {"loss": loss, "error": error, "kl": kl}
        return (weights, slots, kl_weight, [seed]), logs

    return on_variables(
        [variables, optimizer.variables, [task.kl_weight], [task.seeds.state]],
        step,
    )


def half_precision(task: Any, model: Any, optimizer: Any) -> Step:
    """The loss is scaled before it is differentiated."""
    optimizer.build(model.trainable_variables)
    at = [v.name for v in optimizer.variables].index("dynamic_scale")

    @jax.jit
    def step(batch: Any, weights: Any, slots: Any) -> Any:
        features, labels = batch

        def loss_of(weights: Any) -> Any:
            outputs, _ = model.stateless_call(weights, [], features)
            loss = cross_entropy(labels, outputs)
            return loss * slots[at], loss

        gradients, loss = jax.grad(loss_of, has_aux=True)(weights)
        weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        return (weights, slots), {"loss": loss, "scale": slots[at]}

    return on_variables([model.trainable_variables, optimizer.variables], step)


def nested(task: Any, model: Any, optimizer: Any) -> Step:
    optimizer.build(model.trainable_variables)

    @jax.jit
    def step(batch: Any, weights: Any, slots: Any) -> Any:
        features, labels = batch

        def loss_of(weights: Any) -> Any:
            outputs, _ = model.stateless_call(weights, [], features)
            squares = (labels["size"] - outputs["size"]) ** 2
            of_class = cross_entropy(labels["class"], outputs["class"])
            return of_class + 0.5 * jnp.mean(squares)

        loss, gradients = jax.value_and_grad(loss_of)(weights)
        weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        return (weights, slots), {"loss": loss}

    return on_variables([model.trainable_variables, optimizer.variables], step)


def subset(task: Any, model: Any, optimizer: Any) -> Step:
    """Only the head has gradients, and slots."""
    head = model.get_layer("head").trainable_variables
    count = len(model.trainable_variables) - len(head)
    optimizer.build(head)

    @jax.jit
    def step(batch: Any, weights: Any, others: Any, slots: Any) -> Any:
        features, labels = batch

        def loss_of(head: Any) -> Any:
            outputs, new = model.stateless_call(
                [*weights[:count], *head], others, features, training=True
            )
            return cross_entropy(labels, outputs), new

        (loss, others), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            weights[count:]
        )
        head, slots = optimizer.stateless_apply(
            slots, gradients, weights[count:]
        )
        return ([*weights[:count], *head], others, slots), {"loss": loss}

    return on_variables(
        [
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        ],
        step,
    )


def conditional(task: Any, model: Any, optimizer: Any) -> Step:
    """The conditionals are Python's own."""
    optimizer.build(model.trainable_variables)

    def step(batch: Any, weights: Any, slots: Any, counts: Any) -> Any:
        features, labels = batch
        large, skipped, improved, best = counts

        def loss_of(weights: Any) -> Any:
            outputs, _ = model.stateless_call(weights, [], features)
            return cross_entropy(labels, outputs)

        loss, gradients = jax.value_and_grad(loss_of)(weights)
        if loss > 0.9:
            large += 1
        if loss < best:
            best = loss
            improved += 10 if loss < 0.8 else 1
        else:
            best = best * 1.01
        if loss > 1.1 * best:
            skipped += 1
        else:
            weights, slots = optimizer.stateless_apply(
                slots, gradients, weights
            )
        logs = {"loss": loss, "best": best}
        return (weights, slots, [large, skipped, improved, best]), logs

    return on_variables(
        [
            model.trainable_variables,
            optimizer.variables,
            [task.large, task.skipped, task.improved, task.best],
        ],
        step,
    )


def recurrent(task: Any, model: Any, optimizer: Any) -> Step:
    """The classifier, with more logs."""
    optimizer.build(model.trainable_variables)

    @jax.jit
    def step(batch: Any, weights: Any, others: Any, slots: Any) -> Any:
        features, labels = batch

        def loss_of(weights: Any) -> Any:
            outputs, new = model.stateless_call(
                weights, others, features, training=True
            )
            return cross_entropy(labels, outputs), (new, outputs)

        (loss, (others, outputs)), gradients = jax.value_and_grad(
            loss_of, has_aux=True
        )(weights)
        weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in gradients))
        return (weights, others, slots), {
            "loss": loss,
            "gradient_norm": norm,
            "largest_output": jnp.max(outputs),
        }

    return on_variables(
        [
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        ],
        step,
    )


def draw(generator: Any, seed: Any, shape: tuple[int, ...]) -> Any:
    """Normal numbers from a SeedGenerator's state, and its next state."""
    with keras.StatelessScope(state_mapping=[(generator.state, seed)]) as scope:
        noise = keras.random.normal(shape, seed=generator)
    return noise, scope.get_current_value(generator.state)
