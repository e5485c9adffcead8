"""Going back when the loss goes wrong: what is skipped, counted, and kept."""

import json
import os
import signal
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import legato
from legato.checkpoint import load_checkpoint
from legato.data.fitting import fit_source
from legato.errors import (
    BadLossError,
    ConfigError,
    DamagedError,
    LegatoWarning,
    NonFiniteLossError,
    RunDirError,
)
from legato.recovery import RECOVERY, Recovery, Trial
from legato.schedule import Schedule
from tests.contracts import runs
from tests.contracts.scenarios import SCENARIOS, Classifier, classes_data

LENGTH = {"train_steps": 13, "validation_interval": None, "progress": "none"}


class Marked(Classifier):
    """Some batches, in the order given, have a loss that is not one."""

    def __init__(self, **losses):
        self.losses = {int(k[1:]): v for k, v in losses.items()}

    def build_inputs(self, split):
        if split == "validation":
            return None
        features, labels = classes_data(split)
        return legato.ArraySource(
            (features, labels, np.arange(150, dtype="int32")),
            batch_size=15,
            shuffle=False,
        )

    def train_step(self, inputs, model, optimizer, metrics=None):
        features, labels, rows = inputs
        number = rows[0] // 15  # of the batch in its epoch
        extra = ops.zeros(())
        for batch, loss in self.losses.items():
            extra = extra + ops.where(number == batch, loss, 0.0)

        def forward():
            outputs = model(features, training=True)
            return self.build_losses(labels, outputs), outputs

        (loss, outputs), gradients = legato.value_and_grad(
            forward, model.trainable_variables, optimizer
        )
        # (The weights are spoilt with the loss; each by something else, for
        # classes that all become likelier stay as likely as they were.)
        gradients = [
            g + extra * ops.arange(g.shape[-1], dtype="float32")
            for g in gradients
        ]
        optimizer.apply(gradients, model.trainable_variables)
        self.process_metrics(metrics, labels, outputs)
        return {self.loss: loss + extra}


