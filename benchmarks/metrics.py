"""What measuring costs: metrics, host metrics and summaries, on and off.

    KERAS_BACKEND=torch python benchmarks/metrics.py [PART ...]
        [--models MODEL ...] [--rounds N] [--write]

Each variant is measured in turn with the same training without it, an epoch
each; with legato and, beside it, with `keras.Model.fit`. Of each there are
several, for where a process happens to put its memory makes one of them up to a
tenth slower than the next.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import engine  # chooses the backend, and finds the model
import keras
import model
import numpy as np
from greenlet import greenlet

import legato
from legato.session import Session

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

WARM = 2
"""Epochs that are not counted: the first compiles."""

COPIES = 3
"""Of each contestant."""

STEPS = {
    "jax": {"MLP": 2048, "LSTM": 256, "transformer": 128},
    "tensorflow": {"MLP": 1024, "LSTM": 128, "transformer": 128},
    "torch": {"MLP": 1024, "LSTM": 32, "transformer": 64},
}
"""In an epoch: a tenth of a second or more of them, for what happens at its
end not to count."""

LENGTH, FEATURES, CLASSES = 16, 32, 10


def mlp() -> tuple[keras.Model, tuple, int]:
    """The model, its data, the size of a batch."""
    return (
        model.build_model(),
        model.make_data(32 * STEPS[keras.config.backend()]["MLP"]),
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
    return network, sequences("LSTM"), 32


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
    return keras.Model(inputs, outputs), sequences("transformer"), 32


def sequences(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Random sequences and their classes, for an epoch of a model's steps."""
    rng = np.random.default_rng(0)
    count = 32 * STEPS[keras.config.backend()][name]
    features = rng.normal(size=(count, LENGTH, FEATURES)).astype("float32")
    return features, rng.integers(0, CLASSES, count).astype("int32")


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


def now() -> np.ndarray:
    """Seconds of the clock, and of this process on all CPUs."""
    return np.array([time.perf_counter(), time.process_time()])


class Turn(keras.callbacks.Callback):
    """Hands over to the next contestant after each epoch.

    Args:
        relay: of which it is part.
        times: where to put the seconds of each.
        only_validation: whether to time that alone.
    """

    def __init__(
        self, relay: "Relay", times: list[np.ndarray], only_validation: bool
    ) -> None:
        super().__init__()
        self._relay = relay
        self._times = times
        self._only_validation = only_validation
        self._began = self._tested = np.zeros(2)

    def on_train_begin(self, logs=None):  # noqa: D102
        self._began = now()

    def on_test_begin(self, logs=None):  # noqa: D102
        self._tested = self._tested - now()

    def on_test_end(self, logs=None):  # noqa: D102
        self._tested = self._tested + now()

    def on_epoch_end(self, epoch, logs=None):  # noqa: D102
        spent = now() - self._began
        if self._only_validation:
            spent, self._tested = self._tested, np.zeros(2)
        self._times.append(spent)
        self._relay.pass_on()
        self._began = now()


