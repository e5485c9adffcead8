"""What measuring costs: metrics, host metrics and summaries, on and off.

    KERAS_BACKEND=torch python benchmarks/metrics.py [--rounds N] [--write]

Each variant is measured in turn with the same training without it, with
`legato.fit` and, beside it, with `keras.Model.fit`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import engine  # chooses the backend, and finds the model
import keras
import model
import numpy as np

import legato

CHEAP = {
    "jax": {"MLP": 0.04, "LSTM": 0.02, "transformer": 0.02},
    "tensorflow": {"MLP": 0.03, "LSTM": 0.03, "transformer": 0.03},
    "torch": {"MLP": 0.10, "LSTM": 0.10, "transformer": 0.10},
}
"""What three cheap metrics may add to a step, by backend and model."""

DEAR, NOW_AND_THEN = 0.20, 0.05
"""What costs more than the first at each step may cost the second, now and
then."""
WAITING = 0.15
SUMMARIES = 0.02

EPOCHS = 6
"""Of which the first compiles, and is not counted."""

MLP_STEPS = {"jax": 4096, "tensorflow": 2048, "torch": 512}
"""In an epoch: enough for what happens at its end not to count."""

LENGTH, FEATURES, CLASSES = 16, 32, 10


def mlp() -> tuple[keras.Model, tuple, int]:
    """The model, its data, the size of a batch."""
    return (
        model.build_model(),
        model.make_data(32 * MLP_STEPS[keras.config.backend()]),
        32,
    )


def lstm() -> tuple[keras.Model, tuple, int]:
    """The same, of sequences."""
    layers = keras.layers
    network = keras.Sequential(
        [
            keras.Input((LENGTH, FEATURES)),
            layers.LSTM(64),
            layers.Dense(CLASSES),
        ]
    )
    return network, sequences(), 32


def transformer() -> tuple[keras.Model, tuple, int]:
    """The same, with two blocks of attention."""
    layers = keras.layers
    inputs = keras.Input((LENGTH, FEATURES))
    x = layers.Dense(64)(inputs)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, 16, dropout=0.1)(y, y)
        y = layers.LayerNormalization()(x)
        x = x + layers.Dense(64)(layers.Dense(128, activation="gelu")(y))
    outputs = layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, outputs), sequences(), 32


def sequences() -> tuple[np.ndarray, np.ndarray]:
    """Random sequences and their classes, 256 batches of them."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(8192, LENGTH, FEATURES)).astype("float32")
    return features, rng.integers(0, CLASSES, 8192).astype("int32")


MODELS = {"MLP": mlp, "LSTM": lstm, "transformer": transformer}


def cheap() -> list[keras.metrics.Metric]:
    """Accuracy, top-3, cross-entropy."""
    metrics = keras.metrics
    return [
        metrics.SparseCategoricalAccuracy(name="accuracy"),
        metrics.SparseTopKCategoricalAccuracy(3, name="top_3"),
        metrics.SparseCategoricalCrossentropy(
            from_logits=True, name="cross_entropy"
        ),
    ]


class FirstClass(keras.metrics.AUC):
    """The area under the curve of the first class, with 200 thresholds."""

    def update_state(self, y_true, y_pred, sample_weight=None):  # noqa: D102
        labels = keras.ops.equal(keras.ops.reshape(y_true, (-1,)), 0)
        super().update_state(labels, keras.ops.softmax(y_pred)[:, 0])


class Timer(keras.callbacks.Callback):
    """When each epoch ended."""

    def on_train_begin(self, logs=None):  # noqa: D102
        self.ends: list[float] = []

    def on_epoch_end(self, epoch, logs=None):  # noqa: D102
        self.ends.append(time.perf_counter())


def seconds_per_epoch(timer: Timer) -> float:
    """The median, but for the first."""
    return statistics.median(np.diff(timer.ends).tolist())


