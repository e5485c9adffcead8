"""Calls of `legato.fit` as users write them, for the processes that are killed.

The first twelve are those in which Keras's own `BackupAndRestore`, saving in
mid-epoch, ends with other weights each time.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

import legato
from tests.contracts import models

Callbacks = list[keras.callbacks.Callback]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitScenario:
    """A script that ends in `legato.fit`.

    Attributes:
        make: makes the compiled model and its data.
        callbacks: makes the callbacks, for a run directory.
        arguments: more of them, for `fit`.
    """

    make: Callable[[], models.Kind]
    callbacks: Callable[[Path], Callbacks] = lambda run_dir: []
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def train(
        self, run_dir: Path, overrides: dict[str, Any]
    ) -> keras.callbacks.History:
        """Run the script."""
        made = self.make()
        return legato.fit(
            made.model,
            **{
                **made.data,
                "epochs": 4,
                "verbose": 0,
                "checkpoint_interval": 2,
                **self.arguments,
                **overrides,
            },
            callbacks=self.callbacks(run_dir),
            run_dir=run_dir,
        )


def compiled(
    *middle: Any, optimizer: Any = None, partial: bool = False, **data: Any
) -> Callable[[], models.Kind]:
    """A small classifier; what is given is made anew for each model.

    Args:
        *middle: make its layers.
        optimizer: makes that.
        partial: whether the last batches are smaller: more to compile.
        **data: more arguments of `fit`.
    """
    count = 70 if partial else 80

    def make() -> models.Kind:
        model = models.mlp(*middle)
        model.compile(
            optimizer() if optimizer else keras.optimizers.SGD(0.1),
            models.cross_entropy(),
            metrics=["accuracy"],
        )
        x, y = models.points()
        return models.Kind(
            model,
            {
                "x": x[:count],
                "y": y[:count],
                "batch_size": 16,
                "validation_data": (x[count:], y[count:]),
                **data,
            },
        )

    return make


def adam(**options: Any) -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(0.01, **options)


class BatchRate(keras.callbacks.Callback):
    """A learning rate for each batch, by a counter (requirements, C1)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = 0.2 / (1 + 0.3 * self.count)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.count += 1


class RandomRate(keras.callbacks.Callback):
    """Generators of its own, of NumPy's and of Python's, and a history."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(4)
        self.losses: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        draw = self.generator.uniform() + 0.1 * np.random.uniform()
        self.model.optimizer.learning_rate = 0.1 * draw

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.losses.append(logs["loss"])
        if len(self.losses) % 5 == 0:
            mean = float(np.mean(self.losses[-5:]))
            self.model.optimizer.learning_rate = 0.02 * mean


class Measuring(keras.callbacks.Callback):
    """Evaluates and predicts in the middle of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch % 3 == 1:
            x, y = models.points(20)
            measured = self.model.evaluate(x, y, verbose=0, return_dict=True)
            spread = float(np.std(self.model.predict(x, verbose=0)))
            self.seen.append(measured["loss"] + spread)
            self.model.optimizer.learning_rate = 0.01 * self.seen[-1]


class Shuffled(keras.utils.PyDataset):
    """Orders itself anew after each epoch, with NumPy's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = models.points(70)
        self.order = np.arange(70)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        rows = self.order[index * 16 : (index + 1) * 16]
        return self.x[rows], self.y[rows]

    def on_epoch_end(self) -> None:
        np.random.shuffle(self.order)


def dataset(make: Callable[[], Any]) -> Callable[[], models.Kind]:
    def with_dataset() -> models.Kind:
        made = compiled(lambda: layers.Dropout(0.2), optimizer=adam)()
        return models.Kind(made.model, {"x": make()})

    return with_dataset


def tensorflow_dataset() -> Any:
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices(models.points(70))
    return data.shuffle(70, seed=3).batch(16)


def torch_loader() -> Any:
    import torch

    x, y = models.points(70)
    data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    return torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)


def tensorflow_without_end() -> Any:
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices(models.points(70))
    return data.shuffle(20, seed=3).repeat().batch(4).prefetch(2)


def grain_dataset() -> Any:
    import grain

    x, y = models.points(70)
    return (
        grain.MapDataset.range(70)
        .shuffle(seed=3)
        .map(lambda i: (x[i], y[i]))
        .batch(8)
    )


class Tells:
    """An iterator without end that tells its state."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)

    def __iter__(self) -> "Tells":
        return self

    def __next__(self) -> Any:
        rows = self.generator.integers(0, 70, 8)
        x, y = models.points(70)
        return x[rows] + np.float32(np.random.rand()), y[rows]

    def get_state(self) -> Any:
        return self.generator.bit_generator.state

    def set_state(self, state: Any) -> None:
        self.generator.bit_generator.state = state


