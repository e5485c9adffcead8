"""Tasks as users write them, for the contract tests.

Small, seeded, and chosen so that every kind of state that a step can have is
in one of them. Each runs for a few epochs, and its validations, summaries and
checkpoints fall on different steps. Some have partial last batches: each is
one more program to compile.

This module is imported by the processes that the resume tests kill, and so
needs little but Keras and legato.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import matplotlib.figure
import numpy as np
from keras import layers, ops

import legato
from tests.contracts.examples import Examples, augment

EXAMPLES = 150
"""Of the training split: with batches of 32, four full ones and one of 22."""


def classes_data(
    split: str, shape: tuple[int, ...] = (8,), *, partial: bool = True
) -> Any:
    """Features and one of three classes that can be learned from them.

    Args:
        split: "train" or another.
        shape: of an example's features.
        partial: whether the last batch of 32 is smaller.
    """
    train = split == "train"
    random = np.random.default_rng(1 if train else 2)
    count = EXAMPLES if train else 45
    if not partial:
        count += -count % 32
    features = random.normal(size=(count, *shape)).astype("float32")
    flat = features.reshape(count, -1)
    sums = np.stack([flat[:, 0], flat[:, 1] + flat[:, 2], flat[:, 3]], axis=1)
    return features, np.argmax(sums, axis=1).astype("int32")


class Classifier(legato.Task):
    """What most of the tasks below share; the engine's own train_step."""

    has_partial_batches = True

    def build_model(self) -> Any:
        return keras.Sequential(
            [
                layers.Input((8,)),
                layers.Dense(16, activation="tanh"),
                layers.Dense(3),
            ]
        )

    def build_optimizer(self) -> Any:
        return keras.optimizers.SGD(0.1, momentum=0.9)

    def build_inputs(self, split: str) -> Any:
        data = classes_data(split, partial=self.has_partial_batches)
        return legato.ArraySource(data, batch_size=32, shuffle=split == "train")

    def build_losses(
        self, labels: Any, model_outputs: Any, aux_losses: Any = None
    ) -> Any:
        loss = keras.losses.sparse_categorical_crossentropy(
            labels, model_outputs, from_logits=True
        )
        return ops.mean(loss) + sum(aux_losses or [])

    def build_metrics(self, training: bool) -> Any:
        return [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]


class Measured(Classifier):
    """Metrics of every cadence and window, and others on the host."""

    def build_metrics(self, training: bool) -> Any:
        accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
        if not training:
            return [accuracy, ClassCounts()]
        top_2 = keras.metrics.SparseTopKCategoricalAccuracy(2, name="top_2")
        sampled = keras.metrics.SparseCategoricalCrossentropy(
            from_logits=True, name="sampled"
        )
        return {
            accuracy: legato.Every(2, over="summary"),
            top_2: legato.Every(3, over="batch"),
            sampled: legato.Sample(0.4),
            keras.metrics.SparseCategoricalAccuracy(name="never"): None,
        }

    def validation_step(
        self, inputs: Any, model: Any, metrics: Any = None
    ) -> Any:
        features, labels = inputs
        outputs = model(features, training=False)
        self.process_metrics(metrics, labels, outputs)
        return {
            "loss": self.build_losses(labels, outputs),
            "errors": ops.not_equal(ops.argmax(outputs, axis=-1), labels),
        }

    def aggregate_logs(self, state: Any, step_logs: Any) -> Any:
        return [*(state or []), step_logs["errors"]]

    def reduce_aggregated_logs(
        self, aggregated_logs: Any, global_step: int
    ) -> Any:
        errors = np.concatenate(aggregated_logs)
        return {"errors": {"mean": errors.mean(), "at": global_step}}