class Relay:
    """Contestants that train in turns, an epoch each, in one process.

    What else a busy machine does so falls upon all of them alike. (They are
    greenlets of one thread: see `speed/turns.py`.)

    Args:
        contestants: by name; each trains with the callback that it is given,
            for so many epochs.
        rounds: epochs of each that are counted.
        only_validation: whether validations alone are.

    Attributes:
        times: seconds of each one's epochs as `now` has them, copy by copy.
    """

    def __init__(
        self,
        contestants: dict[str, Callable[[Turn, int], None]],
        rounds: int,
        *,
        only_validation: bool = False,
    ) -> None:
        self.times: dict[str, list[list[np.ndarray]]] = {
            name: [[] for _ in range(COPIES)] for name in contestants
        }
        self._main = greenlet.getcurrent()
        runs = [
            greenlet(
                lambda train=train, times=self.times[name][copy]: train(
                    Turn(self, times, only_validation), rounds + WARM
                )
            )
            for copy in range(COPIES)
            for name, train in contestants.items()
        ]
        while runs := [run for run in runs if not run.dead]:
            for run in runs:
                run.switch()

    def pass_on(self) -> None:
        """Let the others go on, and wait until it is this one's turn."""
        self._main.switch()

    def cost(self, dearer: str, base: str) -> tuple[float, str]:
        """The share that is added: the median of the rounds, and quartiles.

        By the clock, and of the time on CPUs: what else runs on the machine
        takes from the first alone, and what is hidden behind the device counts
        in the second alone.
        """
        # [copies, rounds, clocks]
        above, below = (
            np.array(self.times[name])[:, WARM:] for name in (dearer, base)
        )
        shares = (above[:, None] / below[None] - 1).reshape(-1, 2)
        low, middle, high = np.quantile(shares, (0.25, 0.5, 0.75), axis=0)
        texts = [
            f"{middle[i]:+.1%} ({low[i]:+.1%} to {high[i]:+.1%})"
            for i in range(2)
        ]
        return float(middle[0]), f"{texts[0]}; CPU {texts[1]}"


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


class Noting(Session):
    """Notes how steps reached the device."""

    mode = ""

    def __exit__(self, *exc: object) -> None:
        Noting.mode = str(self.steps.mode)
        if self.steps._compilation == "replay" and Noting.mode == "eager":
            Noting.mode = "eager, replayed"
        super().__exit__(*exc)


class NotingTrainer(legato.Trainer):
    """A trainer with such sessions."""

    session_type = Noting


def by_legato(
    make: Callable,
    metrics: Callable[[], list],
    every: int = 1,
    summary_interval: int = 0,
) -> Callable[[Turn, int], None]:
    """Trains with legato; each metric every so many steps."""

    def train(turn: Turn, epochs: int) -> None:
        keras.utils.set_random_seed(0)
        with tempfile.TemporaryDirectory() as run_dir:
            NotingTrainer(
                Classes(make, metrics),
                run_dir=run_dir,
                config=legato.TrainerConfig(
                    epochs=epochs,
                    train_metrics_interval=every,
                    # A summary reads results too, and is measured apart.
                    summary_interval=summary_interval,
                    checkpoint_interval=10**6,
                    progress="none",
                    exact="off",
                ),
                callbacks=[turn],
            ).train()

    return train


def by_keras(
    make: Callable, metrics: Callable[[], Any]
) -> Callable[[Turn, int], None]:
    """Trains with `model.fit`."""

    def train(turn: Turn, epochs: int) -> None:
        network, (x, y), batch_size = make()
        network.compile(
            keras.optimizers.Adam(1e-3), model.build_loss(), metrics=metrics()
        )
        network.fit(
            x, y, batch_size=batch_size, epochs=epochs, verbose=0,
            callbacks=[turn],
        )  # fmt: skip

    return train


def judged(
    label: str, text: str, share: float, at_most: float | None
) -> engine.Row:
    """A row of the table."""
    if at_most is None:
        return label, text, "", ""
    met = "yes" if share <= at_most else "no"
    return label, text, f"{at_most:.0%} at most", met


def cheap_metrics(rounds: int, models: Sequence[str]) -> list[engine.Row]:
    """Three at each step, against none."""
    rows = []
    targets = CHEAP[keras.config.backend()]
    for name in models:
        make = MODELS[name]
        relay = Relay(
            {
                "off": by_legato(make, list),
                "on": by_legato(make, cheap),
                "fit, off": by_keras(make, list),
                "fit, on": by_keras(make, cheap),
            },
            rounds,
        )
        share, text = relay.cost("on", "off")
        label = f"{name}, three cheap metrics at each step"
        noted = f"{label} ({Noting.mode})"
        rows.append(judged(noted, text, share, targets[name]))
        share, text = relay.cost("fit, on", "fit, off")
        rows.append(judged(f"{label}, model.fit", text, share, None))
    return rows


