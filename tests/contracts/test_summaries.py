"""Summaries of a Trainer: whose they are, what is refused, what is written."""

import importlib.metadata
import shutil
import warnings

import keras
import numpy as np
import pytest

import legato
from legato.config import sinks as names
from legato.errors import (
    ConfigError,
    ExactnessError,
    ExactnessWarning,
    LegatoWarning,
    SummaryError,
)
from legato.experiment import Experiment, run_experiment
from tests.contracts.scenarios import Classifier
from tests.summary_files import read, read_below


def make(run_dir, *, managers=None, callbacks=(), **config):
    given = {
        "train_steps": 12,
        "summary_interval": 4,
        "validation_interval": 6,
        "checkpoint_interval": 6,
        "progress": "none",
    }
    return legato.Trainer(
        Classifier(),
        run_dir=run_dir,
        config=legato.TrainerConfig(**{**given, **config}),
        callbacks=callbacks,
        **(managers or {}),
    )


def weights(trainer):
    return [weight.tobytes() for weight in trainer.model.get_weights()]


class Kept(legato.SummaryManagerInterface):
    """A manager that a user wrote for his own board; without a state."""

    def __init__(self):
        self.given = []
        self.flushes = 0

    def summary_writer(self, relative_path=""):
        raise NotImplementedError

    def write_summaries(self, summary_dict):
        step = legato.summaries.current_step()
        self.given.append((step, sorted(summary_dict)))

    def flush(self):
        self.flushes += 1


def test_managers_take_the_place_of_the_engines(tmp_path):
    train = legato.SummaryManager(tmp_path / "train")
    kept = Kept()
    managers = {"summary_manager": train, "eval_summary_manager": kept}
    trainer = make(tmp_path / "run", managers=managers)
    with pytest.warns(ExactnessWarning, match="validation go to a Kept"):
        trainer.train()
    steps = [step for step, _ in read(tmp_path / "train")["loss"]]
    assert steps == [4, 8, 12]
    assert kept.given == [
        (6, ["accuracy", "loss"]),
        (12, ["accuracy", "loss"]),
    ]
    assert kept.flushes >= 2
    assert not (tmp_path / "run" / "summaries").exists()
    with pytest.raises(ExactnessError, match=r"Kept.*strict.*refuses"):
        make(tmp_path / "new", managers=managers, exact="strict").train()
    assert kept.given[-1][0] == 12


class Writes(keras.callbacks.Callback):
    """Writes in each hook to the manager of the run."""

    def __init__(self, manager):
        super().__init__()
        self._write = lambda name: manager.write_summaries({name: 1.0})


def _writing(hook):
    return lambda self, *args, logs=None: self._write(hook)


for _when in ("begin", "end"):
    for _what in (
        "train", "epoch", "train_batch", "test", "test_batch"
    ):  # fmt: skip
        _hook = f"on_{_what}_{_when}"
        setattr(Writes, _hook, _writing(_hook))