class ClassCounts(legato.HostMetric):
    """How often each class is the output, and whether that is right."""

    def reset_state(self) -> None:
        self.counts = np.zeros((3, 3), int)

    def update_state(self, labels: Any, outputs: Any) -> None:
        np.add.at(self.counts, (labels, outputs.argmax(axis=-1)), 1)

    def result(self) -> Any:
        right = np.diag(self.counts) / self.counts.sum(axis=1)
        return {
            "seen": self.counts.sum(),
            "recall": {f"class_{k}": right[k] for k in range(3)},
        }


class Plateau(Classifier):
    """(a) Dropout and batch norm; its callbacks lower the rate and stop."""

    def build_model(self) -> Any:
        return keras.Sequential(
            [
                layers.Input((8,)),
                layers.Dense(24, use_bias=False),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.Dropout(0.3),
                layers.Dense(3),
            ]
        )

    def build_optimizer(self) -> Any:
        # So fast that it stops getting better, and the callbacks act.
        return keras.optimizers.SGD(1.0, momentum=0.9)


class GAN(legato.Task):
    """(b) Two models and two optimizers, updated in turn in one step."""

    latent_size = 4

    def __init__(self) -> None:
        self.noise = keras.random.SeedGenerator(11)

    def build_model(self) -> Any:
        return {
            "generator": keras.Sequential(
                [
                    layers.Input((self.latent_size,)),
                    layers.Dense(16, use_bias=False),
                    layers.BatchNormalization(),
                    layers.LeakyReLU(0.2),
                    layers.Dense(2),
                ]
            ),
            "discriminator": Discriminator(),
        }

    def build_optimizer(self) -> Any:
        return {
            "generator": keras.optimizers.Adam(2e-3, beta_1=0.5),
            "discriminator": keras.optimizers.RMSprop(1e-3),
        }

    def build_inputs(self, split: str) -> Any:
        if split == "validation":
            return None
        random = np.random.default_rng(3)
        angles = random.uniform(0, 2 * np.pi, EXAMPLES)
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return legato.ArraySource(points, batch_size=32)

    def build_metrics(self, training: bool) -> Any:
        return [keras.metrics.Mean(name="fooled")]

    def train_step(
        self, inputs: Any, model: Any, optimizer: Any, metrics: Any = None
    ) -> Any:
        generator, discriminator = model["generator"], model["discriminator"]
        count = ops.shape(inputs)[0]

        def latent() -> Any:
            return keras.random.normal(
                (count, self.latent_size), seed=self.noise
            )

        def critic_loss() -> Any:
            fakes = ops.stop_gradient(generator(latent(), training=True))
            real = discriminator(inputs, training=True)
            # As in Keras, `losses` are those of the last call.
            penalty = sum(discriminator.losses)
            fake = discriminator(fakes, training=True)
            penalty += sum(discriminator.losses)
            loss = ops.mean(ops.softplus(-real)) + ops.mean(ops.softplus(fake))
            return loss + penalty

        d_loss, gradients = legato.value_and_grad(
            critic_loss,
            discriminator.trainable_variables,
            optimizer["discriminator"],
        )
        optimizer["discriminator"].apply(
            gradients, discriminator.trainable_variables
        )

        def generator_loss() -> Any:
            scores = discriminator(generator(latent(), training=True))
            return ops.mean(ops.softplus(-scores)), scores

        (g_loss, scores), gradients = legato.value_and_grad(
            generator_loss,
            generator.trainable_variables,
            optimizer["generator"],
        )
        optimizer["generator"].apply(gradients, generator.trainable_variables)
        for metric in metrics or ():
            metric.update_state(ops.cast(scores > 0, "float32"))
        return {self.loss: d_loss + g_loss, "d_loss": d_loss, "g_loss": g_loss}