def dear_metric(rounds: int, models: Sequence[str]) -> list[engine.Row]:
    """AUC at each step and now and then, against none."""
    del models  # the smallest shows most

    def auc() -> list[keras.metrics.Metric]:
        return [FirstClass(200, name="auc")]

    relay = Relay(
        {
            "off": by_legato(mlp, list),
            "always": by_legato(mlp, auc),
            "now and then": by_legato(mlp, auc, every=50),
            "fit, off": by_keras(mlp, list),
            "fit, on": by_keras(mlp, auc),
        },
        rounds,
    )
    always, text = relay.cost("always", "off")
    label = f"MLP, AUC at each step ({Noting.mode})"
    rows = [judged(label, text, always, None)]
    share, text = relay.cost("now and then", "off")
    target = NOW_AND_THEN if always > DEAR else None
    label = f"MLP, AUC Every(50) ({Noting.mode})"
    rows.append(judged(label, text, share, target))
    share, text = relay.cost("fit, on", "fit, off")
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


def host_metrics(rounds: int, models: Sequence[str]) -> list[engine.Row]:
    """As slow as the forward pass, beside it."""
    del models
    layers = keras.layers
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12_000, 512)).astype("float32")
    y = rng.integers(0, CLASSES, len(x)).astype("int32")
    num_batches = -(-len(x) // 200)

    def validation(metrics: Sequence[legato.HostMetric]) -> Callable:
        def train(turn: Turn, epochs: int) -> None:
            network = keras.Sequential(
                [
                    keras.Input((512,)),
                    layers.Dense(2048, activation="relu"),
                    layers.Dense(2048, activation="relu"),
                    layers.Dense(CLASSES),
                ]
            )
            network.compile("sgd", model.build_loss())
            with tempfile.TemporaryDirectory() as run_dir:
                legato.fit(
                    network, x[:200], y[:200], batch_size=200, epochs=epochs,
                    verbose=0, validation_data=(x, y), run_dir=run_dir,
                    validation_metrics=list(metrics) or None, exact="off",
                    callbacks=[turn],
                )  # fmt: skip

        return train

    first = Relay({"none": validation([])}, 2, only_validation=True)
    seconds = np.array(first.times["none"])[:, WARM:, 0]
    forward = seconds.min() / num_batches
    relay = Relay(
        {
            "none": validation([]),
            "sleeps": validation([Sleeps(forward)]),
            "computes": validation([Computes(forward)]),
        },
        rounds,
        only_validation=True,
    )
    print(f"a forward pass: {1e3 * forward:.1f} ms")
    share, text = relay.cost("sleeps", "none")
    label = "validation, a host metric that waits as long as a forward pass"
    rows = [judged(label, text, share, WAITING)]
    share, text = relay.cost("computes", "none")
    label = "validation, one that computes in Python for so long"
    rows.append(judged(label, text, share, None))
    return rows


def summaries(rounds: int, models: Sequence[str]) -> list[engine.Row]:
    """Every 10 steps, against none."""
    rows = []
    for name in models:
        make = MODELS[name]
        relay = Relay(
            {
                "off": by_legato(make, cheap),
                "on": by_legato(make, cheap, summary_interval=10),
            },
            rounds,
        )
        share, text = relay.cost("on", "off")
        label = f"{name}, summaries every 10 steps ({Noting.mode})"
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
    parser.add_argument("--models", nargs="*", choices=MODELS, default=[])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--write",
        action="store_true",
        help="keep the table in results/, with what is there already",
    )
    arguments = parser.parse_args()
    rows = [
        row
        for name in arguments.parts or PARTS
        for row in PARTS[name](arguments.rounds, arguments.models or [*MODELS])
    ]
    engine.report(
        "metrics",
        "what measuring adds to a step or a validation; MLP 64-64-10, LSTM of "
        "64 units, two blocks of attention; batch 32",
        rows,
        write=arguments.write,
        spread=f"quartiles of the ratios of {COPIES} copies' rounds",
    )


if __name__ == "__main__":
    # Not in the main thread: all that train would take the signals there.
    ThreadPoolExecutor(1).submit(main).result()
