"""Signals in every phase of a run: it stops soon, and goes on exactly."""

import itertools
import signal
import threading
import time
import warnings
from pathlib import Path

import keras
import pytest

import legato
from legato import interrupts
from legato.checkpoint import load_checkpoint
from legato.errors import Interrupted
from legato.storage import FileSystem
from tests.contracts import runs
from tests.contracts.examples import Hangs
from tests.contracts.scenarios import Classifier
from tests.processes import ENOUGH, Forked
from tests.waiting import until

PHASES = ("compiling", "training", "validation", "saving")
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
STOPS_WITHIN_SECS = 2.0
WRITE_SECS = 1.0  # a checkpoint, at 50 ms for each fsync
LONG_SECS = 30.0  # a compilation


class Phase:
    """Tells another process what this one is doing, and lets it take its time.

    Args:
        path: of the file in which it is told; None tells no one.
        compile_secs: how long a compilation takes.
    """

    def __init__(self, path, compile_secs):
        self._path = path
        self._compile_secs = compile_secs
        self._compiles = True

    def compile(self):
        if self._compiles:
            self._compiles = False
            self.enter("compiling", self._compile_secs)

    def enter(self, name, secs):
        if self._path is not None:
            self._path.write_text(name)
            time.sleep(secs)


class Slow(Classifier):
    def __init__(self, phase):
        self._phase = phase

    def train_step(self, inputs, model, optimizer, metrics=None):
        self._phase.compile()
        return super().train_step(inputs, model, optimizer, metrics)


class Tell(keras.callbacks.Callback):
    def __init__(self, phase):
        super().__init__()
        self._phase = phase

    def on_train_batch_end(self, batch, logs=None):
        self._phase.enter("training", 0.01)

    def on_test_batch_begin(self, batch, logs=None):
        self._phase.enter("validation", 0.05)

    def get_state(self):
        return {}

    def set_state(self, state):
        del state


