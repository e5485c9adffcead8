"""Bad input: an error that names what, why and the remedy; nothing is lost."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import legato
from legato.data import DataIterator
from legato.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ExactnessError,
    ExactnessWarning,
    Interrupted,
    LegatoWarning,
    NonFiniteLossError,
    RestoreError,
    RunDirError,
    StepError,
)
from tests.contracts.scenarios import Classifier, classes_data


class Plain(Classifier):
    """What the tests break, a thing at a time."""

    units = 4
    rate = 0.1
    optimizer_class = keras.optimizers.SGD

    def build_model(self):
        return keras.Sequential(
            [layers.Input((8,)), layers.Dense(self.units), layers.Dense(3)]
        )

    def build_optimizer(self):
        return self.optimizer_class(self.rate)

    def build_inputs(self, split):
        return None if split == "validation" else super().build_inputs(split)

    def build_metrics(self, training):
        return []


def make(task, run_dir, callbacks=(), **config):
    return legato.Trainer(
        task,
        run_dir=run_dir,
        config=legato.TrainerConfig(
            **{
                "train_steps": 6,
                "checkpoint_interval": 2,
                "summary_interval": 0,
                "progress": "none",
                **config,
            }
        ),
        callbacks=callbacks,
    )


def train(task, run_dir, callbacks=(), **config):
    trainer = make(task, run_dir, callbacks, **config)
    trainer.train()
    return trainer


def weights(trainer):
    return [
        np.asarray(ops.convert_to_numpy(v)).tobytes()
        for v in trainer.model.variables
    ]


def contents(run_dir):
    """Every file and its bytes, but for who held the lock."""
    return {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in Path(run_dir).rglob("*")
        if path.is_file() and path.name != "lock"
    }


def newest(run_dir):
    steps = sorted(Path(run_dir, "checkpoints").glob("step_*"))
    return int(steps[-1].name.removeprefix("step_")) if steps else None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 6 steps, not to be written to."""
    run_dir = tmp_path_factory.mktemp("finished")
    train(Plain(), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """The weights after 8 steps without any trouble."""
    return weights(
        train(Plain(), tmp_path_factory.mktemp("longer"), train_steps=8)
    )


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


# -- configuration -----------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"checkpoint_interval": 0},
            ["checkpoint_interval", "0", "at least 1"],
        ),
        ({"train_steps": -5}, ["train_steps", "-5", "at least 1"]),
        ({"train_steps": 0}, ["train_steps", "0", "at least 1"]),
        ({"epochs": -1}, ["epochs", "-1", "at least 1"]),
        ({"validation_interval": -2}, ["validation_interval", "-2", "None"]),
        ({"summary_interval": -1}, ["summary_interval", "-1", "0 for none"]),
        ({"seed": -1}, ["seed", "-1", "at least 0"]),
        ({"chekpoint_interval": 5}, ["chekpoint_interval", "checkpoint_int"]),
        ({"resume": "perhaps"}, ["resume", "perhaps", "auto", "never"]),
        ({"train_steps": 5, "epochs": 2}, ["train_steps=5", "epochs=2", "one"]),
    ],
)
def test_config(config, words):
    with pytest.raises(ConfigError) as caught:
        legato.TrainerConfig(**config)
    for word in words:
        assert word in str(caught.value)