@keras.saving.register_keras_serializable("legato_tests")
class Discriminator(keras.Model):
    """Dropout, and a loss of its own that keeps its scores small."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = layers.Dense(16, activation="tanh")
        self.dropout = layers.Dropout(0.2)
        self.score = layers.Dense(1)
        self.build((None, 2))

    def build(self, input_shape: Any) -> None:
        self.hidden.build(input_shape)
        self.score.build((None, 16))
        self.built = True

    def call(self, inputs: Any, training: bool = False) -> Any:
        hidden = self.dropout(self.hidden(inputs), training=training)
        scores = self.score(hidden)
        self.add_loss(0.05 * ops.mean(ops.square(scores)))
        return scores


class VAE(legato.Task):
    """(c) A KL weight on the Task, which a callback anneals."""

    def __init__(self) -> None:
        self.seeds = keras.random.SeedGenerator(5)
        self.kl_weight = keras.Variable(0.1, trainable=False, name="kl_weight")

    def build_model(self) -> Any:
        pixels = keras.Input((12,))
        hidden = layers.Dense(16, activation="tanh")(pixels)
        moments = layers.Dense(6)(hidden)
        latent = keras.Input((3,))
        restored = layers.Dense(16, activation="tanh")(latent)
        restored = layers.Dense(12)(restored)
        return {
            "encoder": keras.Model(pixels, moments),
            "decoder": keras.Model(latent, restored),
        }

    def build_optimizer(self) -> Any:
        return keras.optimizers.Adam(3e-3)

    def build_inputs(self, split: str) -> Any:
        random = np.random.default_rng(7 if split == "train" else 8)
        causes = random.normal(size=(EXAMPLES, 3))
        pixels = np.tanh(causes @ np.random.default_rng(9).normal(size=(3, 12)))
        return legato.ArraySource(pixels, batch_size=32)

    def losses(self, pixels: Any, model: Any, training: bool) -> Any:
        moments = model["encoder"](pixels, training=training)
        mean, log_variance = ops.split(moments, 2, axis=-1)
        noise = keras.random.normal(ops.shape(mean), seed=self.seeds)
        latent = mean + ops.exp(0.5 * log_variance) * noise
        restored = model["decoder"](latent, training=training)
        error = ops.mean(ops.sum(ops.square(restored - pixels), axis=-1))
        kl = -0.5 * ops.mean(
            ops.sum(
                1 + log_variance - ops.square(mean) - ops.exp(log_variance),
                axis=-1,
            )
        )
        return error, kl

    def train_step(
        self, inputs: Any, model: Any, optimizer: Any, metrics: Any = None
    ) -> Any:
        variables = [
            *model["encoder"].trainable_variables,
            *model["decoder"].trainable_variables,
        ]

        def forward() -> Any:
            error, kl = self.losses(inputs, model, True)
            return error + self.kl_weight * kl, (error, kl)

        (loss, (error, kl)), gradients = legato.value_and_grad(
            forward, variables, optimizer
        )
        optimizer.apply(gradients, variables)
        return {self.loss: loss, "error": error, "kl": kl}

    def validation_step(
        self, inputs: Any, model: Any, metrics: Any = None
    ) -> Any:
        error, kl = self.losses(inputs, model, False)
        return {self.loss: error + kl, "error": error}


class AnnealKL(keras.callbacks.Callback):
    """Raises a weight at each epoch; it knows nothing of checkpoints."""

    def __init__(self, weight: keras.Variable) -> None:
        super().__init__()
        self.weight = weight
        self.epochs_seen = 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epochs_seen += 1
        self.weight.assign(min(1.0, 0.1 + 0.15 * self.epochs_seen))


class HalfPrecision(Classifier):
    """(d) float16 whose gradients overflow at first, and again later."""

    has_partial_batches = False

    def build_model(self) -> Any:
        half = keras.DTypePolicy("mixed_float16")
        return keras.Sequential(
            [
                layers.Input((8,)),
                # No biases: their gradients are sums in float16, which XLA
                # rounds differently from one program to another.
                layers.Dense(16, activation="tanh", use_bias=False, dtype=half),
                layers.Dense(3, use_bias=False, dtype=half),
            ]
        )

    def build_optimizer(self) -> Any:
        return keras.optimizers.LossScaleOptimizer(
            keras.optimizers.Adam(0.01),
            # Gradients of the logits are about scale / batch size: the first
            # few overflow, and again each time when the scale has grown.
            initial_scale=2.0**24,
            dynamic_growth_steps=4,
        )

    def build_losses(
        self, labels: Any, model_outputs: Any, aux_losses: Any = None
    ) -> Any:
        outputs = ops.cast(model_outputs, "float32")
        return super().build_losses(labels, outputs, aux_losses)

    def train_step(
        self, inputs: Any, model: Any, optimizer: Any, metrics: Any = None
    ) -> Any:
        logs = super().train_step(inputs, model, optimizer, metrics)
        return {**logs, "scale": optimizer.dynamic_scale.value}


class Accumulation(Classifier):
    """(e) Three steps make one update."""

    has_partial_batches = False

    def build_optimizer(self) -> Any:
        return keras.optimizers.Adam(0.01, gradient_accumulation_steps=3)


class Averages(Classifier):
    """(f) Averaged weights, which replace the weights now and then."""

    has_partial_batches = False

    def build_optimizer(self) -> Any:
        return keras.optimizers.SGD(
            0.1, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=7
        )


class Regularized(Classifier):
    """(g) Losses of kernels and of activities."""

    has_partial_batches = False

    def build_model(self) -> Any:
        return keras.Sequential(
            [
                layers.Input((8,)),
                layers.Dense(
                    16,
                    activation="tanh",
                    kernel_regularizer=keras.regularizers.L2(0.01),
                    activity_regularizer=keras.regularizers.L1(0.001),
                ),
                layers.Dense(3, kernel_regularizer="l2"),
            ]
        )


class Settings(keras.callbacks.Callback):
    """Sets plain attributes once, which only checkpoints know afterwards."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            self.model.optimizer.clipnorm = 0.05
            self.model.layers[0].kernel_regularizer.l2 = np.float32(0.1)


