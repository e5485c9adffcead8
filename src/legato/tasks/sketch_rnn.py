"""Sketch-RNN: a variational autoencoder of drawings."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from legato.backends import value_and_grad
from legato.task import Task
from legato.tasks.pictures import sketches
from legato.tasks.strokes import START


class SketchRNNTask(Task):
    """Draws what it has seen drawn.

    (D. Ha and D. Eck, "A Neural Representation of Sketch Drawings", 2017,
    arXiv:1704.03477.)

    Batches are drawings in "stroke-5", `[batch, max_length + 1, 5]`: see
    `legato.tasks.strokes`. Give them as the config's `data`, or define
    `build_inputs`.

    Args:
        max_length: points of a drawing, after the start.
        encoder_units: of each direction of the encoder.
        decoder_units: of the decoder.
        latent_size: of the code of a drawing.
        mixtures: Gaussians that the next move is drawn from.
        dropout: of what both networks' cells return.
        kl_weight: how much the divergence of codes counts in the end.
        kl_start: what share of that it counts at first.
        kl_rate: the rest of it falls by this factor with each step.
        kl_least: divergences below this are as good as this.
        learning_rate: of Adam, at first.
        least_learning_rate: what it falls to.
        decay: the rest of it falls by this factor with each step.
        clip: gradients' values are clipped at this.
        shown: how many drawings are made for the summaries of validation.
        temperature: of these: below 1 they are more regular.
    """

    def __init__(
        self,
        max_length: int,
        encoder_units: int = 128,
        decoder_units: int = 256,
        latent_size: int = 32,
        mixtures: int = 10,
        dropout: float = 0.1,
        kl_weight: float = 0.5,
        kl_start: float = 0.01,
        kl_rate: float = 0.999,
        kl_least: float = 0.2,
        learning_rate: float = 1e-3,
        least_learning_rate: float = 1e-5,
        decay: float = 0.9995,
        clip: float = 1.0,
        shown: int = 8,
        temperature: float = 0.4,
    ) -> None:
        self.max_length = max_length
        self.encoder_units = encoder_units
        self.decoder_units = decoder_units
        self.latent_size = latent_size
        self.mixtures = mixtures
        self.dropout = dropout
        self.kl_weight = kl_weight
        self.kl_start = kl_start
        self.kl_rate = kl_rate
        self.kl_least = kl_least
        self.learning_rate = learning_rate
        self.least_learning_rate = least_learning_rate
        self.decay = decay
        self.clip = clip
        self.shown = shown
        self.temperature = temperature
        self.seeds = keras.random.SeedGenerator(seed=0)
        self.annealed = keras.Variable(0.0, trainable=False, name="kl_weight")

    def build_model(self) -> dict[str, keras.Model]:
        """The encoder of drawings and the decoder of codes.

        Returns:
            `encoder`: drawings without the last number of each point, to the
            mean and the logarithm of the variance of a code, side by side.
            `decoder`: the points before, and a code, to the numbers of the
            distribution of each next point.
        """
        # (What comes after the end is 0 in all four numbers, and masked.)
        drawing = keras.Input((self.max_length, 4))
        encoded = layers.Bidirectional(layers.LSTM(self.encoder_units))(
            layers.Masking()(drawing)
        )
        # (The cells' own dropout draws at every call, also where `draw` calls
        # them in a loop, which may not change seeds.)
        encoded = layers.Dropout(self.dropout)(encoded)
        before = keras.Input((self.max_length, 5))
        code = keras.Input((self.latent_size,))
        units = self.decoder_units
        state = layers.Dense(2 * units, activation="tanh")(code)
        hidden = layers.LSTM(units, return_sequences=True)(
            layers.Concatenate()(
                [before, layers.RepeatVector(self.max_length)(code)]
            ),
            initial_state=[state[:, :units], state[:, units:]],
        )
        hidden = layers.Dropout(self.dropout)(hidden)
        return {
            "encoder": keras.Model(
                drawing, layers.Dense(2 * self.latent_size)(encoded)
            ),
            "decoder": keras.Model(
                [before, code], layers.Dense(6 * self.mixtures + 3)(hidden)
            ),
        }

    def build_optimizer(self) -> keras.optimizers.Optimizer:
        """Adam; `build_callbacks` has its rate fall."""
        return keras.optimizers.Adam(self.learning_rate, clipvalue=self.clip)

    def build_callbacks(self) -> list[keras.callbacks.Callback]:
        """The weight of the divergence rises, and the learning rate falls."""
        return [
            KLAnnealing(
                self.annealed, self.kl_weight, self.kl_start, self.kl_rate
            ),
            RateDecay(self.learning_rate, self.least_learning_rate, self.decay),
        ]

    def compute_losses(
        self, drawings: Any, model: Any, *, training: bool
    ) -> tuple[Any, Any]:
        """The reconstruction loss and the divergence, scalars.

        Args:
            drawings: a batch.
            model: what `build_model` returned.
            training: whether this is training.
        """
        after = drawings[:, 1:]
        moments = model["encoder"](after[..., :4], training=training)
        mean, log_variance = ops.split(moments, 2, axis=-1)
        noise = keras.random.normal(ops.shape(mean), seed=self.seeds)
        code = mean + ops.exp(log_variance / 2) * noise
        outputs = model["decoder"]([drawings[:, :-1], code], training=training)
        likely = mixture_log_density(outputs, after[..., :2], self.mixtures)
        pen = ops.log_softmax(outputs[..., -3:])
        # After the end there is no move any more, but the pen stays there.
        there = 1.0 - after[..., 4]
        lost = likely * there + ops.sum(pen * after[..., 2:], axis=-1)
        kl = -0.5 * ops.mean(
            1 + log_variance - ops.square(mean) - ops.exp(log_variance)
        )
        return -ops.mean(lost), kl

    def train_step(
        self, inputs: Any, model: Any, optimizer: Any, metrics: Any = None
    ) -> dict[str, Any]:
        """One update of both networks."""
        del metrics
        variables = [
            *model["encoder"].trainable_variables,
            *model["decoder"].trainable_variables,
        ]

        def forward() -> tuple[Any, Any]:
            lost, kl = self.compute_losses(inputs, model, training=True)
            counted = ops.maximum(kl, self.kl_least)
            return lost + self.annealed * counted, (lost, kl)

        (loss, (lost, kl)), gradients = value_and_grad(
            forward, variables, optimizer
        )
        optimizer.apply(gradients, variables)
        return {self.loss: loss, "reconstruction": lost, "kl": kl}

    def validation_step(
        self, inputs: Any, model: Any, metrics: Any = None
    ) -> dict[str, Any]:
        """The loss with the divergence's full weight, and some drawings."""
        del metrics
        lost, kl = self.compute_losses(inputs, model, training=False)
        loss = lost + self.kl_weight * ops.maximum(kl, self.kl_least)
        shape = (self.shown, self.latent_size)
        code = keras.random.normal(shape, seed=self.seeds)
        drawn = self.draw(model["decoder"], code) if self.shown else code
        return {
            self.loss: loss,
            "reconstruction": lost,
            "kl": kl,
            "drawn": (inputs[: self.shown], drawn),
        }

    def draw(self, decoder: Any, code: Any) -> Any:
        """Draws what codes stand for.

        Args:
            decoder: as `build_model` has made it.
            code: `[drawings, latent_size]`.

        Returns:
            Drawings in "stroke-5", `[drawings, max_length + 1, 5]`.
        """
        count, length = code.shape[0], self.max_length
        # All that is random is drawn before: a loop may not change seeds.
        noise = keras.random.normal((length, count, 2), seed=self.seeds)
        shape = (length, count, self.mixtures + 3)
        uniform = keras.random.uniform(shape, 1e-6, 1 - 1e-6, seed=self.seeds)
        gumbel = -ops.log(-ops.log(uniform))
        start = np.zeros((count, length + 1, 5), np.float32)
        start[:, 0] = START

        def next_point(i: Any, drawings: Any) -> Any:
            outputs = decoder([drawings[:, :-1], code], training=False)
            point = self._choose(
                ops.take(outputs, i, axis=1),
                ops.take(gumbel, i, axis=0),
                ops.take(noise, i, axis=0),
            )
            here = ops.arange(length + 1)[None, :, None] == i + 1
            return ops.where(here, point[:, None], drawings)

        return ops.fori_loop(
            0, length, next_point, ops.convert_to_tensor(start)
        )

    def _choose(self, outputs: Any, gumbel: Any, noise: Any) -> Any:
        """A point `[drawings, 5]` from its distribution."""
        count, cold = self.mixtures, self.temperature
        logits, mean_x, mean_y, log_x, log_y, skew = _parts(outputs, count)
        # The largest of logits and Gumbel noise is drawn by their softmax.
        chosen = ops.one_hot(
            ops.argmax(logits / cold + gumbel[:, :count], axis=-1), count
        )
        mean_x, mean_y, log_x, log_y, skew = (
            ops.sum(each * chosen, axis=-1)
            for each in (mean_x, mean_y, log_x, log_y, skew)
        )
        x, y = noise[:, 0] * math.sqrt(cold), noise[:, 1] * math.sqrt(cold)
        y = skew * x + ops.sqrt(1 - ops.square(skew)) * y
        pen = outputs[:, -3:] / cold + gumbel[:, count:]
        return ops.concatenate(
            [
                ops.stack(
                    [mean_x + ops.exp(log_x) * x, mean_y + ops.exp(log_y) * y],
                    axis=-1,
                ),
                ops.one_hot(ops.argmax(pen, axis=-1), 3),
            ],
            axis=-1,
        )

    def aggregate_logs(self, state: Any, step_logs: dict[str, Any]) -> Any:
        """Keeps the drawings of the first batch."""
        return state or step_logs["drawn"]

    def reduce_aggregated_logs(
        self, aggregated_logs: Any, global_step: int
    ) -> dict[str, Any]:
        """Pictures for summaries: of validation above, of its own below."""
        del global_step
        if not self.shown:
            return {}
        rows = [sketches(each) for each in aggregated_logs]
        return {"drawings": np.concatenate(rows, axis=0)[None]}