def test_a_run_without_an_end(tmp_path):
    with pytest.raises(ConfigError, match=r"train_steps or epochs"):
        train(Plain(), tmp_path / "run", train_steps=None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "value", "words"),
    [
        ("build_model", 3, r"build_model returned 3.*keras\.Model"),
        ("build_model", {}, r"build_model returned \{\}.*keras\.Model"),
        ("build_optimizer", "adam", r"build_optimizer returned 'adam'.*keras"),
        ("build_metrics", ["auc"], r"build_metrics.*'auc'.*Metric"),
    ],
)
def test_a_task_that_builds_something_else(method, value, words, tmp_path):
    task = type("Odd", (Plain,), {method: lambda self, *a, **k: value})
    with pytest.raises(ConfigError, match=words):
        make(task(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_task_and_no_config(tmp_path):
    with pytest.raises(ConfigError, match=r"task=.*Plain.*object"):
        legato.Trainer(Plain, run_dir=tmp_path, config=legato.TrainerConfig())
    with pytest.raises(ConfigError, match=r"config=.*TrainerConfig"):
        legato.Trainer(Plain(), run_dir=tmp_path, config={"train_steps": 3})
    with pytest.raises(ConfigError, match=r"run_dir='gs://a/b'.*local"):
        make(Plain(), "gs://a/b")


# -- data --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "batch_size", "words"),
    [
        ((np.ones((5, 2)), np.ones(4)), 2, r"0: 5, 1: 4.*one row"),
        ({"a": np.ones((0, 2))}, 2, r"empty: 0 examples.*at least one"),
        ((), 2, r"no array"),
        (np.ones((4, 2)), 0, r"batch_size=0.*at least 1"),
        (np.ones((4, 2)), 2.5, r"batch_size=2\.5.*int"),
        (np.array(["a", "b"]), 1, r"dtype.*U1.*numbers"),
        ((np.ones(3), 7), 1, r"scalar 7.*\[examples"),
    ],
)
def test_data(arrays, batch_size, words):
    with pytest.raises(DataError, match=f"(?s){words}"):
        legato.ArraySource(arrays, batch_size)


def test_a_batch_larger_than_the_data_without_remainder():
    with pytest.raises(DataError, match=r"batch_size=9.*4 examples.*smaller"):
        legato.ArraySource(np.ones((4, 2)), 9, drop_remainder=True)


class OtherData(Plain):
    def build_inputs(self, split):
        features, labels = classes_data("train")
        features[0, 0] += 1
        return (
            None
            if split == "validation"
            else legato.ArraySource((features, labels), batch_size=32)
        )


OtherData.__name__ = OtherData.__qualname__ = "Plain"


def test_changed_data_on_resume(run_dir, longer):
    before = contents(run_dir)
    with pytest.raises(RestoreError, match=r"data\.rows_sha256"):
        train(OtherData(), run_dir, train_steps=8)
    assert contents(run_dir) == before
    assert weights(train(Plain(), run_dir, train_steps=8)) == longer


# -- steps -------------------------------------------------------------------


class WithStep(Plain):
    """A task whose loss or logs are made by a function."""

    def __init__(self, loss=None, logs=None):
        self.make_loss = loss
        self.make_logs = logs

    def train_step(self, inputs, model, optimizer, metrics=None):
        features, labels = inputs

        def forward():
            outputs = model(features, training=True)
            if self.make_loss is not None:
                return self.make_loss(outputs)
            return self.build_losses(labels, outputs)

        loss, gradients = legato.value_and_grad(
            forward, model.trainable_variables, optimizer
        )
        optimizer.apply(gradients, model.trainable_variables)
        if self.make_logs is not None:
            return self.make_logs(loss)
        return {self.loss: loss}


@pytest.mark.parametrize(
    ("logs", "words"),
    [
        (lambda loss: {"lss": loss}, r"no loss.*'lss'.*'loss'.*self\.loss"),
        (lambda loss: {}, r"no loss.*'loss'"),
        (lambda loss: None, r"NoneType.*dict of scalars"),
        (lambda loss: loss, r"dict of scalars"),
        (
            lambda loss: {"loss": loss, "all": ops.ones((3,))},
            r"'all' of shape \(3,\).*scalars",
        ),
    ],
)
def test_logs_of_a_step(logs, words, tmp_path):
    with pytest.raises(StepError, match=f"WithStep.train_step.*{words}"):
        train(WithStep(logs=logs), tmp_path)
    assert newest(tmp_path) is None


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda outputs: ops.mean(outputs, axis=1), r"shape \(32,\).*scalar"),
        (lambda outputs: None, r"None as the loss.*scalar"),
        (lambda outputs: ops.sum(ops.cast(outputs, "int32")), r"int32.*float"),
        (lambda outputs: ops.ones(()), r"none of the 4 variables.*None"),
        (
            lambda outputs: ops.stop_gradient(ops.sum(outputs)),
            r"none of the 4 variables.*None",
        ),
    ],
)
def test_losses_of_a_step(loss, words, tmp_path):
    with pytest.raises(StepError, match=words):
        train(WithStep(loss=loss), tmp_path)
    assert newest(tmp_path) is None


def test_unseeded_randomness(tmp_path):
    def noisy(outputs):
        return ops.mean(outputs) + keras.random.normal(())

    with pytest.raises(StepError, match=r"seed=None.*SeedGenerator"):
        train(WithStep(loss=noisy), tmp_path)


def test_a_new_variable_in_every_step(tmp_path):
    def new_layer(outputs):
        return ops.mean(layers.Dense(1, name="fresh")(outputs))

    with pytest.raises(StepError, match=r"new variables.*fresh.*build_model"):
        train(WithStep(loss=new_layer), tmp_path)