TWELVE: dict[str, FitScenario] = {
    "sgd": FitScenario(
        make=compiled(partial=True), arguments={"shuffle": False}
    ),
    "adam": FitScenario(
        make=compiled(optimizer=adam), arguments={"shuffle": False}
    ),
    "shuffle": FitScenario(make=compiled(optimizer=adam, partial=True)),
    "dropout": FitScenario(
        make=compiled(lambda: layers.Dropout(0.3), optimizer=adam)
    ),
    "batch_norm": FitScenario(
        make=compiled(layers.BatchNormalization, partial=True)
    ),
    "loss_scale": FitScenario(make=models.loss_scaled),
    "accumulation": FitScenario(
        make=compiled(optimizer=lambda: adam(gradient_accumulation_steps=3))
    ),
    "averages": FitScenario(
        make=compiled(optimizer=lambda: adam(use_ema=True, ema_momentum=0.8)),
        callbacks=lambda run: [
            keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        ],
    ),
    "batch_rate": FitScenario(
        make=compiled(partial=True), callbacks=lambda run: [BatchRate()]
    ),
    "plateau": FitScenario(
        make=compiled(),
        callbacks=lambda run: [
            keras.callbacks.ReduceLROnPlateau(
                patience=1, cooldown=1, min_delta=0.05
            )
        ],
        arguments={"epochs": 6},
    ),
    "early_stopping": FitScenario(
        make=compiled(optimizer=lambda: adam(clipnorm=1.0)),
        callbacks=lambda run: [
            keras.callbacks.EarlyStopping(
                patience=2, min_delta=0.1, restore_best_weights=True
            )
        ],
        arguments={"epochs": 8},
    ),
    "csv_logger": FitScenario(
        make=compiled(),
        callbacks=lambda run: [keras.callbacks.CSVLogger(run / "log.csv")],
    ),
}
"""The set-ups of requirements.md, part D."""

FIT_SCENARIOS: dict[str, FitScenario] = {
    **TWELVE,
    "own_step": FitScenario(make=models.own_step),
    "own_train_step": FitScenario(make=models.own_train_step),
    "own_metrics": FitScenario(make=models.own_metrics),
    "several_outputs": FitScenario(make=models.several_outputs),
    "convolutional": FitScenario(make=models.convolutional),
    "random_rate": FitScenario(
        make=compiled(), callbacks=lambda run: [RandomRate()]
    ),
    "measuring": FitScenario(
        make=compiled(partial=True), callbacks=lambda run: [Measuring()]
    ),
    "sampled_metrics": FitScenario(
        make=compiled(lambda: layers.Dropout(0.3)),
        arguments={
            "train_metrics": {
                "accuracy": legato.Every(3),
                "sparse_categorical_accuracy": legato.Sample(0.4),
            },
            "validation_metrics": ["accuracy"],
        },
    ),
    "no_metrics": FitScenario(
        make=compiled(lambda: layers.Dropout(0.3)),
        arguments={"train_metrics": None, "validation_metrics": None},
    ),
    "epochs_of_steps": FitScenario(
        make=compiled(lambda: layers.Dropout(0.3), optimizer=adam),
        arguments={
            "steps_per_epoch": 3,
            "epochs": 6,
            "validation_freq": [1, 4],
            "initial_epoch": 1,
        },
    ),
    "py_dataset": FitScenario(make=dataset(Shuffled)),
    "tf_data": FitScenario(make=dataset(tensorflow_dataset)),
    "data_loader": FitScenario(make=dataset(torch_loader)),
    "tf_data_told": FitScenario(
        make=dataset(tensorflow_without_end),
        arguments={"steps_per_epoch": 40, "checkpoint_interval": 20},
    ),
    "grain": FitScenario(make=dataset(grain_dataset)),
    "tells": FitScenario(make=dataset(Tells), arguments={"steps_per_epoch": 7}),
}
if "adversaries" in models.KINDS:
    FIT_SCENARIOS["adversaries"] = FitScenario(make=models.adversaries)
