"""When training metrics are updated, and what their results are taken over."""

import json

import keras
import numpy as np
import pytest

import legato
from legato.errors import (
    ConfigError,
    ExactnessError,
    ExactnessWarning,
    StepError,
)
from legato.training import TrainSteps
from tests.contracts.scenarios import Classifier, classes_data

STEPS, IN_EPOCH, SUMMARY = 24, 5, 4


class Labels(Classifier):
    """Its metrics are means of labels, which are known without training."""

    def __init__(self, whens, as_dict=True):
        self._whens = lambda: whens  # in a closure: no attribute of the run
        self._as_dict = as_dict

    def build_metrics(self, training):
        if not training:
            return []
        made = {
            keras.metrics.Mean(name=name): when
            for name, when in self._whens().items()
        }
        return made if self._as_dict else list(made)

    def process_metrics(self, metrics, labels, outputs):
        for metric in metrics or ():
            metric.update_state(keras.ops.cast(labels, "float32"))

    def build_inputs(self, split):
        return legato.ArraySource(
            classes_data(split), batch_size=32, shuffle=False
        )


def train(run_dir, task, **changes):
    config = {
        "train_steps": STEPS,
        "validation_interval": None,
        "checkpoint_interval": 7,
        "summary_interval": SUMMARY,
        "progress": "none",
        **changes,
    }
    trainer = legato.Trainer(
        task, run_dir=run_dir, config=legato.TrainerConfig(**config)
    )
    history = trainer.train().history
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return history, [
        record for record in map(json.loads, lines) if record["kind"] == "train"
    ]


def expected(when, step, epoch_first):
    """The mean of the labels of the batches in the window, after a step."""
    labels = classes_data("train")[1]
    batches = [labels[k : k + 32] for k in range(0, len(labels), 32)]
    first = epoch_first
    if when.over == "summary":
        first = (step - 1) // SUMMARY * SUMMARY
    due = [batches[k % IN_EPOCH] for k in range(first, step) if when.is_due(k)]
    if not due:
        return np.nan
    if when.over == "batch":
        due = due[-1:]
    return float(np.concatenate(due).mean())


WHENS = {
    f"{name}_{over}": made(over)
    for over in ("epoch", "summary", "batch")
    for name, made in {
        "always": lambda over: legato.Every(over=over),
        "third": lambda over: legato.Every(3, over=over),
        "seventh": lambda over: legato.Every(7, over=over),
        "sample": lambda over: legato.Sample(0.3, over=over),
    }.items()
}