class Count(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.batches = []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(batch)


def make_trainer(run_dir, task, callbacks=(), **config):
    return legato.Trainer(
        task,
        run_dir=run_dir,
        config=legato.TrainerConfig(
            **{**LENGTH, "checkpoint_interval": 4, **config}
        ),
        callbacks=callbacks,
    )


def trials(run_dir):
    return json.loads((run_dir / RECOVERY).read_text())


def train_quietly(trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LegatoWarning)
        return trainer.train()


def test_the_bad_batch_is_skipped_and_nothing_else_changes(tmp_path):
    counter = Count()
    trainer = make_trainer(
        tmp_path / "run",
        Marked(_6=np.nan),
        [counter],
        recovery_max_trials=1,
        summary_interval=1,
        keep_last=None,
    )
    with pytest.warns(LegatoWarning, match="step 7: going back, step 7 is"):
        trainer.train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [r["step"] for r in records if r["kind"] == "train"]
    assert steps == list(range(1, 14))
    assert counter.batches == [0, 1, 2, 3, 4, 5, 7, 8, 9, 0, 1, 2]
    # The same batches without that one, and the weights are the same.
    features, labels = classes_data("train")
    batches = [
        (features[15 * k : 15 * k + 15], labels[15 * k : 15 * k + 15])
        for k in [0, 1, 2, 3, 4, 5, 7, 8, 9, 0, 1, 2]
    ]
    keras.utils.set_random_seed(0)
    model = Classifier().build_model()
    initial = load_checkpoint(tmp_path / "run/checkpoints/step_00000000")
    task = Classifier()
    shapes = {
        value.shape: value
        for path, value in initial.arrays.items()
        if path.startswith("model/")
    }
    model.set_weights([shapes[w.shape] for w in model.weights])
    model.compile(
        task.build_optimizer(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    for x, y in batches:
        model.train_on_batch(x, y)
    for ours, theirs in zip(
        trainer.model.get_weights(), model.get_weights(), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("every", [1, 5])
def test_where_it_goes_back_to_does_not_matter(every, tmp_path):
    finals = []
    for name, interval in (("a", 4), ("b", every)):
        trainer = SCENARIOS["recovering"].trainer(
            tmp_path / name, keep_last=None, checkpoint_interval=interval
        )
        train_quietly(trainer)
        finals.append(
            (tmp_path / name / "final" / "state.safetensors").read_bytes()
        )
    assert finals[0] == finals[1]
    assert trials(tmp_path / "a") == trials(tmp_path / "b")


def test_spoilt_weights_are_traced_back(tmp_path):
    # Below the bound by itself, but what it does to the weights is not.
    trainer = make_trainer(
        tmp_path,
        Marked(_5=400.0),
        loss_upper_bound=500.0,
        recovery_max_trials=3,
    )
    train_quietly(trainer)
    first, last = trials(tmp_path)[-1]["first"], trials(tmp_path)[-1]["last"]
    assert first <= 6 <= last
    assert all(np.all(np.isfinite(w)) for w in trainer.model.get_weights())
    assert max(abs(w).max() for w in trainer.model.get_weights()) < 10


def test_trials_are_counted_over_restarts_and_end(tmp_path):
    def again():
        return make_trainer(
            tmp_path,
            Marked(_2=np.nan, _6=np.inf, _9=np.nan),
            recovery_max_trials=2,
        )

    for _ in range(2):
        with pytest.raises(NonFiniteLossError, match="at step 10") as raised:
            train_quietly(again())
        assert "Gave up after 2 of recovery_max_trials=2" in str(raised.value)
        assert "step 3, step 7" in str(raised.value)
        assert raised.value.step == 10
        assert len(trials(tmp_path)) == 2
    more = make_trainer(
        tmp_path,
        Marked(_2=np.nan, _6=np.inf, _9=np.nan),
        recovery_max_trials=4,
    )
    train_quietly(more)
    assert [t["first"] for t in trials(tmp_path)] == [3, 7, 10, 13]


def test_a_bound_alone_ends_training(tmp_path):
    def train(name, **config):
        make_trainer(tmp_path / name, Marked(_2=100.0), **config).train()

    with pytest.raises(BadLossError, match="step 3, above loss_upper_bound=50"):
        train("a", loss_upper_bound=50.0)
    with pytest.raises(BadLossError) as raised:
        train("b", loss_upper_bound=50.0, recovery_begin_steps=3)
    assert raised.value.step == 4  # what it did to the weights


def test_no_checkpoint_from_before_the_trouble(tmp_path):
    trainer = make_trainer(
        tmp_path,
        Marked(_7=400.0),
        keep_last=1,
        checkpoint_interval=1,
        loss_upper_bound=500.0,
        recovery_max_trials=9,
    )
    with pytest.raises(BadLossError, match="Raise keep_last"):
        train_quietly(trainer)


def test_the_file_of_trials(tmp_path):
    def again(**config):
        return make_trainer(
            tmp_path, Marked(_2=np.nan), recovery_max_trials=9, **config
        )

    train_quietly(again(train_steps=9))
    written = (tmp_path / RECOVERY).read_bytes()
    (tmp_path / RECOVERY).write_bytes(b"{")
    with pytest.raises(RunDirError, match="cannot be read"):
        again().train()
    (tmp_path / RECOVERY).unlink()
    train_quietly(again())
    assert (tmp_path / RECOVERY).read_bytes()[: len(written) - 1] == (
        written[:-1]
    )
    other = json.loads(written)
    other[0]["first"] = other[0]["last"] = other[0]["step"] = 1
    (tmp_path / RECOVERY).write_text(json.dumps(other))
    with pytest.raises(DamagedError, match="other trials"):
        again(train_steps=20).train()


@pytest.mark.parametrize(
    "record",
    [{}, [1], [{"step": 1}], [None], [[]], {"a": 1}, "x"],
)
def test_forged_trials(record, tmp_path):
    (tmp_path / RECOVERY).write_text(json.dumps(record))
    with pytest.raises(RunDirError, match="cannot be read"):
        Recovery(tmp_path, 1)


def test_a_loss_that_is_scaled_may_be_infinite_now_and_then(tmp_path):
    task = SCENARIOS["half_precision"].make_task()
    with pytest.raises(ConfigError, match="a LossScaleOptimizer"):
        make_trainer(tmp_path / "a", task, recovery_max_trials=1).train()
    task = SCENARIOS["half_precision"].make_task()
    make_trainer(
        tmp_path / "b", task, recovery_max_trials=1, loss_upper_bound=1e9
    ).train()
    assert not (tmp_path / "b" / RECOVERY).exists()


class Decays(keras.callbacks.Callback):
    """What its constructor set changes, after the first checkpoint."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor
        self.table = np.ones(200_000)  # large, and so not saved while it is

    def on_train_batch_end(self, batch, logs=None):
        self.factor *= 0.5
        if self.params["steps"] and batch == 3:
            self.table[7] += 1


def test_callbacks_are_put_back_as_in_a_new_process(tmp_path, monkeypatch):
    found = []
    for name in ("here", "anew"):
        callback = Decays()

        def trainer(callback, name=name):
            return make_trainer(
                tmp_path / name,
                Marked(_6=np.nan),
                [callback],
                recovery_max_trials=2,
                checkpoint_interval=100,
            )

        if name == "anew":
            # As if it were killed when the trial was written down.
            with monkeypatch.context() as patch:
                patch.setattr(Recovery, "record", record_and_die)
                with pytest.raises(Killed):
                    trainer(callback).train()
            callback = Decays()
        train_quietly(trainer(callback))
        found.append((callback.factor, callback.table.tobytes()))
    assert found[0] == found[1]
    assert found[0][0] == 0.5**12


class Killed(BaseException):
    pass


def record_and_die(self, trial):
    self.trials.append(trial)
    self._write()
    raise Killed


class Stops(keras.callbacks.Callback):
    """Ctrl-C, once the run has gone back, at the step before the bad one."""

    def __init__(self, run_dir):
        super().__init__()
        self._run_dir = run_dir

    def on_train_batch_end(self, batch, logs=None):
        if batch == 5 and (self._run_dir / RECOVERY).exists():
            os.kill(os.getpid(), signal.SIGINT)

    def get_state(self):
        return {}

    def set_state(self, state):
        del state


def test_the_trials_of_the_checkpoint_are_skipped_too(tmp_path):
    def again(name, *callbacks):
        return make_trainer(
            tmp_path / name,
            Marked(_6=np.nan),
            callbacks,
            recovery_max_trials=1,
            exact="off",
        )

    with pytest.raises(KeyboardInterrupt):
        train_quietly(again("stopped", Stops(tmp_path / "stopped")))
    before = trials(tmp_path / "stopped")
    (tmp_path / "stopped" / RECOVERY).unlink()
    train_quietly(again("stopped"))
    train_quietly(again("whole"))
    assert trials(tmp_path / "stopped") == trials(tmp_path / "whole") == before
    finals = [
        (tmp_path / name / "final" / "state.safetensors").read_bytes()
        for name in ("stopped", "whole")
    ]
    assert finals[0] == finals[1]


def test_a_damaged_checkpoint_on_the_way_back(tmp_path):
    trainer = make_trainer(
        tmp_path,
        Marked(_7=np.nan),
        checkpoint_interval=2,
        keep_last=None,
        recovery_max_trials=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recovery, "record", record_and_die)
        with pytest.raises(Killed):
            trainer.train()
    # The trial says 8; let it have spoilt the weights from 6 on.
    written = json.loads((tmp_path / RECOVERY).read_text())
    written[0]["first"] = 5
    (tmp_path / RECOVERY).write_text(json.dumps(written))
    for file in (tmp_path / "checkpoints/step_00000004").iterdir():
        file.write_bytes(b"x")
    train_quietly(
        make_trainer(
            tmp_path,
            Marked(_7=np.nan),
            checkpoint_interval=2,
            keep_last=None,
            recovery_max_trials=1,
        )
    )
    assert load_checkpoint(tmp_path / "final").step == 13


def test_an_epoch_that_is_skipped_whole_has_logs_all_the_same(tmp_path):
    class Short(Marked):
        def build_inputs(self, split):
            if split == "validation":
                return None
            features, labels = classes_data(split)
            rows = np.arange(150, dtype="int32")
            return legato.ArraySource(
                (features[:30], labels[:30], rows[:30]),
                batch_size=15,
                shuffle=False,
            )

    trainer = make_trainer(
        tmp_path,
        Short(_0=np.nan, _1=np.nan),
        recovery_max_trials=9,
        train_steps=2,
        summary_interval=1,
    )
    history = train_quietly(trainer)
    assert history.epoch == [0]
    assert list(history.history) == ["loss", "accuracy"]
    assert np.isnan(history.history["loss"]).all()


def test_a_bad_step_before_all_that_was_skipped(tmp_path):
    recovery = Recovery(tmp_path, 9)
    recovery.trials.append(
        Trial(step=50, loss=np.inf, first=50, last=50, best=None)
    )
    trial = recovery.plan(BadLossError("", 45, 1.0), None, [0])
    assert (trial.first, trial.last) == (45, 45)


def test_a_generator_cannot_be_gone_back_in(tmp_path):
    class Once(Classifier):
        def build_inputs(self, split):
            if split == "validation":
                return None
            return fit_source(
                (each for each in [classes_data("train")] * 20),
                steps_per_epoch=10,
            )

    with pytest.raises(ConfigError, match="a generator cannot"):
        make_trainer(tmp_path, Once(), recovery_max_trials=1).train()


def test_a_best_from_before_stays(tmp_path):
    train_quietly(
        SCENARIOS["recovering"].trainer(
            tmp_path, validation_interval=1, keep_last=None
        )
    )
    newest = sorted((tmp_path / "checkpoints").glob("step_*"))[-1]
    best = load_checkpoint(newest).host["best"]
    assert load_checkpoint(tmp_path / "best").step == best["step"]


def test_bad_config():
    for config, message in (
        ({"recovery_max_trials": -1}, "at least 0"),
        ({"recovery_begin_steps": 3}, "loss_upper_bound"),
        ({"loss_upper_bound": float("nan")}, "finite"),
        (
            {"recovery_max_trials": 1, "nonfinite_loss": "warn"},
            "nothing to recover from",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            legato.TrainerConfig(train_steps=1, **config)


def test_nothing_to_go_by(tmp_path):
    class Nameless(Classifier):
        def train_step(self, inputs, model, optimizer, metrics=None):
            logs = super().train_step(inputs, model, optimizer, metrics)
            return {"other": logs[self.loss]}

    with pytest.raises(legato.errors.StepError, match="other"):
        make_trainer(tmp_path, Nameless(), recovery_max_trials=1).train()


def test_what_is_skipped(tmp_path):
    recovery = Recovery(tmp_path, 9)

    def fail(step):
        error = BadLossError("", step, 1.0)
        trial = recovery.plan(error, None, [0])
        with pytest.warns(LegatoWarning):
            recovery.record(trial)
        return trial.first, trial.last

    assert fail(20) == (20, 20)
    assert fail(21) == (19, 21)
    assert fail(27) == (16, 27)
    assert fail(90) == (90, 90)
    assert fail(93) == (93, 93)
    assert recovery.skipped == ((16, 27), (90, 90), (93, 93))
    assert Recovery(tmp_path, 9).skipped == recovery.skipped
    assert Trial.parse(recovery.get_state()[0]) == recovery.trials[0]


def test_the_schedule_stops_at_the_edges():
    schedule = Schedule(
        train_steps=30,
        steps_per_epoch=30,
        validation_interval=None,
        checkpoint_interval=None,
        summary_interval=0,
        skipped=((1, 2), (16, 24)),
    )
    stops, step = [], 0
    while step < 30:
        step = schedule.next_stop(step)
        stops.append(step)
    assert stops == [2, 15, 24, 30]
    assert [s for s in range(1, 31) if schedule.is_skipped(s)] == [
        1, 2, *range(16, 25),
    ]  # fmt: skip
    assert schedule.trained(0, 30) == [(2, 15), (24, 30)]
    assert schedule.trained(1, 20) == [(2, 15)]
    assert schedule.trained(17, 20) == []


def test_killed_while_it_recovers(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.train("recovering", whole, keep_last=None, checkpoint_interval=1)
    report = runs.train_with_kills(
        "recovering",
        killed,
        kills=3,
        until=13,
        seed=5,
        keep_last=None,
        checkpoint_interval=1,
    )
    found, _ = runs.differences(whole, killed)
    assert not found, report