class Fails(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == 10:
            raise InterruptedError


def test_what_callbacks_write_has_the_step_and_is_rewound(tmp_path):
    def run(name, *more):
        manager = legato.SummaryManager(tmp_path / name)
        make(
            tmp_path / f"{name}-run",
            managers={"summary_manager": manager},
            callbacks=[Writes(manager), *more],
            checkpoint_interval=4,
            validation_interval=6,
        ).train()
        return read(tmp_path / name)

    whole = run("whole")
    steps = {tag: [step for step, _ in points] for tag, points in whole.items()}
    assert steps["on_train_begin"] == [0]
    assert steps["on_train_batch_begin"] == [*range(12)]
    assert steps["on_train_batch_end"] == [*range(1, 13)]
    assert {*steps["on_test_batch_end"]} == {6, 12}
    assert steps["on_train_end"] == [12]
    with pytest.raises(InterruptedError):
        run("two", Fails())
    assert len(read(tmp_path / "two")["on_train_batch_end"]) == 10
    assert run("two") == whole


class Failing:
    """A plug-in that cannot reach its server."""

    def __init__(self, run_dir):
        pass

    def write(self, kind, step, values):
        raise ConnectionError("no route to host")

    def __getattr__(self, name):
        return lambda *arguments: None


def test_a_sink_that_fails_changes_no_bit(tmp_path, monkeypatch):
    point = importlib.metadata.EntryPoint(
        "failing", f"{__name__}:Failing", names.GROUP
    )
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point]
    )
    trainer = make(tmp_path / "run", sinks=["failing", "tensorboard"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(w.message) for w in caught if w.category is LegatoWarning]
    assert len(told) == 1 and "ConnectionError: no route" in told[0]
    whole = make(tmp_path / "whole")
    whole.train()
    assert weights(trainer) == weights(whole)
    found = read_below(tmp_path / "run" / "summaries")
    assert found == read_below(tmp_path / "whole" / "summaries")
    assert found.keys() == {"train", "validation"}


def test_what_is_refused_before_anything_is_made(tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        make(run_dir, sinks=["tensorbord"]).train()
    with pytest.raises(ConfigError, match="summary_manager=3"):
        make(run_dir, managers={"summary_manager": 3})
    inside = legato.SummaryManager(run_dir / "summaries" / "validation")
    with pytest.raises(ConfigError, match="eval_summary_manager has summary_d"):
        make(run_dir, managers={"eval_summary_manager": inside})
    assert not run_dir.exists()


@pytest.mark.any_backend
def test_other_sinks_on_resume_are_named(tmp_path):
    make(tmp_path, train_steps=6).train()
    with pytest.warns(ExactnessWarning, match=r"config\.sinks.*csv"):
        make(tmp_path, sinks=["csv"]).train()
    lines = (tmp_path / "summaries.csv").read_text().splitlines()
    steps = {line.split(",")[1] for line in lines}
    assert "8" in steps and "4" not in steps


def experiment(**config):
    return Experiment(
        task="tests.contracts.scenarios:Classifier",
        trainer=legato.TrainerConfig(
            train_steps=8, validation_interval=4, progress="none", **config
        ),
    )


def test_summaries_can_be_switched_off(tmp_path):
    kept = Kept()
    run_experiment(
        experiment(sinks=["csv", "tensorboard"]),
        run_dir=tmp_path,
        eval_summary_manager=kept,
        save_summary=False,
    )
    assert not list(tmp_path.rglob("*tfevents*"))
    assert not kept.given
    assert (tmp_path / "metrics.jsonl").read_text().count("validation") == 2
    assert (tmp_path / "summaries.csv").exists()
    config = (tmp_path / "config.yaml").read_text()
    assert "tensorboard" not in config


@pytest.mark.any_backend
def test_evaluation_gives_its_results_with_the_steps_of_checkpoints(tmp_path):
    run_dir = tmp_path / "run"
    make(run_dir, checkpoint_interval=4).train()
    before = sorted(run_dir.rglob("*"))
    board = tmp_path / "board"

    def manager():
        return {"eval_summary_manager": legato.SummaryManager(board)}

    logs = make(run_dir, managers=manager()).evaluate(checkpoint=8)
    ((step, loss),) = read(board)["loss"]
    assert (step, loss) == (8, pytest.approx(logs["loss"]))
    shutil.rmtree(board)
    results = make(run_dir, managers=manager()).evaluate_continuously()
    assert [step for step, _ in read(board)["loss"]] == [4, 8, 12]
    assert results[12]["loss"] == pytest.approx(read(board)["loss"][2][1])
    make(run_dir).evaluate()
    assert sorted(run_dir.rglob("*")) == before


class Full(Kept):
    """On a board that takes one result, and no more."""

    def flush(self):
        super().flush()
        if self.flushes > 1:
            raise OSError("disk full")


def test_results_are_not_lost_to_a_manager_that_fails(tmp_path):
    make(tmp_path / "run", checkpoint_interval=4).train()
    full = Full()
    trainer = make(tmp_path / "run", managers={"eval_summary_manager": full})
    with pytest.warns(LegatoWarning, match="manager failed.*disk full") as told:
        results = trainer.evaluate_continuously()
    assert list(results) == [4, 8, 12, "final"]
    assert [step for step, _ in full.given] == [4, 8]
    assert len(told) == 1
    with pytest.warns(LegatoWarning, match="until the next evaluation"):
        assert trainer.evaluate(checkpoint=12) == results[12]
    assert full.given[-1][0] == 12


def test_results_are_not_lost_to_a_value_that_is_refused(tmp_path):
    def refuse(name, value, step):
        if name == "accuracy":
            raise SummaryError("no such value")
        legato.summaries.scalar(name, value, step)

    make(tmp_path / "run").train()
    manager = legato.SummaryManager(tmp_path / "board", refuse)
    trainer = make(tmp_path / "run", managers={"eval_summary_manager": manager})
    for step in (6, 12):
        with pytest.warns(LegatoWarning, match="no such value"):
            logs = trainer.evaluate(checkpoint=step)
        assert set(logs) == {"loss", "accuracy"}
    assert [step for step, _ in read(tmp_path / "board")["loss"]] == [6, 12]


def test_evaluation_writes_nothing_into_the_files_of_the_run(tmp_path):
    board = tmp_path / "board"
    managers = {"eval_summary_manager": legato.SummaryManager(board)}
    trainer = make(tmp_path / "run", managers=managers)
    trainer.train()
    (file,) = board.iterdir()
    before = file.read_bytes()
    trainer.evaluate()
    assert file.read_bytes() == before
    (other,) = {*board.iterdir()} - {file}
    make(tmp_path / "run", managers=managers, train_steps=18).train()
    assert other.stat().st_size
    steps = sorted(step for step, _ in read(board)["loss"])
    assert steps == [6, 12, 12, 18]


def test_a_callback_may_hold_the_manager(tmp_path):
    class Writes(keras.callbacks.Callback):
        def __init__(self, manager):
            super().__init__()
            self.manager = manager

        def on_epoch_end(self, epoch, logs=None):
            with self.manager.summary_writer("mine").as_default():
                legato.summaries.text("note", f"epoch {epoch}", step=epoch)

    manager = legato.SummaryManager(tmp_path / "board")
    trainer = make(
        tmp_path / "run",
        managers={"summary_manager": manager},
        callbacks=[Writes(manager)],
        exact="strict",
    )
    trainer.train()
    assert len(read(tmp_path / "board" / "mine")["note"]) == 2
    assert np.isfinite(trainer.evaluate()["loss"])


@pytest.mark.any_backend
def test_one_manager_for_two_runs_and_for_a_run_made_longer(tmp_path):
    board = tmp_path / "board"
    managers = {"summary_manager": legato.SummaryManager(board)}
    make(tmp_path / "run", managers=managers, train_steps=6).train()
    make(tmp_path / "run", managers=managers).train()
    expected = read(board)["loss"]
    assert [step for step, _ in expected] == [4, 8, 12]
    # Of another run, in files of its own; and the first goes on in its own.
    make(tmp_path / "other", managers=managers, train_steps=6).train()
    assert sorted(read(board)["loss"]) == sorted([*expected, expected[0]])
    make(tmp_path / "run", managers=managers, train_steps=16).train()
    assert [step for step, _ in sorted(read(board)["loss"])] == [
        4,
        4,
        8,
        12,
        16,
    ]
    assert len(list(board.iterdir())) == 2