def test_a_new_variable_with_a_value(tmp_path):
    def new_variable(outputs):
        return ops.mean(outputs) * keras.Variable(1.0, name="fresh")

    # Keras's own error says it all.
    with pytest.raises(ValueError, match=r"variable while in a stateless"):
        train(WithStep(loss=new_variable), tmp_path)


def test_an_assignment_in_a_while_loop(tmp_path):
    count = keras.Variable(0.0)

    def loop(outputs):
        def body(i):
            count.assign_add(1.0)
            return (i + 1,)

        ops.while_loop(lambda i: i < 3, body, (0,))
        return ops.mean(outputs) * count

    if keras.config.backend() == "jax":
        with pytest.raises(StepError, match=r"while_loop.*outside"):
            train(WithStep(loss=loop), tmp_path)
    else:  # whose loops can carry it out
        train(WithStep(loss=loop), tmp_path, train_steps=4)
        assert float(count.value) == 4 * 3


class Factor(Plain):
    def __init__(self):
        self.factor = 2.0

    def build_losses(self, labels, model_outputs, aux_losses=None):
        return self.factor * super().build_losses(labels, model_outputs)


def test_an_attribute_that_changes_after_tracing(tmp_path):
    task = Factor()

    def change(epoch, logs):
        task.factor = 3.0

    # Not its code: the callback's closure holds the task.
    callback = keras.callbacks.LambdaCallback(on_epoch_end=change)
    with pytest.raises(
        StepError, match=r"Factor\.factor was 2\.0.*3\.0.*keras\.Variable"
    ):
        train(task, tmp_path, [callback], train_steps=12, exact="off")
    assert newest(tmp_path) == 4
    again = train(Factor(), tmp_path, train_steps=12, exact="off")
    assert weights(again) == weights(
        train(Factor(), tmp_path / "whole", train_steps=12)
    )


# -- a loss that is not finite -----------------------------------------------


class Breaks(Plain):
    """The fourth batch holds a NaN."""

    def build_inputs(self, split):
        features, labels = classes_data("train")
        features[3 * 32 + 5, 2] = np.nan
        return (
            None
            if split == "validation"
            else legato.ArraySource(
                (features, labels), batch_size=32, shuffle=False
            )
        )


@pytest.mark.parametrize(("every", "saved"), [(1, 3), (3, 3), (100, None)])
def test_a_loss_that_becomes_nan(every, saved, tmp_path):
    with pytest.raises(
        NonFiniteLossError, match=r"nan at step 4.*learning rate.*nonfinite"
    ) as caught:
        train(Breaks(), tmp_path, checkpoint_interval=every)
    assert caught.value.step == 4
    assert newest(tmp_path) == saved


def test_a_run_that_met_nan_is_resumed_before_it(tmp_path):
    for _ in range(2):
        with pytest.raises(NonFiniteLossError, match="at step 4"):
            train(Breaks(), tmp_path, checkpoint_interval=2)
        assert newest(tmp_path) == 2
    with pytest.warns(LegatoWarning, match=r"nan at step 4.*goes on"):
        trainer = train(
            Breaks(), tmp_path, checkpoint_interval=2, nonfinite_loss="warn"
        )
    assert int(trainer.optimizer.iterations) == 6


# -- another program than the checkpoint's -----------------------------------


