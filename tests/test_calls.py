"""User code makes batches in the thread that trains, while the device works."""

import threading

import keras
import numpy as np
import pytest

import legato
from legato.calls import Calls
from legato.data import Feed
from legato.evaluation import Evaluator
from legato.training import TrainSteps
from tests.linear import Linear

BACKEND = keras.config.backend()
OVERLAPS = BACKEND != "torch"  # where a step may be Python itself


class Examples:
    """Writes down when they are made, and where."""

    def __init__(self, events):
        self._events = events

    def __len__(self):
        return 24

    def __getitem__(self, index):
        assert threading.current_thread() is threading.main_thread()
        self._events.append("draw")
        return np.full(2, index / 24, "float32"), np.zeros(1, "float32")


class Slopes(Linear):
    def __init__(self, events, split):
        self.source = legato.RandomAccessSource(Examples(events), 2)
        self._split = split

    def build_inputs(self, split):
        if split == self._split:
            return self.source
        if split == "validation":
            return None
        x = np.zeros((8, 2), "float32")
        return legato.ArraySource((x, x[:, :1]), 2)

    def build_losses(self, labels, outputs, aux_losses=None):
        return keras.ops.mean((labels - outputs) ** 2)

    def build_metrics(self, training):
        return []


@pytest.fixture
def events(monkeypatch):
    """What becomes of calls, of a step each, in its order."""
    found = []
    begin, result = Calls.begin, Calls.result

    def begun(self, loop, step, chunk):
        def call(*args):
            in_main = threading.current_thread() is threading.main_thread()
            assert in_main != self.in_thread
            return loop(*args)

        call.runs_python = loop.runs_python
        # (What needs no making here leaves nothing to do meanwhile.)
        draws = "draw" in found
        assert self.in_thread == (draws and BACKEND == "tensorflow")
        found.append("begin")
        return begin(self, call, step, chunk)

    def done(self, begun):
        found.append("wait")
        return result(self, begun)

    monkeypatch.setattr(Calls, "begin", begun)
    monkeypatch.setattr(Calls, "result", done)
    for limit in ("_ALTERNATING_SECS", "_CALL_SECS"):
        monkeypatch.setattr(f"legato.pace.{limit}", 0.0)
    return found


def of_batches(events):
    """The events, with one of making a batch in the place of two examples."""
    return " ".join(events).replace("draw draw", "draw")


def train(task, run_dir, epochs=2):
    config = legato.TrainerConfig(
        epochs=epochs, progress="none", summary_interval=0
    )
    legato.Trainer(task, run_dir=run_dir, config=config).train()


def test_training(events, tmp_path):
    task = Slopes(events, "train")
    events.clear()
    train(task, tmp_path / "run")
    # Not the first call, which compiles, and not what follows an epoch's end.
    epoch = "draw" + " begin draw wait" * 11 + " begin wait"
    if not OVERLAPS:
        epoch = " ".join(["draw begin wait"] * 12)
    assert of_batches(events).endswith(epoch)


def test_validation(events, tmp_path):
    task = Slopes(events, "validation")
    events.clear()
    train(task, tmp_path / "run", epochs=1)
    order = "draw begin" + " draw begin wait" * 11 + " wait"
    assert of_batches(events).endswith(order)


def test_a_call_that_is_interrupted_is_not_of_the_step_before(
    tmp_path, monkeypatch
):
    result = Calls.result

    def interrupted(self, begun):
        if len(told) == 3:
            raise KeyboardInterrupt
        told.append(0)
        return result(self, begun)

    told = []
    monkeypatch.setattr(Calls, "result", interrupted)
    monkeypatch.setattr("legato.pace._ALTERNATING_SECS", 0.0)
    monkeypatch.setattr("legato.pace._CALL_SECS", 0.0)
    trainer = legato.Trainer(
        Slopes([], "train"),
        run_dir=tmp_path / "run",
        config=legato.TrainerConfig(epochs=2, progress="none"),
    )
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert "variables hold step 4." in "".join(caught.value.__notes__)
    model = trainer.model.get_weights()
    monkeypatch.undo()
    whole = legato.Trainer(
        Slopes([], "train"),
        run_dir=tmp_path / "whole",
        config=legato.TrainerConfig(train_steps=4, progress="none"),
    )
    whole.train()
    for mine, its in zip(model, whole.model.get_weights(), strict=True):
        assert mine.tobytes() == its.tobytes()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="where calls have a thread")
def test_a_step_that_runs_python_has_no_thread(tmp_path, monkeypatch):
    import tensorflow as tf

    from legato.backends.tensorflow.loop import TensorFlowLoop

    class Python(Slopes):
        def build_losses(self, labels, outputs, aux_losses=None):
            loss = super().build_losses(labels, outputs)
            drawn = tf.numpy_function(np.random.random, [], tf.float64)
            return loss + 0 * keras.ops.cast(tf.reshape(drawn, ()), "float32")

    call = TensorFlowLoop.__call__

    def called(self, *args):
        assert threading.current_thread() is threading.main_thread()
        return call(self, *args)

    monkeypatch.setattr(TensorFlowLoop, "__call__", called)
    monkeypatch.setattr("legato.pace._ALTERNATING_SECS", 0.0)
    train(Python([], "train"), tmp_path / "run", epochs=1)


def test_a_validation_that_nobody_wants_takes_one_batch(tmp_path):
    class Skips(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            self.model.stop_evaluating = True

    results = []
    for epochs in (1, 3):
        trainer = legato.Trainer(
            Slopes([], "validation"),
            run_dir=tmp_path / f"run{epochs}",
            config=legato.TrainerConfig(epochs=epochs, progress="none"),
            callbacks=[Skips()],
        )
        history = trainer.train().history
        results.append(history["val_loss"])
    # (The weights are trained on zeros, and do not change.)
    assert results[1] == results[0] * 3


@pytest.mark.parametrize("split", ["train", "validation"])
def test_workers_are_asked_before_a_call_that_blocks(
    split, tmp_path, monkeypatch
):
    order = []
    prefetch, run = Feed.prefetch, TrainSteps.run
    begin = Evaluator._begin

    def prefetched(self, max_batches, **arguments):
        before = self._ahead
        prefetch(self, max_batches, **arguments)
        if self._ahead is not before:
            order.append("prefetch")

    def called(self, step, chunk):
        order.append("run")
        return run(self, step, chunk)

    def begun(self, *arguments):
        order.append("run")
        return begin(self, *arguments)

    monkeypatch.setattr(Feed, "prefetch", prefetched)
    monkeypatch.setattr(Evaluator, "_begin", begun)
    monkeypatch.setattr(TrainSteps, "run", called)
    x = np.zeros((400, 2), "float32")
    task = Slopes([], split)
    task.source = legato.RandomAccessSource((x, x[:, :1]), 2, workers=1)
    train(task, tmp_path / "run", epochs=1)
    text = " ".join(order)
    if BACKEND == "jax" and split == "train":
        assert "run prefetch run prefetch" in text
    else:
        assert "prefetch run prefetch run" in text