class Nested(legato.Task):
    """(h) Nested dicts in, a dict out, and a loss for each output."""

    def build_model(self) -> Any:
        a, c = keras.Input((4,), name="a"), keras.Input((3,), name="c")
        both = layers.Concatenate()([layers.Dense(8, activation="tanh")(a), c])
        outputs = {
            "class": layers.Dense(3)(both),
            "size": layers.Dense(1)(both),
        }
        return keras.Model({"a": a, "b": {"c": c}}, outputs)

    def build_optimizer(self) -> Any:
        return keras.optimizers.Adam(0.01)

    def build_inputs(self, split: str) -> Any:
        features, classes = classes_data(split)
        inputs = {"a": features[:, :4], "b": {"c": features[:, 4:7]}}
        labels = {"class": classes, "size": features.sum(axis=1, keepdims=True)}
        return legato.ArraySource(
            (inputs, labels), batch_size=32, shuffle=split == "train"
        )

    def build_losses(
        self, labels: Any, model_outputs: Any, aux_losses: Any = None
    ) -> Any:
        of_class = keras.losses.sparse_categorical_crossentropy(
            labels["class"], model_outputs["class"], from_logits=True
        )
        of_size = ops.square(labels["size"] - model_outputs["size"])
        return ops.mean(of_class) + 0.5 * ops.mean(of_size)

    def build_metrics(self, training: bool) -> Any:
        return [keras.metrics.MeanAbsoluteError(name="mae")]

    def process_metrics(
        self, metrics: Any, labels: Any, model_outputs: Any
    ) -> None:
        for metric in metrics or ():
            metric.update_state(labels["size"], model_outputs["size"])


class Scheduled(Classifier):
    """(i) A learning-rate schedule, and decay of the weights."""

    has_partial_batches = False

    def build_optimizer(self) -> Any:
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0, 30, warmup_target=0.02, warmup_steps=6
        )
        return keras.optimizers.AdamW(schedule, weight_decay=0.01)


