"""`legato.fit` beside `keras.Model.fit`: steps per second, in turns.

    KERAS_BACKEND=torch python benchmarks/fit.py [--rounds N] [--write]

The MLP of `engine.py` and a small CNN, with and without a callback that acts
at each batch. Epochs are timed from the end of the first, which compiles.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import engine  # chooses the backend, and finds the model
import keras
import model
import numpy as np

import legato

TARGETS = {"jax": 4.0, "tensorflow": 4.0, "torch": 2.5}
"""How many times as fast on the MLP without batch hooks; 1 elsewhere."""


class Timer(keras.callbacks.Callback):
    """When each epoch ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_epoch_end(self, epoch, logs=None):  # noqa: D102
        self.ends.append(time.perf_counter())


class BatchHook(keras.callbacks.Callback):
    """Looks at the loss of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.highest = 0.0

    def on_train_batch_end(self, batch, logs=None):  # noqa: D102
        self.highest = max(self.highest, logs["loss"])


def mlp() -> tuple[keras.Model, tuple, int]:
    """The model, its data, the size of a batch."""
    return model.build_model(), model.make_data(32 * 1024), 32


def cnn() -> tuple[keras.Model, tuple, int]:
    """The same, of images."""
    layers = keras.layers
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4096, 28, 28, 1)).astype("float32")
    labels = rng.integers(0, 10, 4096).astype("int32")
    network = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dropout(0.2),
            layers.Dense(10),
        ]
    )
    return network, (images, labels), 64


def contestant(
    make: Callable, *, legatos: bool, hook: bool, epochs: int
) -> Callable[[], float]:
    """Measures steps per second of one way to train."""
    network, (x, y), batch_size = make()
    network.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=model.build_loss(),
        metrics=["accuracy"],
    )

    def measure() -> float:
        timer = Timer()
        callbacks = [timer, BatchHook()] if hook else [timer]
        arguments = {
            "batch_size": batch_size,
            "epochs": epochs,
            "verbose": 0,
            "callbacks": callbacks,
        }
        if legatos:
            with tempfile.TemporaryDirectory() as run_dir:
                legato.fit(network, x, y, run_dir=run_dir, **arguments)
        else:
            network.fit(x, y, **arguments)
        steps = (epochs - 1) * -(-len(x) // batch_size)
        return steps / (timer.ends[-1] - timer.ends[0])

    return measure


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--write", action="store_true", help="keep the table in results/"
    )
    arguments = parser.parse_args()
    backend = keras.config.backend()
    rows: list[engine.Row] = []
    for name, make in (("MLP", mlp), ("CNN", cnn)):
        for hook in (False, True):
            # 5 epochs of the MLP are as many steps as PyTorch compiles for.
            epochs = 5 if name == "MLP" and not hook else 3
            pair = {
                way: contestant(
                    make, legatos=way == "legato", hook=hook, epochs=epochs
                )
                for way in ("legato", "fit")
            }
            for measure in pair.values():
                measure()  # to warm up
            times = engine.in_turns(pair, arguments.rounds)
            value, text = engine.ratio(times, "legato", "fit")
            target = TARGETS[backend] if name == "MLP" and not hook else 1.0
            label = f"{name}, legato.fit / model.fit"
            if hook:
                label += ", with a batch hook"
            rows.append(engine.judged(label, text, value, at_least=target))
    engine.report(
        "fit",
        "legato.fit beside model.fit; MLP 64-64-10, batch 32; CNN of two "
        "convolutions, 28 x 28, batch 64; Adam, dropout, accuracy",
        rows,
        write=arguments.write,
    )


if __name__ == "__main__":
    main()