@pytest.mark.parametrize("steps_per_loop", [None, 1])
def test_results_are_those_of_their_window(tmp_path, steps_per_loop):
    history, summaries = train(
        tmp_path / "run", Labels(WHENS), steps_per_loop=steps_per_loop
    )
    assert [record["step"] for record in summaries] == [4, 8, 12, 16, 20, 24]
    for name, when in WHENS.items():
        in_summaries = [
            expected(when, step, (step - 1) // IN_EPOCH * IN_EPOCH)
            for step in range(SUMMARY, STEPS + 1, SUMMARY)
        ]
        np.testing.assert_allclose(
            [record[name] for record in summaries],
            in_summaries,
            rtol=1e-6,
            err_msg=name,
        )
        at_epochs = [expected(when, e, e - IN_EPOCH) for e in (5, 10, 15, 20)]
        np.testing.assert_allclose(
            history[name], at_epochs, rtol=1e-6, err_msg=name
        )


def test_a_step_is_traced_once_whatever_is_due():
    traced = {}
    for key, whens in {
        "one": {"a": legato.Every()},
        "many": {**WHENS, "never": None},
    }.items():
        task = Labels(whens)
        metrics = {m: w for m, w in task.build_metrics(True).items() if w}
        steps = TrainSteps(
            task,
            task.build_model(),
            task.build_optimizer(),
            task.build_inputs("train"),
            metrics,
            mode=None,
            capacity=4,
        )
        steps.trace()
        traced[key] = steps.traces
    assert traced["one"] == traced["many"]


@pytest.mark.parametrize(
    ("given", "when"),
    [
        (50, legato.Every(50)),
        (legato.Every(3, over="batch"), legato.Every(3, over="batch")),
        ({"every": 3, "over": "summary"}, legato.Every(3, over="summary")),
        ({"sample": 0.5}, legato.Sample(0.5)),
        ({"sample": 0.5, "seed": 2}, legato.Sample(0.5, seed=2)),
        (None, None),
    ],
)
def test_a_config_says_when(given, when):
    config = legato.TrainerConfig(train_metrics={"a": given})
    assert config.choose_when("a", legato.Every()) == when
    assert config.choose_when("b", legato.Every(7)) == legato.Every(7)
    again = legato.TrainerConfig(**config.model_dump(mode="json"))
    assert again.choose_when("a", legato.Every()) == when


def test_the_config_overrules_the_task(tmp_path):
    whens = {"a": legato.Every(), "b": legato.Every(), "c": None}
    _, summaries = train(
        tmp_path / "run",
        Labels(whens),
        train_metrics={"a": None, "b": {"every": 3, "over": "batch"}, "c": 1},
    )
    assert set(summaries[0]) >= {"b", "c"}
    assert "a" not in summaries[0]
    labels = classes_data("train")[1]
    assert summaries[0]["b"] == pytest.approx(labels[64:96].mean())


def test_only_those_that_are_named(tmp_path):
    task = Labels(dict.fromkeys("abc"), as_dict=False)
    _, summaries = train(
        tmp_path / "run", task, train_metrics_interval=0, train_metrics={"b": 2}
    )
    assert "b" in summaries[0] and not {"a", "c"} & set(summaries[0])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"a": 0}, "at least 1"),
        ({"a": -3}, "at least 1"),
        ({"a": True}, "number of steps"),
        ({"a": "often"}, "number of steps"),
        ({"a": {"every": 2, "over": "year"}}, "since the epoch began"),
        ({"a": {"every": 2, "when": 1}}, "number of steps"),
        ({"a": {"sample": 2}}, "above 0 and at most 1"),
        ({"a": {"every": "x"}}, "Every.'x'.*whole number"),
        ({"a": {}}, "number of steps"),
        ({"a": []}, "number of steps"),
        ({3: 4}, "names of metrics"),
        ([1], "names of metrics"),
    ],
)
def test_a_wrong_config_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        legato.TrainerConfig(train_metrics=given)


