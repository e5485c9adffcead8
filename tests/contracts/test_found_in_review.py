"""Defects that were found by use; each of these failed once."""

import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

import legato
from legato import backends, identity
from legato.errors import (
    ExactnessError,
    ExactnessWarning,
    LegatoWarning,
    StepError,
)
from legato.run_directory import prepare_run_directory, read_run_id
from legato.storage import RunLock
from tests.contracts import scenarios


class Classifier(scenarios.Classifier):
    """Of which fewer programs are compiled."""

    has_partial_batches = False


class Stop(Exception):
    """Stands for a kill, in one process."""


class StopAt(keras.callbacks.Callback):
    """Raises at the beginning of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.at = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.at:
            raise Stop

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def train(task, run_dir, *callbacks, **changes):
    config = {
        "epochs": 4,
        "checkpoint_interval": 2,
        "progress": "none",
        "summary_interval": 2,
        "validation_interval": "epoch",
        **changes,
    }
    trainer = legato.Trainer(
        task,
        run_dir=run_dir,
        config=legato.TrainerConfig(**config),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def same_after_a_stop(make_task, tmp_path, make_callbacks=list, **changes):
    """Train whole, and stopped at two epochs; compare the bytes."""
    train(make_task(), tmp_path / "whole", *make_callbacks(), **changes)
    for epoch in (1, 3):
        run_dir = tmp_path / f"stopped{epoch}"
        with pytest.raises(Stop):
            train(
                make_task(),
                run_dir,
                *make_callbacks(),
                StopAt(epoch),
                **changes,
            )
        train(make_task(), run_dir, *make_callbacks(), StopAt(9), **changes)
        for file in ("final/state.safetensors", "metrics.jsonl"):
            whole = (tmp_path / "whole" / file).read_bytes()
            assert whole == (run_dir / file).read_bytes(), (epoch, file)


class Vector(Classifier):
    def build_metrics(self, training):
        if training:
            return []

        class Counts(keras.metrics.Metric):
            def __init__(self):
                super().__init__(name="counts")
                self.counts = self.add_weight(
                    shape=(3,), initializer="zeros", name="counts"
                )

            def update_state(self, y_true, y_pred, sample_weight=None):
                self.counts.assign_add(
                    keras.ops.sum(keras.ops.one_hot(y_true, 3), axis=0)
                )

            def result(self):
                return self.counts

        return [Counts()]


def test_a_metric_may_have_an_array_for_result(tmp_path):
    # A checkpoint in mid-epoch holds the results of the epoch's validation.
    same_after_a_stop(Vector, tmp_path, validation_interval=3)


class Freezes(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.model.layers[0].trainable = False


class Unfreezes(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.model.layers[0].trainable = True


class Normalized(Classifier):
    def build_model(self):
        return keras.Sequential(
            [
                keras.layers.Input((8,)),
                keras.layers.BatchNormalization(center=False, scale=False),
                keras.layers.Dense(3),
            ]
        )


@pytest.mark.parametrize("make_task", [Classifier, Normalized])
def test_a_layer_that_was_frozen_stays_frozen(make_task, tmp_path):
    same_after_a_stop(make_task, tmp_path, lambda: [Freezes()])


def test_freezing_a_layer_without_weights_of_its_own_acts(tmp_path):
    frozen = train(Normalized(), tmp_path / "frozen", Freezes())
    free = train(Normalized(), tmp_path / "free")
    means = [t.model.layers[0].moving_mean.numpy() for t in (frozen, free)]
    assert not np.array_equal(*means)


class HalfFrozen(Classifier):
    def build_model(self):
        model = super().build_model()
        model.layers[0].trainable = False
        return model


def test_unfreezing_what_the_optimizer_does_not_know_is_refused(tmp_path):
    with pytest.raises(StepError, match="Build it with all variables"):
        train(HalfFrozen(), tmp_path, Unfreezes())


class Holder:
    """A plain object."""

    def __init__(self):
        self.noise = keras.random.SeedGenerator(3)


class NoisyValidation(Classifier):
    def __init__(self):
        self.holder = Holder()

    def validation_step(self, inputs, model, metrics=None):
        features, labels = inputs
        noise = keras.random.normal((1, 8), seed=self.holder.noise)
        return super().validation_step(
            (features + noise, labels), model, metrics
        )


def test_what_only_validation_uses_is_saved(tmp_path):
    same_after_a_stop(NoisyValidation, tmp_path)


class CountsTests(keras.callbacks.Callback):
    """Has state that validation changes."""

    begun = batches = 0

    def on_test_begin(self, logs=None):
        self.begun += 1

    def on_test_batch_end(self, batch, logs=None):
        self.batches += 1


class SignalsItself(keras.callbacks.Callback):
    """In the second validation, if it is to."""

    def __init__(self, when):
        super().__init__()
        self.when = when
        self.begun = 0

    def on_test_begin(self, logs=None):
        self.begun += 1
        if self.begun == 2 and self.when == "validation":
            os.kill(os.getpid(), signal.SIGTERM)

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


@pytest.mark.parametrize("make_task", [Classifier, NoisyValidation])
def test_a_signal_during_validation(make_task, tmp_path):
    counts = CountsTests(), CountsTests()
    train(make_task(), tmp_path / "whole", counts[0], SignalsItself(None))
    stopped = tmp_path / "stopped"
    with pytest.raises(legato.errors.Stopped):
        train(make_task(), stopped, CountsTests(), SignalsItself("validation"))
    train(make_task(), stopped, counts[1], SignalsItself(None))
    assert vars(counts[0]).items() >= {"begun": 4, "batches": 8}.items()
    assert counts[0].begun == counts[1].begun
    assert counts[0].batches == counts[1].batches
    for file in ("final/state.safetensors", "metrics.jsonl"):
        whole = (tmp_path / "whole" / file).read_bytes()
        assert whole == (stopped / file).read_bytes()


class PlainAttributes(Classifier):
    weights = 1.0  # of the class

    def __init__(self):
        self.losses = [keras.losses.Huber(), keras.losses.Huber()]
        self.arrays = [np.zeros(3), np.ones((2, 2))]
        self.with_nan = np.array([1.0, np.nan])
        self.nan = float("nan")
        self.layers = {"a": keras.layers.Dense(1)}
        self.table = np.zeros(10**6)

    def build_losses(self, labels, model_outputs, aux_losses=None):
        for used in vars(self):
            getattr(self, used)
        return super().build_losses(labels, model_outputs) * self.weights


def test_attributes_of_all_kinds_may_be_read_in_a_step(tmp_path):
    same_after_a_stop(PlainAttributes, tmp_path)


def test_an_attribute_that_changes_is_still_found(tmp_path):
    class Changes(keras.callbacks.Callback):
        def __init__(self, task):
            super().__init__()
            self.task = task

        def on_epoch_end(self, epoch, logs=None):
            self.task.arrays[1][0, 0] = 7

    task = PlainAttributes()
    with pytest.raises(StepError, match=r"(?s)arrays was.* is "):
        train(task, tmp_path, Changes(task))


class Prepared(Classifier):
    def initialize(self, model):
        self.warm = 3


def test_initialize_may_set_attributes(tmp_path):
    same_after_a_stop(Prepared, tmp_path)


@pytest.mark.any_backend
def test_the_code_hash_is_the_same_in_every_process():
    code = (
        "from legato.identity import code_hash\n"
        "class A:\n"
        "    def f(self, split, k={'a', 'b', 'c'}):\n"
        "        return split in {'train', 'validation', 'test'}\n"
        "print(code_hash(A))\n"
        "print({'train', 'validation', 'test'})"
    )
    hashes, orders = zip(
        *(
            subprocess.run(
                [sys.executable, "-c", code],
                env={
                    **os.environ,
                    "PYTHONHASHSEED": str(seed),
                    "KERAS_BACKEND": "jax",  # the quickest to import
                },
                capture_output=True,
                text=True,
                check=True,
            ).stdout.splitlines()
            for seed in (1, 2)
        ),
        strict=True,
    )
    assert orders[0] != orders[1]
    assert hashes[0] == hashes[1]


def test_class_attributes_are_part_of_the_task():
    class Other(PlainAttributes):
        weights = 9.0

    def described(task):
        program = identity.describe_program(task, keras.optimizers.SGD(0.1))
        return program["task"]["attributes"]

    assert described(PlainAttributes())["weights"] == 1.0
    assert described(Other())["weights"] == 9.0


def test_the_same_trainer_can_be_called_again(tmp_path):
    class Halves(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.optimizer.learning_rate = (
                float(self.model.optimizer.learning_rate.numpy()) / 2
            )

    stop = StopAt(2)
    trainer = legato.Trainer(
        Classifier(),
        run_dir=tmp_path,
        config=legato.TrainerConfig(
            epochs=3, checkpoint_interval=2, progress="none"
        ),
        callbacks=[Halves(), stop],
    )
    with pytest.raises(Stop):
        trainer.train()
    stop.at = 9
    assert len(trainer.train().history["loss"]) == 3


def test_override_takes_a_learning_rate_only_where_it_differs(tmp_path):
    class Lowers(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.optimizer.learning_rate = 0.0025

    class Named(Classifier):
        def __init__(self, name):
            self.name = name

    with pytest.raises(Stop):
        train(Named("a"), tmp_path, Lowers(), StopAt(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = train(
            Named("b"), tmp_path, StopAt(9), resume="override", exact="off"
        )
    rate = trainer.optimizer.learning_rate.numpy()
    assert rate == np.float32(0.0025)


def test_names_of_metrics_do_not_depend_on_the_process(tmp_path):
    class Counted(Classifier):
        def build_metrics(self, training):
            return [Anonymous()]

    class Anonymous(keras.metrics.Metric):
        def __init__(self):
            super().__init__()
            self.total = self.add_weight(shape=(), initializer="zeros")

        def update_state(self, y_true, y_pred, sample_weight=None):
            self.total.assign_add(1.0)

        def result(self):
            return self.total

    logs = [
        list(train(Counted(), tmp_path / str(k))._parts.evaluator.metrics)
        for k in range(2)
    ]
    names = [[metric.name for metric in metrics] for metrics in logs]
    assert names[0] == names[1] and not any("_1" in n for n in names[0])


def test_callbacks_may_log_anything(tmp_path):
    class Logs(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["matrix"] = np.eye(2)
            logs["none"] = None
            logs["list"] = [np.float32(1.5)]
            logs["object"] = object

    train(Classifier(), tmp_path, Logs())
    record = json.loads(
        (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    )
    assert record["matrix"] == [[1.0, 0.0], [0.0, 1.0]]
    assert record["none"] is None and record["list"] == [1.5]


def test_an_unknown_best_metric_is_named(tmp_path):
    with pytest.warns(LegatoWarning, match="val_acuracy"):
        train(
            Classifier(),
            tmp_path,
            best_metric="val_acuracy",
            best_mode="max",
        )


def test_a_log_with_the_name_of_a_metric_is_refused(tmp_path):
    class Twice(Classifier):
        def train_step(self, *arguments):
            logs = super().train_step(*arguments)
            return {**logs, "accuracy": logs["loss"]}

    with pytest.raises(StepError, match="'accuracy'"):
        train(Twice(), tmp_path)


def test_a_model_that_its_first_call_builds(tmp_path):
    class Lazy(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = keras.layers.Dense(4)
            self.second = keras.layers.Dense(3)

        def call(self, inputs, training=False):
            return self.second(self.first(inputs))

    class LazyTask(Classifier):
        def build_model(self):
            return Lazy()

    same_after_a_stop(LazyTask, tmp_path)
    trainer = legato.Trainer(
        LazyTask(),
        run_dir=tmp_path / "whole",
        config=legato.TrainerConfig(epochs=4),
    )
    assert trainer.evaluate()["accuracy"] > 0.3


def test_evaluate_measures_what_the_run_ended_with(tmp_path):
    class Ends(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            self.model.set_weights(
                [np.zeros_like(w) for w in self.model.get_weights()]
            )

    there = train(Classifier(), tmp_path, Ends()).evaluate()
    again = legato.Trainer(
        Classifier(),
        run_dir=tmp_path,
        config=legato.TrainerConfig(epochs=4),
    ).evaluate()
    assert again == there
    with pytest.warns(LegatoWarning, match="no run"):
        legato.Trainer(
            Classifier(),
            run_dir=tmp_path / "mistyped",
            config=legato.TrainerConfig(epochs=4),
        ).evaluate()


def test_processes_that_begin_together_agree_on_the_runs_id(tmp_path):
    barrier, ids = threading.Barrier(2), []

    def begin(run_dir: Path):
        barrier.wait()
        prepare_run_directory(run_dir)
        while True:
            try:
                with RunLock(run_dir):
                    ids.append(read_run_id(run_dir))
                    return
            except legato.errors.RunDirError:
                pass

    for number in range(20):
        threads = [
            threading.Thread(target=begin, args=(tmp_path / str(number),))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ids[-1] == ids[-2]


def test_a_config_that_the_user_keeps_there_is_not_overwritten(tmp_path):
    # `legato train exp/config.yaml --run-dir exp`
    (tmp_path / "config.yaml").write_text("the user's own")
    with pytest.raises(legato.errors.RunDirError, match=r"config\.yaml"):
        train(Classifier(), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "the user's own"


class Counts(Classifier):
    """A variable itself among the logs, and what was before an update."""

    def build_optimizer(self):
        return keras.optimizers.SGD(0.1)

    def train_step(self, inputs, model, optimizer, metrics=None):
        bias = model.layers[-1].bias
        before = keras.ops.stop_gradient(bias)
        logs = super().train_step(inputs, model, optimizer, metrics)
        moved = keras.ops.sum(keras.ops.abs(bias - before))
        return {**logs, "count": optimizer.iterations, "moved": moved}


def test_variables_among_the_logs_and_values_from_before(tmp_path):
    train(Counts(), tmp_path, epochs=None, train_steps=4, summary_interval=1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records = [r for r in records if r["kind"] == "train"]
    assert [r["count"] for r in records] == [1, 2, 3, 4]
    assert all(r["moved"] > 0 for r in records)


class DrawsInPython(Classifier):
    """Its step draws from NumPy: once in a trace, or at each step."""

    def __init__(self):
        self.draw = np.random.rand

    def build_losses(self, labels, model_outputs, aux_losses=None):
        loss = super().build_losses(labels, model_outputs)
        return loss * (1 + 0 * self.draw())


class LogsADraw(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        logs["drawn"] = np.random.rand()


def test_tracing_draws_nothing_from_the_hosts_generators(tmp_path):
    # A partial batch is traced when training goes on: later in a resumed run.
    same_after_a_stop(
        DrawsInPython, tmp_path, make_callbacks=lambda: [LogsADraw()]
    )


def test_a_device_that_does_not_repeat_itself_is_named(tmp_path, monkeypatch):
    backend = type(backends.current())
    monkeypatch.setattr(
        backend, "unrepeatable", lambda self: ["its sums vary: set FLAG=1"]
    )
    with pytest.raises(ExactnessError, match=r"sums vary: set FLAG=1.*strict"):
        train(Classifier(), tmp_path / "strict", exact="strict")
    with pytest.warns(ExactnessWarning, match="may differ from itself"):
        train(Classifier(), tmp_path / "warn")
    train(Classifier(), tmp_path / "off", exact="off")


def test_a_value_that_was_written_is_a_copy():
    # JAX takes aligned memory as it is, also where it is told not to.
    memory = np.zeros(1024, "float32")
    start = -memory.ctypes.data % 64 // 4
    value = memory[start : start + 512]
    variable = keras.Variable(np.zeros(512, "float32"))
    value[:] = 1
    backends.current().write([variable], [value])
    value[:] = 2
    assert (keras.ops.convert_to_numpy(variable) == 1).all()