def _parts(outputs: Any, mixtures: int) -> Sequence[Any]:
    """Logits, means, logarithms of deviations, and correlations of moves."""
    *parts, skew = ops.split(outputs[..., : 6 * mixtures], 6, axis=-1)
    return [*parts, 0.999 * ops.tanh(skew)]


def mixture_log_density(outputs: Any, moves: Any, mixtures: int) -> Any:
    """The logarithm of the density of moves (the paper's equation 9).

    Args:
        outputs: of the decoder, `[..., 6 * mixtures + 3]`.
        moves: `[..., 2]`.
        mixtures: the number of Gaussians.

    Returns:
        `[...]`.
    """
    logits, mean_x, mean_y, log_x, log_y, skew = _parts(outputs, mixtures)
    x = (moves[..., :1] - mean_x) * ops.exp(-log_x)
    y = (moves[..., 1:] - mean_y) * ops.exp(-log_y)
    rest = 1 - ops.square(skew)
    distance = (ops.square(x) + ops.square(y) - 2 * skew * x * y) / rest
    each = -distance / 2 - log_x - log_y - ops.log(rest) / 2
    mixed = ops.logsumexp(ops.log_softmax(logits) + each, axis=-1)
    return mixed - math.log(2 * math.pi)


class KLAnnealing(keras.callbacks.Callback):
    """Raises the weight of the divergence with each batch.

    Args:
        variable: the weight.
        weight: what it is in the end.
        start: what share of that it is at first.
        rate: by which the rest falls with each batch.
    """

    def __init__(
        self, variable: keras.Variable, weight: float, start: float, rate: float
    ) -> None:
        super().__init__()
        self.variable = variable
        self.weight = weight
        self.start = start
        self.rate = rate
        self.batches = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Assigns the weight of this batch."""
        share = 1 - (1 - self.start) * self.rate**self.batches
        self.variable.assign(self.weight * share)
        self.batches += 1


class RateDecay(keras.callbacks.Callback):
    """Lowers the learning rate with each batch.

    Args:
        first: the rate of the first batch.
        last: what it falls to.
        decay: by which the rest falls with each batch.
    """

    def __init__(self, first: float, last: float, decay: float) -> None:
        super().__init__()
        self.first = first
        self.last = last
        self.decay = decay
        self.batches = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Sets the rate of this batch."""
        rest = (self.first - self.last) * self.decay**self.batches
        model: Any = self.model
        model.optimizer.learning_rate = self.last + rest
        self.batches += 1
