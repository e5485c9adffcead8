"""Handwritten digits: a small classifier on real data that ship in a package.

1,797 images of 8 x 8 pixels from the UCI repository, as scikit-learn packages
them (E. Alpaydin and C. Kaynak, 1998).
"""

from collections.abc import Sequence
from typing import Any, cast

import keras
import numpy as np

from legato.data import ArraySource, DataSource
from legato.errors import ConfigError
from legato.task import Task

_VALIDATION_SHARE = 5  # every fifth image


class Digits(Task):
    """A two-layer network with noise, dropout and batch normalisation.

    Args:
        hidden_units: width of the hidden layer.
        noise: standard deviation of what is added to pixels in training.
        dropout: share of hidden units that are dropped.
        learning_rate: of Adam.
        batch_size: images in a training batch.
    """

    def __init__(
        self,
        hidden_units: int = 256,
        noise: float = 0.15,
        dropout: float = 0.4,
        learning_rate: float = 1e-3,
        batch_size: int = 64,
    ) -> None:
        self.hidden_units = hidden_units
        self.noise = noise
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.cross_entropy = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True
        )

    def build_model(self) -> keras.Model:
        """64 pixels to 10 logits."""
        return keras.Sequential(
            [
                keras.layers.Input((64,)),
                keras.layers.GaussianNoise(self.noise),
                keras.layers.Dense(self.hidden_units, activation="relu"),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(self.dropout),
                keras.layers.Dense(10),
            ]
        )

    def build_optimizer(self) -> keras.optimizers.Optimizer:
        """Adam."""
        return keras.optimizers.Adam(self.learning_rate)

    def build_inputs(self, split: str) -> DataSource:
        """Features `[batch, 64]` in [0, 1], labels `[batch]`."""
        return ArraySource(
            load_digits(split),
            batch_size=self.batch_size,
            shuffle=split == "train",
        )

    def build_losses(
        self, labels: Any, model_outputs: Any, aux_losses: Any = None
    ) -> Any:
        """Cross-entropy, plus any losses of the model's layers."""
        return self.cross_entropy(labels, model_outputs) + sum(aux_losses or [])

    def build_metrics(self, training: bool) -> Sequence[keras.metrics.Metric]:
        """Accuracy."""
        del training
        return [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]


def load_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of a split.

    Args:
        split: "train" or "validation", which is every fifth image.

    Returns:
        Images, float32 `[digits, 64]` from 0 (paper) to 1 (ink), and the
        digits that they show, int32 `[digits]`.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as error:
        raise ConfigError(
            "The digits come with scikit-learn, which is not installed: "
            'pip install "legato[digits]"'
        ) from error
    # (What it returns depends on its arguments, which no checker follows.)
    images, labels = cast("Any", load(return_X_y=True))
    held_out = np.arange(len(images)) % _VALIDATION_SHARE == 0
    chosen = held_out if split == "validation" else ~held_out
    images = (images[chosen] / 16.0).astype("float32")
    return images, labels[chosen].astype("int32")


def digit_images(split: str, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Those of `load_digits` as images.

    Args:
        split: "train" or "validation".
        size: height and width, in pixels; a multiple of 8.

    Returns:
        Images, float32 `[digits, size, size, 1]`, and the digits.

    Raises:
        ConfigError: scikit-learn is not installed, or `size` is no multiple.
    """
    if size < 8 or size % 8:
        raise ConfigError(f"size={size}: it must be a multiple of 8.")
    images, labels = load_digits(split)
    larger = np.ones((1, size // 8, size // 8, 1), "float32")
    return np.kron(images.reshape(-1, 8, 8, 1), larger), labels
