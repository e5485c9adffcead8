"""The model that the benchmarks of the engine train: MLP 64-64-10.

`benchmarks/engine.py` and the scripts beside this one share it.
"""

import keras
import numpy as np

BATCH = 32
RATE = 0.2
LEARNING_RATE = 1e-3


def build_model() -> keras.Model:
    """64 features to 10 logits, with dropout."""
    return keras.Sequential(
        [
            keras.layers.Input((64,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dropout(RATE),
            keras.layers.Dense(10),
        ]
    )


def build_metrics() -> list[keras.metrics.Metric]:
    """Two metrics that look at every batch."""
    return [
        keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        keras.metrics.SparseTopKCategoricalAccuracy(k=3, name="top3"),
    ]


def build_loss() -> keras.losses.Loss:
    """Cross-entropy of logits."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_data(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten clusters that a network can tell apart, but not easily."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, examples).astype("int32")
    centers = rng.normal(size=(10, 64))
    noise = 4 * rng.normal(size=(examples, 64))
    return (centers[labels] + noise).astype("float32"), labels