class Subset(Classifier):
    """(j) Only the head is trained; the backbone's weights stay."""

    has_partial_batches = False

    def build_model(self) -> Any:
        return keras.Sequential(
            [
                layers.Input((8,)),
                layers.Dense(16, activation="tanh", name="backbone"),
                layers.BatchNormalization(name="norm"),
                layers.Dense(3, name="head"),
            ]
        )

    def build_optimizer(self) -> Any:
        return keras.optimizers.AdamW(0.01, weight_decay=0.1)

    def train_step(
        self, inputs: Any, model: Any, optimizer: Any, metrics: Any = None
    ) -> Any:
        features, labels = inputs
        head = model.get_layer("head").trainable_variables

        def forward() -> Any:
            outputs = model(features, training=True)
            return self.build_losses(labels, outputs, model.losses), outputs

        (loss, outputs), gradients = legato.value_and_grad(
            forward, head, optimizer
        )
        optimizer.apply(gradients, head)
        self.process_metrics(metrics, labels, outputs)
        return {self.loss: loss}


class Conditional(Classifier):
    """(k) Conditionals that assign: nested, and of which one is in forward."""

    has_partial_batches = False

    def __init__(self) -> None:
        def counter(name: str) -> keras.Variable:
            return keras.Variable(0, dtype="int32", trainable=False, name=name)

        self.large = counter("large")
        self.skipped = counter("skipped")
        self.improved = counter("improved")
        self.best = keras.Variable(1e9, trainable=False, name="best")

    def train_step(
        self, inputs: Any, model: Any, optimizer: Any, metrics: Any = None
    ) -> Any:
        features, labels = inputs
        variables = model.trainable_variables

        def forward() -> Any:
            outputs = model(features, training=True)
            loss = self.build_losses(labels, outputs, model.losses)

            def count_large() -> None:
                self.large.assign_add(1)

            ops.cond(loss > 0.9, count_large, lambda: None)
            return loss, outputs

        (loss, outputs), gradients = legato.value_and_grad(
            forward, variables, optimizer
        )

        def better() -> None:
            self.best.assign(loss)

            def by_much() -> None:
                self.improved.assign_add(10)

            def by_little() -> None:
                self.improved.assign_add(1)

            ops.cond(loss < 0.8, by_much, by_little)

        def worse() -> None:
            self.best.assign(self.best * 1.01)

        ops.cond(loss < self.best, better, worse)

        def skip() -> None:
            self.skipped.assign_add(1)

        def update() -> None:
            optimizer.apply(gradients, variables)

        # Leaves out the batches that would lead it astray.
        ops.cond(loss > 1.1 * self.best, skip, update)
        self.process_metrics(metrics, labels, outputs)
        return {self.loss: loss, "best": self.best.value}


class Convolutional(Classifier):
    """(l) Convolutions, which run as single steps on a CPU."""

    has_partial_batches = False

    def build_model(self) -> Any:
        return keras.Sequential(
            [
                layers.Input((6, 6, 1)),
                layers.Conv2D(4, 3, activation="relu"),
                layers.MaxPooling2D(2),
                layers.Flatten(),
                layers.Dropout(0.1),
                layers.Dense(3),
            ]
        )

    def build_optimizer(self) -> Any:
        return keras.optimizers.Adam(0.01)

    def build_inputs(self, split: str) -> Any:
        data = classes_data(split, (6, 6, 1), partial=self.has_partial_batches)
        return legato.ArraySource(data, batch_size=32, shuffle=split == "train")


class Augmented(Classifier):
    """Examples that worker processes make, with noise of two kinds."""

    def build_inputs(self, split: str) -> Any:
        train = split == "train"
        return legato.RandomAccessSource(
            Examples(split),
            batch_size=32,
            transform=augment if train else None,
            shuffle=train,
            workers=2 if train else 0,
            processes=train,
        )


