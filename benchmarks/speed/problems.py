"""What is trained: the models, their data, and how much of them is a turn."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

LEARNING_RATE = 1e-3
CLASSES = 10
RESIDUAL = 0.02


def _of_the_engine():
    """The MLP of `benchmarks/start/model.py`, which `engine.py` trains."""
    path = Path(__file__).parent.parent / "start" / "model.py"
    spec = importlib.util.spec_from_file_location("engine_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ENGINE = _of_the_engine()


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model and its data.

    Attributes:
        name: for the command line.
        shapes: of data and layers, for the table.
        build: makes the model: features to logits `[batch, 10]`.
        shape: of an example.
        batch: examples in one.
        steps: in an epoch, which is the least that is timed.
        top3: whether a second metric is computed beside the accuracy.
        tolerance: how far apart the mean losses of contestants' first epochs
            may be, as a share. Dropout draws other masks in each of them.
        data: makes so many examples, if not `clusters`.
    """

    name: str
    shapes: str
    build: Callable[[], keras.Model]
    shape: tuple[int, ...]
    batch: int
    steps: int
    top3: bool = False
    tolerance: float = 1e-3

    @property
    def examples(self) -> int:
        """In an epoch: all batches are full."""
        return self.batch * self.steps

    def make(self) -> keras.Model:
        """The model, with the same weights each time."""
        keras.utils.set_random_seed(0)
        return self.build()

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 and labels int32, in the order of training."""
        if self.name == "mlp":
            return ENGINE.make_data(self.examples)
        rng = np.random.default_rng(0)
        labels = rng.integers(0, CLASSES, self.examples).astype("int32")
        centers = rng.normal(size=(CLASSES, *self.shape))
        noise = 4 * rng.normal(size=(self.examples, *self.shape))
        return (centers[labels] + noise).astype("float32"), labels

    def metrics(self) -> list[keras.metrics.Metric]:
        """New ones."""
        accuracy, top3 = ENGINE.build_metrics()
        return [accuracy, top3] if self.top3 else [accuracy]


def _cnn() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(CLASSES),
        ]
    )


def _lstm(length: int, features: int, units: int) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        return keras.Sequential(
            [
                keras.Input((length, features)),
                keras.layers.LSTM(units),
                keras.layers.Dense(CLASSES),
            ]
        )

    return build


def _transformer(
    length: int, width: int, heads: int, blocks: int
) -> Callable[[], keras.Model]:
    """Pre-norm blocks; `modules.py` names its layers in this order."""

    def build() -> keras.Model:
        layers = keras.layers
        x = inputs = keras.Input((length, width))
        for _ in range(blocks):
            y = layers.LayerNormalization()(x)
            x += layers.MultiHeadAttention(heads, width // heads)(y, y)
            y = layers.LayerNormalization()(x)
            y = layers.Dense(2 * width, activation="relu")(y)
            x += layers.Dense(width)(y)
        x = layers.GlobalAveragePooling1D()(x)
        return keras.Model(inputs, layers.Dense(CLASSES)(x))

    return build


def _many(count: int, width: int) -> Callable[[], keras.Model]:
    """`count` residual layers of two variables each, the head among them.

    Each adds little, or so deep a network would make large differences of
    those that rounding makes.
    """

    def build() -> keras.Model:
        x = inputs = keras.Input((width,))
        for _ in range(count - 1):
            x += RESIDUAL * keras.layers.Dense(width, activation="tanh")(x)
        return keras.Model(inputs, keras.layers.Dense(CLASSES)(x))

    return build


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            "mlp",
            "MLP 64-64-10, dropout 0.2, batch 32, two metrics",
            ENGINE.build_model,
            (64,),
            batch=32,
            steps=1024,
            top3=True,
            tolerance=0.03,
        ),
        Problem(
            "tiny-lstm",
            "LSTM of 16 units over 8 steps of 8 features, batch 16",
            _lstm(8, 8, 16),
            (8, 8),
            batch=16,
            steps=512,
        ),
        Problem(
            "tiny-transformer",
            "transformer, 1 block, width 16, 2 heads, 8 positions, batch 16",
            _transformer(8, 16, 2, 1),
            (8, 16),
            batch=16,
            steps=512,
        ),
        Problem(
            "cnn",
            "CNN: convolutions of 8 and 16 filters (3 x 3) around a pooling, "
            "28 x 28 x 1, batch 64",
            _cnn,
            (28, 28, 1),
            batch=64,
            steps=128,
        ),
        Problem(
            "lstm",
            "LSTM of 64 units over 32 steps of 32 features, batch 32",
            _lstm(32, 32, 64),
            (32, 32),
            batch=32,
            steps=128,
        ),
        Problem(
            "transformer",
            "transformer, 2 blocks, width 64, 4 heads, 32 positions, batch 16",
            _transformer(32, 64, 4, 2),
            (32, 64),
            batch=16,
            steps=128,
        ),
        Problem(
            "many-variables",
            "150 residual Dense layers of width 8: 300 variables, batch 32",
            _many(150, 8),
            (8,),
            batch=32,
            steps=256,
        ),
    )
}
