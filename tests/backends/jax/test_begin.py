"""The next step is begun while callbacks look at a batch; it never shows."""

import jax
import keras
import numpy as np
import pytest
from keras import ops

import legato
from legato.backends.jax import loop


@pytest.fixture
def taken(monkeypatch):
    """Whether each step that was begun early was of use."""
    results = []
    take = loop.JaxLoop._take_begun

    def noted(self, *arguments):
        found = take(self, *arguments)
        results.append(found is not None)
        return found

    monkeypatch.setattr(loop.JaxLoop, "_take_begun", noted)
    return results


class Looks(keras.callbacks.Callback):
    """Changes nothing."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        weights = self.model.get_weights()
        steps = int(self.model.optimizer.iterations)
        self.seen.append((steps, logs, [w.tobytes() for w in weights]))


class Sets(Looks):
    """Sets something every few batches."""

    def __init__(self, what, every):
        super().__init__()
        self._what = what
        self._every = every

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if len(self.seen) % self._every:
            return
        match self._what:
            case "rate":
                self.model.optimizer.learning_rate = 0.02 / len(self.seen)
            case "weights":
                self.model.set_weights(
                    [0.9 * w for w in self.model.get_weights()]
                )
            case "frozen":
                layer = self.model.layers[0]
                layer.trainable = not layer.trainable
            case "stop":
                self.model.stop_training = True


def mean_squares(y, outputs):
    return ops.mean(ops.square(outputs - y))


def fit(run_dir, callback, loss=mean_squares):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.8), loss, metrics=["mae"]
    )
    x = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    legato.fit(
        model,
        x,
        x.sum(axis=1, keepdims=True),
        batch_size=8,
        epochs=5,
        validation_split=0.1,
        verbose=0,
        exact="off",
        callbacks=[callback],
        run_dir=run_dir,
    )
    return callback.seen, [weight.tobytes() for weight in model.get_weights()]


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("what", ["rate", "weights", "frozen", "stop"])
def test_what_callbacks_change_counts(
    what, every, tmp_path, taken, monkeypatch
):
    early = fit(tmp_path / "early", Sets(what, every))
    assert False in taken or what in ("frozen", "stop")
    assert len(taken) < 30 or every == 5
    monkeypatch.setattr(loop.JaxLoop, "begin", lambda *arguments: None)
    taken.clear()
    assert early == fit(tmp_path / "in_turn", Sets(what, every))
    assert not taken


def test_a_callback_that_looks_costs_no_step(tmp_path, taken, monkeypatch):
    early = fit(tmp_path / "early", Looks())
    assert len(taken) > 15 and all(taken)
    monkeypatch.setattr(loop.JaxLoop, "begin", lambda *arguments: None)
    assert early == fit(tmp_path / "in_turn", Looks())


def test_what_the_step_prints_is_printed_once(tmp_path, taken):
    printed = []

    def loss(y, outputs):
        jax.debug.callback(lambda: printed.append(1))
        return mean_squares(y, outputs)

    seen, _ = fit(tmp_path / "run", Looks(), loss)
    jax.effects_barrier()
    assert not taken
    assert len(printed) == len(seen) + 5  # one validation an epoch


def test_large_models_donate_their_memory(tmp_path, taken, monkeypatch):
    monkeypatch.setattr(loop, "_MAX_KEPT_BYTES", 100)
    fit(tmp_path / "run", Looks())
    assert not taken
