"""Steps are begun and run ahead of callbacks at batches; it never shows."""

import copy
import math
import threading

import jax
import keras
import numpy as np
import pytest
from keras import ops

import legato
from legato.backends.jax import ahead, loop


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
    monkeypatch.setattr(loop.JaxLoop, "_can_run_ahead", lambda self: False)
    return results


@pytest.fixture
def calls(monkeypatch):
    """How many steps each call took that ran some ahead."""
    sizes = []
    launch = ahead.Ahead._launch

    def noted(self, stretch):
        sizes.append(stretch.size)
        return launch(self, stretch)

    monkeypatch.setattr(ahead.Ahead, "_launch", noted)
    # Whatever the machine is busy with.
    monkeypatch.setattr(ahead, "_MAX_SECONDS", 1e9)
    return sizes


def one_by_one(monkeypatch):
    monkeypatch.setattr(loop.JaxLoop, "_can_run_ahead", lambda self: False)
    monkeypatch.setattr(loop.JaxLoop, "begin", lambda *arguments: None)


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


def fit(run_dir, callback, loss=mean_squares, batch_size=8, **arguments):
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
        batch_size=batch_size,
        epochs=5,
        validation_split=0.1,
        verbose=0,
        exact="off",
        callbacks=[callback],
        run_dir=run_dir,
        **arguments,
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


def test_a_callback_that_looks_has_nothing_else_compiled(
    tmp_path, calls, caplog
):
    # What was run to give it a value was another program once: compiled
    # during the run, and with other bits where XLA optimises little.
    with jax.log_compiles(), caplog.at_level("WARNING"):
        fit(tmp_path, Looks())
    assert calls
    compiled = [
        record.getMessage()
        for record in caplog.records
        if "XLA compilation of jit(loop)" in record.getMessage()
    ]
    # For whole and for partial batches, and for validation.
    assert len(compiled) == 3, compiled


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


class AtTimes(keras.callbacks.Callback):
    """Does something after every few batches, and else looks at logs only."""

    def __init__(self, act, every):
        super().__init__()
        self._act = act
        self._every = every

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(logs)
        if len(self.seen) % self._every == 0:
            self.seen.append(self._act(self.model))


def look(model):
    weights = [weight.tobytes() for weight in model.get_weights()]
    metrics = [float(v.value) for v in model.metrics_variables]
    return int(model.optimizer.iterations), weights, metrics


def set_rate(model):
    rate = float(model.optimizer.learning_rate)
    model.optimizer.learning_rate = 0.9 * rate


def set_weights(model):
    model.set_weights([0.9 * w for w in model.get_weights()])


def set_one(model):
    model.layers[0].bias.assign([0.0] * 8)


def reset_metrics(model):
    model.reset_metrics()


def freeze(model):
    model.layers[0].trainable = not model.layers[0].trainable


def stop(model):
    model.stop_training = True


def predict(model):
    return model.predict(np.ones((3, 4)), verbose=0).tobytes()


def trace(model):
    kernel = model.layers[0].kernel
    return np.asarray(jax.jit(lambda: kernel.value * 2)()).tobytes()


def look_without_jit(model):
    with jax.disable_jit():
        return look(model)


def copy_one(model):
    return np.asarray(copy.deepcopy(model.layers[0].kernel).value).tobytes()


def ask_elsewhere(model):
    found = []
    asker = threading.Thread(target=lambda: found.append(look(model)))
    asker.start()
    asker.join()
    return found


@pytest.mark.parametrize(
    "act",
    [
        look,
        set_rate,
        set_weights,
        set_one,
        reset_metrics,
        freeze,
        stop,
        predict,
        trace,
        look_without_jit,
        copy_one,
        ask_elsewhere,
    ],
)
def test_steps_run_ahead_do_not_show(act, tmp_path, calls, monkeypatch):
    # (13: some of the steps that were run ahead are of use, and some not.)
    often = (1, 13) if act is not freeze else (13, 27)  # it is traced anew
    fitted = [
        fit(tmp_path / f"ahead{every}", AtTimes(act, every), batch_size=2)
        for every in often
    ]
    assert calls
    one_by_one(monkeypatch)
    calls.clear()
    for every, expected in zip(often, fitted, strict=True):
        alone = fit(
            tmp_path / f"alone{every}", AtTimes(act, every), batch_size=2
        )
        assert alone == expected
    assert not calls


def test_callbacks_that_look_at_logs_need_few_calls(tmp_path, calls):
    seen, _ = fit(tmp_path / "run", AtTimes(look, 1000), batch_size=2)
    assert len(seen) == 5 * 27
    assert len(calls) < 20 and sum(calls) < len(seen)


def test_after_something_was_set_they_run_ahead_again(
    tmp_path, calls, monkeypatch
):
    alone = []
    call = loop.JaxLoop.__call__

    def noted(self, step, num_steps, operands):
        alone.append(step)
        return call(self, step, num_steps, operands)

    monkeypatch.setattr(loop.JaxLoop, "__call__", noted)
    # 5 epochs of 27 steps: set in the midst of two.
    fit(tmp_path / "run", AtTimes(set_rate, 60), batch_size=2)
    assert calls
    assert len(alone) < 20, alone


def test_callbacks_that_set_something_waste_little(tmp_path, calls):
    seen, _ = fit(tmp_path / "run", AtTimes(set_rate, 1), batch_size=2)
    # (Each time also those that would have come next.)
    assert len(seen) == 2 * 5 * 27
    # An attempt after 2, 4, 8 ... steps: two calls each.
    assert len(calls) <= 2 * math.log2(len(seen))


class Fails(AtTimes):
    """In the midst of the steps that were run ahead."""

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if len(self.seen) == 40:
            raise RuntimeError("in the midst")


@pytest.mark.parametrize("interval", [1, 17, "epoch"])
def test_a_run_that_fails_among_them_goes_on_exactly(interval, tmp_path, calls):
    arguments = {"batch_size": 2, "checkpoint_interval": interval}
    straight = fit(tmp_path / "straight", AtTimes(look, 1000), **arguments)
    with pytest.raises(RuntimeError, match="in the midst"):
        fit(tmp_path / "broken", Fails(look, 1000), **arguments)
    assert sum(calls) > 40
    seen, weights = fit(tmp_path / "broken", AtTimes(look, 1000), **arguments)
    assert weights == straight[1]
    assert seen == straight[0][-len(seen) :]


def test_a_failure_leaves_the_values_of_its_step(tmp_path, calls, monkeypatch):
    def weights_at_failure(run_dir):
        callback = Fails(look, 1000)
        with pytest.raises(RuntimeError):
            fit(run_dir, callback, batch_size=2)
        return look(callback.model)

    found = weights_at_failure(tmp_path / "ahead")
    assert calls
    one_by_one(monkeypatch)
    assert found == weights_at_failure(tmp_path / "alone")
    assert found[0] == 40


def test_a_variable_has_no_other_attributes():
    fit_variable = keras.Variable(1.0)
    ahead.keras_values.let_wait([fit_variable], None)
    ahead.keras_values.set_waiting([fit_variable], [jax.numpy.ones(())])
    assert float(fit_variable.value) == 1
    assert not hasattr(fit_variable, "anything")
    with pytest.raises(AttributeError, match="'anything'"):
        _ = fit_variable.anything