class WarmUp(keras.callbacks.Callback):
    """Sets the learning rate before every batch, by its own counter."""

    def __init__(self, peak: float, steps: int) -> None:
        super().__init__()
        self.peak = peak
        self.steps = steps
        self.batches_seen = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.batches_seen += 1
        share = min(1.0, self.batches_seen / self.steps)
        self.model.optimizer.learning_rate = self.peak * share


class Recurrent(Classifier):
    """(m) A scan within the step, several logs, metrics now and then."""

    has_partial_batches = False

    def build_model(self) -> Any:
        return keras.Sequential(
            [
                layers.Input((5, 4)),
                layers.LSTM(8, dropout=0.2),
                layers.Dense(3),
            ]
        )

    def build_optimizer(self) -> Any:
        return keras.optimizers.Adam(0.01, clipnorm=1.0)

    def build_inputs(self, split: str) -> Any:
        data = classes_data(split, (5, 4), partial=self.has_partial_batches)
        return legato.ArraySource(data, batch_size=32, shuffle=split == "train")

    def train_step(
        self, inputs: Any, model: Any, optimizer: Any, metrics: Any = None
    ) -> Any:
        features, labels = inputs

        def forward() -> Any:
            outputs = model(features, training=True)
            return self.build_losses(labels, outputs, model.losses), outputs

        (loss, outputs), gradients = legato.value_and_grad(
            forward, model.trainable_variables, optimizer
        )
        optimizer.apply(gradients, model.trainable_variables)
        self.process_metrics(metrics, labels, outputs)
        squares = [ops.sum(ops.square(g)) for g in gradients]
        return {
            "gradient_norm": ops.sqrt(sum(squares)),
            self.loss: loss,
            "largest_output": ops.max(outputs),
        }


class Spoilt(Classifier):
    """(n) One example makes its own loss NaN, and one ruins the weights.

    The latter has an ordinary loss with a gigantic gradient: it shows at the
    next step only.
    """

    def build_inputs(self, split: str) -> Any:
        features, labels = classes_data(split)
        if split == "train":
            features[7, 0] = np.nan
            features[100, 0] = 99.0
        return legato.ArraySource(
            (features, labels), batch_size=32, shuffle=split == "train"
        )

    def train_step(
        self, inputs: Any, model: Any, optimizer: Any, metrics: Any = None
    ) -> Any:
        features, labels = inputs
        ruins = ops.cast(ops.any(features[:, 0] > 90.0), "float32")
        features = ops.where(features > 90.0, 0.0, features)

        def forward() -> Any:
            outputs = model(features, training=True)
            mean = ops.mean(ops.square(outputs))
            nothing = ruins * 1e6 * (mean - ops.stop_gradient(mean))
            return self.build_losses(labels, outputs) + nothing, outputs

        (loss, outputs), gradients = legato.value_and_grad(
            forward, model.trainable_variables, optimizer
        )
        optimizer.apply(gradients, model.trainable_variables)
        self.process_metrics(metrics, labels, outputs)
        return {self.loss: loss}


class Board(keras.callbacks.Callback):
    """Writes what a network looks like; some of it only later."""

    def __init__(self, manager: legato.SummaryManager) -> None:
        super().__init__()
        self.manager = manager

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        kernel = self.model.layers[0].get_weights()[0]
        groups = {f"since{epoch - epoch % 2}": {"norm": (kernel**2).sum()}}
        if epoch % 3 == 1:
            figure = matplotlib.figure.Figure(figsize=(0.6, 0.4), dpi=50)
            figure.add_axes((0, 0, 1, 1)).plot(kernel.ravel())
            groups["pictures"] = {
                "kernel": abs(kernel[:, :, None]),
                "plot": figure,
            }
        self.manager.write_summaries(
            {"weights": kernel, "note": f"epoch {epoch}", **groups}
        )