@pytest.mark.parametrize(
    ("whens", "changes", "words"),
    [
        ({"a": 5}, {}, "legato.Every"),
        ({"accuracy": None}, {"train_metrics": {"acuracy": 2}}, "'accuracy'"),
        (
            {"a": legato.Every(over="summary")},
            {"summary_interval": 0},
            "summary_interval=0",
        ),
    ],
)
def test_what_does_not_fit_the_task_is_refused(whens, changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        train(tmp_path / "run", Labels(whens), **changes)
    assert not (tmp_path / "run").exists()


def test_a_share_that_is_never_due_is_refused():
    for share in (1e-10, 2**-31, 0):
        with pytest.raises(ConfigError, match=r"at least 2\*\*-30.*Give None"):
            legato.Sample(share)
    assert legato.Sample(2**-30).share == 2**-30


def test_windows_are_checked():
    with pytest.raises(ConfigError, match="over='week'"):
        legato.Every(2, over="week")
    with pytest.raises(ConfigError, match="over=3"):
        legato.Sample(0.5, over=3)


class Parts(Classifier):
    """Its loss has parts, which are logged one by one."""

    loss = "total"

    def build_losses(self, labels, model_outputs, aux_losses=None):
        own = super().build_losses(labels, model_outputs)
        size = keras.ops.mean(keras.ops.square(model_outputs))
        return {"own": own, "size": size, "total": own + 0.01 * size}


class NoTotal(Parts):
    loss = "loss"


def test_the_parts_of_a_loss_are_logged(tmp_path):
    history, summaries = train(
        tmp_path / "run", Parts(), validation_interval="epoch"
    )
    for record in summaries:
        together = record["own"] + 0.01 * record["size"]
        assert record["total"] == pytest.approx(together, rel=1e-5)
    assert history["total"][-1] < history["total"][0]
    assert {"val_own", "val_size", "val_total"} <= set(history)


def test_a_loss_without_a_total_is_refused(tmp_path):
    with pytest.raises(StepError, match="'loss', the one that is minimised"):
        train(tmp_path / "run", NoTotal())


class Same(Classifier):
    """One dict for both: when says only what happens in training."""

    def build_metrics(self, training):
        return {
            keras.metrics.SparseCategoricalAccuracy(name="always"): (
                legato.Every()
            ),
            keras.metrics.SparseCategoricalAccuracy(name="rare"): (
                legato.Every(1000)
            ),
            keras.metrics.SparseCategoricalAccuracy(name="never"): None,
        }


def test_validation_updates_all_with_every_batch(tmp_path):
    history, _ = train(tmp_path / "run", Same(), validation_interval="epoch")
    assert "never" not in history and np.isnan(history["rare"]).all()
    assert history["val_always"] == history["val_rare"] == history["val_never"]


def test_a_run_begins_with_empty_metrics(tmp_path):
    features, labels = classes_data("train")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    metric = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    model.compile(
        keras.optimizers.SGD(0.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    found = []
    for name in ("first", "second"):
        history = legato.fit(
            model, features, labels, epochs=2, verbose=0,
            shuffle=False, run_dir=tmp_path / name,
            train_metrics={metric: legato.Every(over="summary")},
        )  # fmt: skip
        found.append(history.history["accuracy"])
        # What another fit or evaluation leaves behind.
        metric.update_state(np.full(900, 2), np.eye(3)[np.full(900, 2)])
    assert found[0] == found[1]


def test_zero_leaves_out_all_that_the_config_does_not_name(tmp_path):
    task = Labels(dict.fromkeys("ab", legato.Every()))
    _, summaries = train(
        tmp_path / "run", task, train_metrics_interval=0, train_metrics={"a": 2}
    )
    assert "a" in summaries[0] and "b" not in summaries[0]


class Coming(Labels):
    """Whose metrics come and go."""

    def __init__(self, names, thresholds=None):
        super().__init__({})
        self.drawn = keras.random.SeedGenerator(1)  # a variable of its own
        self.held = keras.metrics.Mean(name="held")
        self._chosen = lambda: (names, thresholds)

    def build_metrics(self, training):
        names, thresholds = self._chosen()
        made = {n: keras.metrics.Mean(name=n) for n in names}
        made |= {"held": self.held} if "held" in made else {}
        if thresholds:
            made["auc"] = keras.metrics.AUC(thresholds, name="auc")
        return [*made.values()]

    def process_metrics(self, metrics, labels, outputs):
        keras.random.uniform((), seed=self.drawn)
        for metric in metrics or ():
            labels = keras.ops.cast(labels, "float32")
            if metric.name == "auc":
                metric.update_state(labels > 0, keras.ops.sigmoid(labels))
            else:
                metric.update_state(labels)


@pytest.mark.parametrize(
    ("before", "after", "fresh"),
    [
        ([], ["a"], {"a"}),
        (["a"], ["b", "a"], {"b"}),
        (["a", "b"], ["b"], set()),
        (["a"], ["held", "a"], {"held"}),
        (["held", "a"], ["a"], set()),
        (["a"], [], set()),
    ],
)
@pytest.mark.parametrize("resume", ["auto", "override"])
def test_metrics_come_and_go(before, after, fresh, resume, tmp_path):
    def run(names, steps, **changes):
        return train(
            tmp_path / "run", Coming(names), train_steps=steps, **changes
        )

    run(before, 7)
    with pytest.raises(ExactnessError, match="metrics"):
        run(after, 10, exact="strict", resume=resume)
    with pytest.warns(ExactnessWarning, match="metrics") as warned:
        history, _ = run(after, 10, resume=resume)
    assert len([w for w in warned if w.category is ExactnessWarning]) == 1
    labels = classes_data("train")[1]
    for name in after:
        # Steps 6 and 7 were before it came.
        expected = labels[64:] if name in fresh else labels
        assert history[name][-1] == pytest.approx(expected.mean())


def test_a_metric_of_another_shape_begins_anew_and_is_named(tmp_path):
    def run(thresholds, steps):
        return train(
            tmp_path / "run", Coming(["a"], thresholds), train_steps=steps
        )

    run(50, 7)
    with pytest.warns(ExactnessWarning, match="metrics.auc.*begins anew"):
        history, _ = run(20, 10)
    labels = classes_data("train")[1]
    assert history["a"][-1] == pytest.approx(labels.mean())
    assert 0 <= history["auc"][-1] <= 1


class Named(Coming):
    """Whose one metric is of some kind."""

    def __init__(self, kind):
        super().__init__(["a"])
        self.kind = kind

    def build_metrics(self, training):
        return [self.kind(name="a")]


class Doubled(keras.metrics.Mean):
    """Twice the mean."""

    def result(self):
        return 2 * super().result()


def test_a_metric_of_another_kind_and_the_same_name_begins_anew(tmp_path):
    train(tmp_path / "run", Named(keras.metrics.Mean), train_steps=7)
    with pytest.warns(ExactnessWarning, match=r"metrics.*Mean.*Doubled"):
        history, _ = train(tmp_path / "run", Named(Doubled), train_steps=10)
    expected = classes_data("train")[1][64:].mean()  # steps 8 to 10
    assert history["a"][-1] == pytest.approx(2 * expected)


class HalfHeld(Coming):
    """Holds a metric that measures by itself."""

    def __init__(self, shape):
        super().__init__([])
        self.own = keras.metrics.Mean(name="own")
        self.own.add_variable(shape, "zeros", name="table")


def test_a_metric_that_fits_in_part_is_not_restored_in_part(tmp_path):
    train(tmp_path / "run", HalfHeld((2,)), train_steps=7)
    task = HalfHeld((3,))
    with pytest.warns(ExactnessWarning, match=r"metrics\.own.*begins anew"):
        train(tmp_path / "run", task, train_steps=10)


def test_training_metrics_of_one_name_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    metrics = {
        keras.metrics.MeanAbsoluteError(name="e"): legato.Every(1),
        keras.metrics.MeanSquaredError(name="e"): legato.Every(2),
    }
    with pytest.raises(ConfigError, match=r"metrics are named 'e'.*name="):
        legato.fit(
            model, np.ones((8, 2)), np.ones((8, 1)), verbose=0,
            train_metrics=metrics, run_dir=tmp_path / "run",
        )  # fmt: skip


def test_a_run_that_is_done_may_be_given_other_metrics(tmp_path):
    train(tmp_path / "run", Coming(["a"]), train_steps=10)
    with pytest.warns(ExactnessWarning, match="metrics"):
        train(tmp_path / "run", Coming(["held"]), train_steps=10)


def test_compiled_metrics_come_and_go(tmp_path):
    data = np.ones((40, 2), "float32"), np.ones((40, 1), "float32")

    def run(names, epochs):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        made = [Constant(name) for name in names]
        model.compile("sgd", "mse", metrics=made)
        return legato.fit(
            model, *data, batch_size=10, epochs=epochs, verbose=0,
            checkpoint_interval=3, run_dir=tmp_path / "run",
        ).history  # fmt: skip

    run("a", 1)
    with pytest.warns(ExactnessWarning, match="metrics.b,a"):
        history = run("ba", 2)
    assert history["a"][-1] == history["b"][-1] == 4.0


class Constant(keras.metrics.Metric):
    """The number of its updates."""

    def __init__(self, name):
        super().__init__(name=name)
        self.count = self.add_variable((), "zeros", name="count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.count.assign(self.count + 1.0)

    def result(self):
        return self.count + 0.0


def test_another_window_on_resume_is_named_and_begins_anew(tmp_path):
    def run(when, steps):
        return train(
            tmp_path / "run", Labels({"a": when}), train_steps=steps,
            checkpoint_interval=7,
        )  # fmt: skip

    run(legato.Every(over="batch"), 7)
    with pytest.warns(ExactnessWarning, match="metrics"):
        history, _ = run(legato.Every(), 10)
    labels = classes_data("train")[1]
    # What steps 6 and 7 left is not of its window.
    assert history["a"][-1] == pytest.approx(labels[64:].mean())