def test_another_architecture(run_dir, longer, monkeypatch):
    before = contents(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(Plain, "units", 5)
        with pytest.raises(
            RestoreError, match=r"(?s)units: 4 -> 5.*another run_dir"
        ):
            train(Plain(), run_dir, train_steps=8)
        with pytest.raises(
            RestoreError,
            match=r"(?s)step 6.*kernel.*\[8, 4\].*\[8, 5\].*another run_dir",
        ):
            train(Plain(), run_dir, train_steps=8, resume="override")
    assert contents(run_dir) == before
    assert weights(train(Plain(), run_dir, train_steps=8)) == longer


def test_a_layer_more(run_dir, monkeypatch):
    def build_model(self):
        return keras.Sequential(
            [
                layers.Input((8,)),
                layers.Dense(4),
                layers.Dense(3),
                layers.Dense(3),
            ]
        )

    before = contents(run_dir)
    monkeypatch.setattr(Plain, "build_model", build_model)
    with pytest.raises(RestoreError, match=r"(?s)3_dense.*program only"):
        train(Plain(), run_dir, train_steps=8, exact="off")
    assert contents(run_dir) == before


def test_another_optimizer(run_dir, longer, monkeypatch):
    before = contents(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(Plain, "optimizer_class", keras.optimizers.Adam)
        with pytest.raises(
            RestoreError,
            match=r"(?s)optimizer\.class: 'SGD' -> 'Adam'.*override",
        ):
            train(Plain(), run_dir, train_steps=8)
    assert contents(run_dir) == before
    assert weights(train(Plain(), run_dir, train_steps=8)) == longer


def test_another_optimizer_is_taken_on_request(run_dir, monkeypatch):
    monkeypatch.setattr(Plain, "optimizer_class", keras.optimizers.Adam)
    with pytest.warns(ExactnessWarning) as caught:
        trainer = train(Plain(), run_dir, train_steps=8, resume="override")
    assert any("'SGD' -> 'Adam'" in str(w.message) for w in caught)
    statuses = {str(entry.status) for entry in trainer.audit}
    assert {"new", "restored"} <= statuses


def test_another_learning_rate(run_dir, longer, monkeypatch):
    before = contents(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(Plain, "rate", 0.25)
        with pytest.raises(
            RestoreError, match=r"(?s)learning_rate: 0\.1\d* -> 0\.25.*override"
        ):
            train(Plain(), run_dir, train_steps=8)
    assert contents(run_dir) == before
    assert weights(train(Plain(), run_dir, train_steps=8)) == longer


def test_another_learning_rate_is_taken_on_request(run_dir, monkeypatch):
    monkeypatch.setattr(Plain, "rate", 0.25)
    with pytest.warns(ExactnessWarning, match=r"0\.1\d* -> 0\.25"):
        trainer = train(Plain(), run_dir, train_steps=8, resume="override")
    assert float(trainer.optimizer.learning_rate.value) == 0.25
    # From then on it is the run's, and needs no override.
    train(Plain(), run_dir, train_steps=10)


def test_strict_refuses_what_is_not_exact(run_dir, monkeypatch):
    monkeypatch.setattr(Plain, "rate", 0.25)
    with pytest.raises(ExactnessError, match=r"0\.25.*strict"):
        train(
            Plain(), run_dir, train_steps=8, resume="override", exact="strict"
        )
    assert newest(run_dir) == 6


# -- the run directory -------------------------------------------------------


def test_must_and_never(run_dir, tmp_path, longer):
    with pytest.raises(RunDirError, match=r'resume="must".*no checkpoint'):
        train(Plain(), tmp_path / "new", resume="must")
    before = contents(run_dir)
    with pytest.raises(RunDirError, match=r'resume="never".*step 6.*another'):
        train(Plain(), run_dir, resume="never", train_steps=8)
    assert contents(run_dir) == before
    resumed = train(Plain(), run_dir, resume="must", train_steps=8)
    assert weights(resumed) == longer


_HOLDER = """
import sys, threading, time
import keras
import legato
from tests.contracts.test_bad_input import Plain, train
from tests.processes import compile_quickly

compile_quickly(True)  # as the tests' own process does

def wait(epoch, logs):
    # What is being written is first written to its end.
    for thread in threading.enumerate():
        if thread.name == "legato-checkpoint":
            thread.join()
    print("training", flush=True)
    time.sleep(600)

train(Plain(), sys.argv[1], [keras.callbacks.LambdaCallback(on_epoch_end=wait)],
      train_steps=20)
"""


def test_a_directory_that_another_process_is_using(tmp_path):
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path / "run")],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        try:
            assert select.select([holder.stdout], [], [], 120)[0]
            assert holder.stdout.readline() == "training\n"
            before = contents(tmp_path / "run")
            assert "checkpoints/step_00000004/manifest.json" in before
            with pytest.raises(RunDirError) as caught:
                train(Plain(), tmp_path / "run", train_steps=20)
            assert str(holder.pid) in str(caught.value)
            assert str(tmp_path / "run") in str(caught.value)
            assert contents(tmp_path / "run") == before
        finally:
            holder.kill()
    # The lock of a process that died does not hold.
    resumed = train(Plain(), tmp_path / "run", train_steps=8)
    assert resumed.audit


@pytest.mark.parametrize("place", ["a file", "under a file", "/proc"])
def test_a_directory_that_cannot_be_made(place, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("precious")
    where = {
        "a file": file,
        "under a file": file / "run",
        "/proc": Path("/proc/legato/run"),
    }[place]
    with pytest.raises(RunDirError, match=f"{re.escape(str(where))}.*another"):
        train(Plain(), where)
    assert file.read_text() == "precious"


def test_a_directory_that_holds_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(RunDirError, match=r"something else.*notes\.txt.*empty"):
        train(Plain(), tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_a_run_record_that_is_damaged(run_dir):
    (run_dir / "run.json").write_bytes(b'{"run_id": 7}')
    before = contents(run_dir)
    with pytest.raises(RunDirError, match=r"run\.json"):
        train(Plain(), run_dir, train_steps=8)
    assert contents(run_dir) == before


# -- checkpoints that are damaged --------------------------------------------


@pytest.mark.parametrize(
    "file", ["state.safetensors", "host.json", "manifest.json"]
)
def test_a_damaged_checkpoint_and_the_one_before(file, run_dir, longer):
    path = run_dir / "checkpoints" / "step_00000006" / file
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.warns(LegatoWarning, match=r"step_00000006"):
        trainer = train(Plain(), run_dir, train_steps=8)
    assert weights(trainer) == longer


def test_a_removed_checkpoint_and_the_one_before(run_dir, longer):
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    with pytest.warns(LegatoWarning, match=r"6"):
        trainer = train(Plain(), run_dir, train_steps=8)
    assert weights(trainer) == longer


def test_no_checkpoint_is_intact(run_dir):
    for path in (run_dir / "checkpoints").glob("step_*/manifest.json"):
        path.write_bytes(b"{}")
    # Never silently from the start.
    with pytest.raises(
        CheckpointError, match=r"(?s)none.*intact.*step_0.*begin again"
    ):
        train(Plain(), run_dir, train_steps=8)


# -- exceptions of the user's ------------------------------------------------


class Fails(keras.callbacks.Callback):
    """Raises, or does something else, after so many batches."""

    def __init__(self, batches, act):
        super().__init__()
        self.batches = batches
        self._act = act

    def on_train_batch_end(self, batch, logs=None):
        self.batches -= 1
        if self.batches == 0:
            self._act()

    def get_state(self):
        return {"batches": self.batches}

    def set_state(self, state):
        self.batches = state["batches"]


def fail():
    raise OSError("the mail server is down")


def assert_usable(trainer):
    outputs = trainer.model.predict(np.ones((2, 8), "float32"), verbose=0)
    assert np.all(np.isfinite(outputs))


def test_an_exception_in_a_callback(tmp_path, longer):
    trainer = make(Plain(), tmp_path, [Fails(5, fail)], train_steps=8)
    with pytest.raises(OSError, match="mail server") as caught:
        trainer.train()
    assert "step 5" in "".join(caught.value.__notes__)
    assert_usable(trainer)
    assert newest(tmp_path) == 4
    resumed = train(Plain(), tmp_path, train_steps=8)
    assert weights(resumed) == longer


class FailingIterator(DataIterator):
    """Fails at the second epoch; the position is that of the data."""

    def __init__(self, data):
        self.data = data

    def next_chunk(self, max_batches):
        if self.data.get_state()["epoch"] == 1:
            fail()
        return self.data.next_chunk(max_batches)

    def get_state(self):
        return self.data.get_state()

    def set_state(self, state):
        self.data.set_state(state)

    def close(self):
        self.data.close()


class FailingSource(legato.ArraySource):
    def iterate(self, *, seed, capacity):
        return FailingIterator(super().iterate(seed=seed, capacity=capacity))


def test_an_exception_in_the_data(tmp_path, longer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            Plain,
            "build_inputs",
            lambda self, split: (
                None
                if split == "validation"
                else FailingSource(classes_data("train"), batch_size=32)
            ),
        )
        trainer = make(Plain(), tmp_path, train_steps=8, exact="off")
        with pytest.raises(OSError, match="mail server"):
            trainer.train()
    assert_usable(trainer)
    assert newest(tmp_path) == 4
    resumed = train(Plain(), tmp_path, train_steps=8, exact="off")
    assert weights(resumed) == longer


def test_ctrl_c_saves_everything(tmp_path, longer):
    trainer = make(
        Plain(),
        tmp_path,
        [Fails(3, lambda: os.kill(os.getpid(), signal.SIGINT))],
        train_steps=8,
        checkpoint_interval=100,
    )
    with pytest.raises(Interrupted, match=r"step 3 of 8.*saved.*again"):
        trainer.train()
    assert_usable(trainer)
    assert newest(tmp_path) == 3
    # The same object goes on too, as in a notebook.
    trainer.train()
    assert weights(trainer) == longer


def test_a_keyboard_interrupt_in_the_users_code(tmp_path, longer):
    def interrupt():
        raise KeyboardInterrupt

    trainer = make(Plain(), tmp_path, [Fails(5, interrupt)], train_steps=8)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_usable(trainer)
    assert newest(tmp_path) == 4
    assert weights(train(Plain(), tmp_path, train_steps=8)) == longer
