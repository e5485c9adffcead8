"""Summaries in the midst of a device call are those that end one."""

import json
import warnings

import keras
import pytest

import legato
from legato.summaries import SummaryManagerInterface
from legato.training import TrainSteps
from tests.contracts.scenarios import Classifier, classes_data
from tests.summary_files import read_below

STEPS = 60
# (PyTorch runs the same step either way.)
COMPILED = ["auto", *[True] * (keras.config.backend() == "tensorflow")]


class Small(Classifier):
    """In small batches, the last one of an epoch still smaller."""

    def build_inputs(self, split):
        return legato.ArraySource(
            classes_data(split), batch_size=4, shuffle=split == "train"
        )


class Windows(Small):
    """Metrics of Keras over all windows; a rate that a schedule gives."""

    def build_optimizer(self):
        return keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(0.1, STEPS)
        )

    def build_metrics(self, training):
        metrics = keras.metrics
        accuracy = metrics.SparseCategoricalAccuracy
        return {
            accuracy(name="epoch"): legato.Every(1),
            accuracy(name="summary"): legato.Every(2, over="summary"),
            accuracy(name="batch"): legato.Sample(0.4, over="batch"),
        }


class Wide(Small):
    """In a dtype that JAX does not keep."""

    def build_metrics(self, training):
        metrics = keras.metrics
        return [metrics.SparseCategoricalAccuracy("wide", dtype="float64")]


class Dear(Small):
    """One whose result is no mean."""

    def build_metrics(self, training):
        return {
            keras.metrics.AUC(20, name="auc"): legato.Every(1, over="summary"),
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"): (
                legato.Every(1)
            ),
        }

    def process_metrics(self, metrics, labels, outputs):
        for metric in metrics or ():
            if metric.name == "auc":
                first = keras.ops.softmax(outputs)[:, 0]
                metric.update_state(labels == 0, first)
            else:
                metric.update_state(labels, outputs)


class Nothing(Small):
    def build_metrics(self, training):
        return []


class Own(keras.metrics.SparseCategoricalAccuracy):
    """The user's: what its result looks at is not known."""


class OfTheUser(Small):
    def build_metrics(self, training):
        return [Own(name="own")]


def train(run_dir, task, *, interval=7, manager=None, callbacks=(), **changes):
    trainer = legato.Trainer(
        task,
        run_dir=run_dir,
        callbacks=list(callbacks),
        summary_manager=manager,
        config=legato.TrainerConfig(
            **{
                "train_steps": STEPS,
                "summary_interval": interval,
                "validation_interval": 30,
                "checkpoint_interval": 40,
                "progress": "none",
                **changes,
            }
        ),
    )
    trainer.train()
    return trainer


def found(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text()
    points = read_below(run_dir / "summaries" / "train")
    return lines, points


@pytest.fixture
def calls(monkeypatch):
    """How many steps each call of the device took."""
    counted = []
    run = TrainSteps.run

    def counting(self, step, chunk):
        counted.append(chunk.num_batches)
        return run(self, step, chunk)

    monkeypatch.setattr(TrainSteps, "run", counting)
    return counted


@pytest.mark.parametrize("task", [Windows, Wide, Dear, Nothing])
def test_they_are_the_same_to_the_bit(task, tmp_path, calls):
    whole = train(tmp_path / "whole", task())
    assert max(calls) > 7
    single = train(tmp_path / "single", task(), steps_per_loop=1)
    assert found(tmp_path / "whole") == found(tmp_path / "single")
    others = [single]
    if task is Nothing:  # without them there is no window
        others.append(train(tmp_path / "without", task(), interval=0))
    for other in others:
        for mine, its in zip(
            whole.model.get_weights(), other.model.get_weights(), strict=True
        ):
            assert mine.tobytes() == its.tobytes()


class Looks(SummaryManagerInterface):
    """Whose results end a call, for nobody knows what it looks at."""

    def write_summaries(self, summary_dict):
        pass

    def flush(self):
        pass

    def summary_writer(self, relative_path=""):
        return None


@pytest.mark.parametrize("compiled", COMPILED)
def test_no_bit_of_a_weight_depends_on_what_is_kept(compiled, tmp_path, calls):
    weights = []
    for name, manager in (("whole", None), ("cut", Looks())):
        calls.clear()
        with warnings.catch_warnings():
            # (It cannot be rewound, and says so.)
            warnings.simplefilter("ignore", legato.errors.ExactnessWarning)
            trainer = train(
                tmp_path / name, Windows(), manager=manager,
                torch_compile=compiled,
            )  # fmt: skip
        assert (max(calls) > 7) == (manager is None)
        weights.append([v.numpy().tobytes() for v in trainer.model.variables])
    assert weights[0] == weights[1]


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="JAX always compiles; PyTorch's loop does not know what it runs",
)
def test_in_compiled_steps_too(tmp_path, calls):
    train(tmp_path / "whole", Windows(), torch_compile=True)
    assert max(calls) > 7
    single = {"torch_compile": True, "steps_per_loop": 1}
    train(tmp_path / "single", Windows(), **single)
    assert found(tmp_path / "whole") == found(tmp_path / "single")


def test_the_users_own_results_end_a_call(tmp_path, calls):
    train(tmp_path / "run", OfTheUser())
    assert max(calls) <= 7
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [r["step"] for r in records if r["kind"] == "train"]
    assert steps == list(range(7, STEPS, 7))


class Quicker(keras.callbacks.Callback):
    """Changes the schedule in the midst of an epoch, and at its end."""

    def on_test_begin(self, logs=None):
        self._replace()

    def on_epoch_end(self, epoch, logs=None):
        self._replace()

    def _replace(self):
        schedule = self.model.optimizer._learning_rate
        self.model.optimizer._learning_rate = (
            keras.optimizers.schedules.CosineDecay(
                schedule.initial_learning_rate / 2, STEPS
            )
        )


def test_a_callback_changes_nothing_that_was_before_it(tmp_path, calls):
    for name, steps_per_loop in (("whole", None), ("single", 1)):
        calls.clear()
        train(
            tmp_path / name, Windows(), callbacks=[Quicker()],
            steps_per_loop=steps_per_loop,
        )  # fmt: skip
        assert (max(calls) > 7) == (steps_per_loop is None)
    assert found(tmp_path / "whole") == found(tmp_path / "single")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    rates = {
        r["step"]: r["learning_rate"] for r in records if r["kind"] == "train"
    }
    # As it was before the first callback.
    schedule = keras.optimizers.schedules.CosineDecay(0.1, STEPS)
    for step in (7, 14):
        assert rates[step] == pytest.approx(float(schedule(step)))