def _no_callbacks(task: legato.Task) -> list[keras.callbacks.Callback]:
    del task
    return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """A task, its callbacks and how it is trained.

    Attributes:
        make_task: makes the task.
        make_callbacks: makes the callbacks for a task that it is given.
        config: arguments of `legato.TrainerConfig`.
        has_board: whether a summary manager of the user's takes the place of
            the engine's, and a callback writes to it too.
    """

    make_task: Callable[[], legato.Task]
    make_callbacks: Callable[[legato.Task], list[keras.callbacks.Callback]] = (
        _no_callbacks
    )
    config: dict[str, Any]
    has_board: bool = False

    def trainer(self, run_dir: Any, **changes: Any) -> legato.Trainer:
        """A trainer for it; `changes` to its config."""
        task = self.make_task()
        if self.has_board:
            manager = legato.SummaryManager(f"{run_dir}/board")
            return legato.Trainer(
                task,
                run_dir=run_dir,
                config=legato.TrainerConfig(**{**self.config, **changes}),
                callbacks=[Board(manager)],
                summary_manager=manager,
            )
        return legato.Trainer(
            task,
            run_dir=run_dir,
            config=legato.TrainerConfig(**{**self.config, **changes}),
            callbacks=self.make_callbacks(task),
        )


def _config(**changes: Any) -> dict[str, Any]:
    # Epochs are of 5 steps; no two of these cadences are multiples.
    return {
        "train_steps": 33,
        "seed": 4,
        "validation_interval": 7,
        "checkpoint_interval": 4,
        "summary_interval": 3,
        "progress": "none",
        **changes,
    }


SCENARIOS: dict[str, Scenario] = {
    "plateau": Scenario(
        make_task=Plateau,
        make_callbacks=lambda task: [
            keras.callbacks.ReduceLROnPlateau(patience=1),
            keras.callbacks.EarlyStopping(patience=3),
            keras.callbacks.History(),
        ],
        config=_config(
            train_steps=60, validation_interval="epoch", best_metric="val_loss"
        ),
    ),
    "gan": Scenario(make_task=GAN, config=_config()),
    "vae": Scenario(
        make_task=VAE,
        make_callbacks=lambda task: [AnnealKL(task.kl_weight)],
        config=_config(train_steps=32),
    ),
    "half_precision": Scenario(make_task=HalfPrecision, config=_config()),
    "accumulation": Scenario(make_task=Accumulation, config=_config()),
    "averages": Scenario(
        make_task=Averages,
        make_callbacks=lambda task: [
            keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        ],
        config=_config(validation_interval="epoch"),
    ),
    "regularized": Scenario(
        make_task=Regularized,
        make_callbacks=lambda task: [Settings()],
        config=_config(),
    ),
    "nested": Scenario(
        make_task=Nested,
        config=_config(best_metric="val_mae", best_mode="min"),
    ),
    "scheduled": Scenario(
        make_task=Scheduled, config=_config(checkpoint_interval="epoch")
    ),
    "subset": Scenario(make_task=Subset, config=_config()),
    "conditional": Scenario(make_task=Conditional, config=_config()),
    "convolutional": Scenario(
        make_task=Convolutional,
        make_callbacks=lambda task: [WarmUp(0.02, 12)],
        config=_config(train_steps=24),
    ),
    "augmented": Scenario(make_task=Augmented, config=_config()),
    "recurrent": Scenario(
        make_task=Recurrent, config=_config(train_metrics_interval=3)
    ),
    "recovering": Scenario(
        make_task=Spoilt,
        make_callbacks=lambda task: [WarmUp(0.1, 6)],
        config=_config(
            train_steps=13,
            best_metric="val_loss",
            loss_upper_bound=50.0,
            recovery_max_trials=20,
        ),
    ),
    "board": Scenario(
        make_task=Classifier,
        config=_config(sinks=["csv", "tensorboard"]),
        has_board=True,
    ),
    "metric_cadence": Scenario(
        make_task=Measured,
        config=_config(
            best_metric="val_recall/class_1",
            best_mode="max",
            train_metrics={"top_2": {"every": 2, "over": "batch"}},
        ),
    ),
}