class Classes(legato.Task):
    """One of the models, with metrics."""

    def __init__(self, make: Callable, metrics: Callable[[], list]) -> None:
        self._make = make
        self._metrics = metrics

    def build_model(self):  # noqa: D102
        return self._make()[0]

    def build_optimizer(self):  # noqa: D102
        return keras.optimizers.Adam(1e-3)

    def build_inputs(self, split):  # noqa: D102
        if split == "validation":
            return None
        return legato.ArraySource(self._make()[1], batch_size=32)

    def build_losses(self, labels, model_outputs, aux_losses=None):  # noqa: D102
        return model.build_loss()(labels, model_outputs)

    def build_metrics(self, training):  # noqa: D102
        return self._metrics()


def by_legato(
    make: Callable,
    metrics: Callable[[], list],
    every: int = 1,
    summary_interval: int = 0,
) -> Callable[[], float]:
    """Seconds of an epoch with legato; each metric every so many steps."""

    def measure() -> float:
        timer = Timer()
        with tempfile.TemporaryDirectory() as run_dir:
            legato.Trainer(
                Classes(make, metrics),
                run_dir=run_dir,
                config=legato.TrainerConfig(
                    epochs=EPOCHS,
                    train_metrics_interval=every,
                    # A summary reads results too, and is measured apart.
                    summary_interval=summary_interval,
                    checkpoint_interval=10**6,
                    progress="none",
                ),
                callbacks=[timer],
            ).train()
        return seconds_per_epoch(timer)

    return measure


def by_keras(make: Callable, metrics: Callable[[], Any]) -> Callable[[], float]:
    """Seconds of an epoch with `model.fit`."""

    def measure() -> float:
        network, (x, y), batch_size = make()
        network.compile(
            keras.optimizers.Adam(1e-3), model.build_loss(), metrics=metrics()
        )
        timer = Timer()
        network.fit(
            x, y, batch_size=batch_size, epochs=EPOCHS, verbose=0,
            callbacks=[timer],
        )  # fmt: skip
        return seconds_per_epoch(timer)

    return measure


def cost(times: engine.Times, dearer: str, base: str) -> tuple[float, str]:
    """The share that is added: the median of the rounds, and their range."""
    shares = sorted(
        a / b - 1 for a, b in zip(times[dearer], times[base], strict=True)
    )
    middle = statistics.median(shares)
    return middle, f"{middle:+.1%} ({shares[0]:+.1%} to {shares[-1]:+.1%})"


def judged(
    label: str, text: str, share: float, at_most: float | None
) -> engine.Row:
    """A row of the table."""
    if at_most is None:
        return label, text, "", ""
    met = "yes" if share <= at_most else "no"
    return label, text, f"{at_most:.0%} at most", met


def cheap_metrics(rounds: int) -> list[engine.Row]:
    """Three at each step, against none."""
    rows = []
    targets = CHEAP[keras.config.backend()]
    for name, make in MODELS.items():
        times = engine.in_turns(
            {
                "off": by_legato(make, list),
                "on": by_legato(make, cheap),
                "fit, off": by_keras(make, list),
                "fit, on": by_keras(make, cheap),
            },
            rounds,
        )
        share, text = cost(times, "on", "off")
        label = f"{name}, three cheap metrics at each step"
        rows.append(judged(label, text, share, targets[name]))
        share, text = cost(times, "fit, on", "fit, off")
        rows.append(judged(f"{label}, model.fit", text, share, None))
    return rows


def dear_metric(rounds: int) -> list[engine.Row]:
    """AUC at each step and now and then, against none."""

    def auc() -> list[keras.metrics.Metric]:
        return [FirstClass(200, name="auc")]

    times = engine.in_turns(
        {
            "off": by_legato(mlp, list),
            "always": by_legato(mlp, auc),
            "now and then": by_legato(mlp, auc, every=50),
            "fit, off": by_keras(mlp, list),
            "fit, on": by_keras(mlp, auc),
        },
        rounds,
    )
    always, text = cost(times, "always", "off")
    rows = [judged("MLP, AUC at each step", text, always, None)]
    share, text = cost(times, "now and then", "off")
    target = NOW_AND_THEN if always > DEAR else None
    rows.append(judged("MLP, AUC Every(50)", text, share, target))
    share, text = cost(times, "fit, on", "fit, off")
    rows.append(judged("MLP, AUC at each step, model.fit", text, share, None))
    return rows