def train(run_dir, told, compile_secs=0.0):
    """A run in a process of its own."""
    phase = Phase(told, compile_secs)
    if told is not None:
        # Not the real one too: nobody cuts the power here, and others may be
        # writing.
        FileSystem.fsync = lambda self, fd: phase.enter("saving", 0.05)
    trainer = legato.Trainer(
        Slow(phase),
        run_dir=run_dir,
        config=legato.TrainerConfig(
            train_steps=90,
            validation_interval=4,
            checkpoint_interval=8,
            keep_last=None,
            progress="none",
        ),
        callbacks=[Tell(phase)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            history = trainer.train()
        except Interrupted:
            return 75  # as the command does
    Path(run_dir, "history.json").write_text(repr(history.history))
    return 0


def stop(run_dir, told, phase, name):
    """Begins, and sends a signal in a phase; how long it took to end."""
    told.write_text("")
    compile_secs = LONG_SECS if phase == "compiling" else 0.0
    process = Forked(train, run_dir, told, compile_secs, side="other")
    until(lambda: told.read_text() == phase or process.returncode is not None)
    assert process.returncode is None, process.communicate()
    process.send_signal(getattr(signal, name))
    began = time.monotonic()
    process.communicate()
    assert process.returncode == 75
    return time.monotonic() - began


def test_a_signal_in_any_phase(tmp_path):
    whole = Forked(train, tmp_path / "whole", None, side="one")
    run_dir = tmp_path / "run"
    together = list(itertools.product(SIGNALS, PHASES))
    if keras.config.backend() != ENOUGH:
        # The handler knows no backend: each signal, and each phase.
        together = list(zip(itertools.cycle(SIGNALS), PHASES, strict=False))
    for name, phase in together:
        secs = stop(run_dir, tmp_path / "told", phase, name)
        if phase == "compiling":
            assert secs < LONG_SECS / 3, name  # at once
        else:
            assert secs < STOPS_WITHIN_SECS + WRITE_SECS, (name, phase, secs)
            load_checkpoint(max((run_dir / "checkpoints").glob("step_*")))
    final = Forked(train, run_dir, None, side="other")
    for process in (whole, final):
        _, err = process.communicate()
        assert process.returncode == 0, err
    found, _ = runs.differences(tmp_path / "whole", run_dir, common_only=True)
    assert not found


class WaitsForData(Classifier):
    def __init__(self, told, kwargs, split):
        self._told = told
        self._kwargs = kwargs
        self._split = split

    def build_inputs(self, split):
        # The last but one batch of an epoch; examples come in their order.
        at = 33 if split == self._split else -1
        return legato.RandomAccessSource(
            Hangs(self._told, at), 4, shuffle=False, **self._kwargs
        )


def tell_when_data_are_waited_for(told):
    """Prints a line when training itself waits for the example.

    Its worker is some batches ahead: what it made before is trained on first.
    """

    def watch():
        seen = 0
        while seen < 20:
            time.sleep(0.01)
            hangs = told.read_text() == "hangs"
            seen = seen + 1 if hangs and interrupts._where_data_wait() else 0
        print("waits", flush=True)

    if told.exists():
        threading.Thread(target=watch, daemon=True).start()


def train_and_wait(run_dir, told, kwargs, split, hooks):
    # Nobody cuts the power here, and others may be writing.
    FileSystem.fsync = lambda self, fd: None
    tell_when_data_are_waited_for(told)

    class Nothing(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            pass

    trainer = legato.Trainer(
        WaitsForData(told, kwargs, split),
        run_dir=run_dir,
        config=legato.TrainerConfig(
            epochs=3, checkpoint_interval=7, keep_last=None, progress="none"
        ),
        callbacks=[Nothing()] if hooks else [],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = trainer.train()
    Path(run_dir, "history.json").write_text(repr(history.history))


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("kwargs", "split", "hooks"),
    [
        ({"workers": 2}, "train", False),
        ({"workers": 1, "processes": True}, "train", True),
        ({"workers": 1, "processes": True}, "validation", False),
    ],
)
def test_a_worker_that_hangs_holds_up_no_signal(tmp_path, kwargs, split, hooks):
    told = tmp_path / "told"
    whole = Forked(
        train_and_wait, tmp_path / "whole", told, kwargs, split, hooks,
        side="one",
    )  # fmt: skip
    _, err = whole.communicate()
    assert whole.returncode == 0, err
    run_dir = tmp_path / "run"
    told.write_text("")
    process = Forked(
        train_and_wait, run_dir, told, kwargs, split, hooks, side="other"
    )
    assert process.read_line() == "waits"
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, err = process.communicate()
    assert process.returncode == 75, err
    # Or it would be ended without a checkpoint, as what hears no signal is.
    assert time.monotonic() - began < 0.8 * interrupts.PATIENCE_SECS
    newest = max((run_dir / "checkpoints").glob("step_*"))
    assert newest.name == f"step_{8 if split == 'train' else 10:08d}"
    told.unlink()
    again = Forked(
        train_and_wait, run_dir, told, kwargs, split, hooks, side="other"
    )
    _, err = again.communicate()
    assert again.returncode == 0, err
    found, _ = runs.differences(tmp_path / "whole", run_dir, common_only=True)
    assert not found


class WaitsElsewhere(Classifier):
    """For data that come from code that hears no signal."""

    def __init__(self, told, kind):
        self._told = told
        self._kind = kind

    def build_inputs(self, split):
        if split == "validation":
            return None
        examples = Hangs(self._told, 33)
        if self._kind == "torch":
            import torch

            return torch.utils.data.DataLoader(
                examples, batch_size=4, num_workers=1
            )
        if self._kind == "tf.data":
            import tensorflow as tf

            def load(index):
                return tf.numpy_function(
                    lambda i: examples[int(i)], [index], (tf.float32, tf.int64)
                )

            def shaped(x, y):
                return tf.ensure_shape(x, [8]), tf.ensure_shape(y, [])

            data = tf.data.Dataset.range(40).map(load).map(shaped).batch(4)
            # TensorFlow reads ahead, as far as the machine has time for: the
            # batch that the trainer looks at when it is made, where signals
            # are not yet received, would wait for the one that never comes.
            as_written = tf.data.Options()
            as_written.experimental_optimization.apply_default_optimizations = (
                False
            )
            return data.with_options(as_written)
        return legato.RandomAccessSource(examples, 4, shuffle=False)


def train_and_wait_elsewhere(run_dir, told, kind):
    interrupts.PATIENCE_SECS = 1.0
    tell_when_data_are_waited_for(told)
    trainer = legato.Trainer(
        WaitsElsewhere(told, kind),
        run_dir=run_dir,
        config=legato.TrainerConfig(
            epochs=2, checkpoint_interval=3, keep_last=None, progress="none"
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = trainer.train()
    Path(run_dir, "history.json").write_text(repr(history.history))


@pytest.mark.any_backend
@pytest.mark.parametrize("kind", ["torch", "tf.data", "a thread of ours"])
def test_a_library_that_hangs_holds_up_no_signal_for_long(tmp_path, kind):
    told, run_dir = tmp_path / "told", tmp_path / "run"
    told.write_text("")
    process = Forked(train_and_wait_elsewhere, run_dir, told, kind, side="one")
    assert process.read_line() == "waits"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "SIGTERM while waiting for the data" in err
    assert "next_chunk" in err or "feed.py" in err
    told.unlink()
    for directory in (run_dir, tmp_path / "whole"):
        process = Forked(
            train_and_wait_elsewhere, directory, told, kind, side="one"
        )
        _, err = process.communicate()
        assert process.returncode == 0, err
    found, _ = runs.differences(tmp_path / "whole", run_dir, common_only=True)
    assert not found


def test_ctrl_c_that_the_process_ignores_stays_ignored(tmp_path):
    process = Forked(ignoring, tmp_path / "run", side="one")
    assert process.read_line() == "training"
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 0


def ignoring(run_dir):
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    class Say(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            print("training", flush=True)
            time.sleep(0.1)

    return train_plainly(run_dir, [Say()])


def train_plainly(run_dir, callbacks):
    legato.Trainer(
        Classifier(),
        run_dir=run_dir,
        config=legato.TrainerConfig(train_steps=10, progress="none"),
        callbacks=callbacks,
    ).train()
    return 0