class Sleeps(legato.HostMetric):
    """Waits at each batch, as for another machine."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def reset_state(self) -> None:  # noqa: D102
        pass

    def update_state(self, labels, outputs):  # noqa: D102
        time.sleep(self._seconds)

    def result(self):  # noqa: D102
        return {}


class Computes(Sleeps):
    """Works in Python for so long at each batch."""

    def update_state(self, labels, outputs):  # noqa: D102
        until = time.thread_time() + self._seconds
        while time.thread_time() < until:
            pass


def host_metrics(rounds: int) -> list[engine.Row]:
    """As slow as the forward pass, beside it."""
    layers = keras.layers
    network = keras.Sequential(
        [
            keras.Input((512,)),
            layers.Dense(2048, activation="relu"),
            layers.Dense(2048, activation="relu"),
            layers.Dense(CLASSES),
        ]
    )
    network.compile("sgd", model.build_loss())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 512)).astype("float32")
    y = rng.integers(0, CLASSES, len(x)).astype("int32")
    num_batches = -(-len(x) // 200)

    def validation(*metrics: legato.HostMetric) -> Callable[[], float]:
        def measure() -> float:
            seconds = []
            callback = keras.callbacks.LambdaCallback(
                on_test_begin=lambda logs: seconds.append(-time.perf_counter()),
                on_test_end=lambda logs: seconds.append(time.perf_counter()),
            )
            with tempfile.TemporaryDirectory() as run_dir:
                legato.fit(
                    network, x[:200], y[:200], batch_size=200, epochs=5,
                    verbose=0, validation_data=(x, y), run_dir=run_dir,
                    validation_metrics=list(metrics) or None, exact="off",
                    callbacks=[callback],
                )  # fmt: skip
            pairs = zip(seconds[2::2], seconds[3::2], strict=True)
            return statistics.median(begin + end for begin, end in pairs)

        return measure

    forward = validation()() / num_batches
    times = engine.in_turns(
        {
            "none": validation(),
            "sleeps": validation(Sleeps(forward)),
            "computes": validation(Computes(forward)),
        },
        rounds,
    )
    share, text = cost(times, "sleeps", "none")
    label = "validation, a host metric that waits as long as a forward pass"
    rows = [judged(f"{label} ({1e3 * forward:.1f} ms)", text, share, WAITING)]
    share, text = cost(times, "computes", "none")
    label = "validation, one that computes in Python for so long"
    rows.append(judged(label, text, share, None))
    return rows


def summaries(rounds: int) -> list[engine.Row]:
    """Every 10 steps, against none."""
    rows = []
    for name, make in MODELS.items():
        times = engine.in_turns(
            {
                "off": by_legato(make, cheap),
                "on": by_legato(make, cheap, summary_interval=10),
            },
            rounds,
        )
        share, text = cost(times, "on", "off")
        label = f"{name}, summaries every 10 steps"
        rows.append(judged(label, text, share, SUMMARIES))
    return rows


PARTS = {
    "cheap": cheap_metrics,
    "dear": dear_metric,
    "host": host_metrics,
    "summaries": summaries,
}


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--write", action="store_true", help="keep the table in results/"
    )
    arguments = parser.parse_args()
    rows = [
        row
        for name in arguments.parts or PARTS
        for row in PARTS[name](arguments.rounds)
    ]
    engine.report(
        "metrics",
        "what measuring adds to a step or a validation; MLP 64-64-10, LSTM of "
        "64 units, two blocks of attention; batch 32",
        rows,
        write=arguments.write,
    )


if __name__ == "__main__":
    main()
