"""Metrics on the host: what they are given, when they fail, what they cost."""

import json
import os
import signal
import threading
import time
import traceback

import keras
import numpy as np
import pytest

import legato
from legato.backends import scope
from legato.errors import (
    ConfigError,
    ExactnessWarning,
    LegatoWarning,
    StepError,
    Stopped,
    SummaryError,
)
from tests.contracts.scenarios import Classifier, Measured, classes_data
from tests.waiting import until


class Kept(legato.HostMetric):
    """Keeps what it is given."""

    def __init__(self, name=None):
        super().__init__(name)
        self.resets = []

    def reset_state(self):
        self.resets.append(1)
        self.calls = []

    def update_state(self, labels, outputs, **more):
        self.calls.append((labels, outputs, more))
        self.thread = threading.current_thread()

    def result(self):
        return {f"{self.name}_batches": len(self.calls)}


class Measuring(Classifier):
    """With given metrics for validation."""

    def __init__(self, *metrics):
        self._metrics = lambda: list(metrics)

    def build_metrics(self, training):
        return [] if training else self._metrics()


def make(run_dir, task, **changes):
    config = {
        "train_steps": 10,
        "validation_interval": 5,
        "summary_interval": 0,
        "progress": "none",
        **changes,
    }
    return legato.Trainer(
        task, run_dir=run_dir, config=legato.TrainerConfig(**config)
    )


def test_it_is_given_every_example_in_order_as_numpy(tmp_path):
    metric = Kept()
    trainer = make(tmp_path / "run", Measuring(metric))
    trainer.train()
    assert metric.name == "kept"
    assert len(metric.resets) == 2
    assert metric.thread is not threading.main_thread()
    features, labels = classes_data("validation")
    sizes = [len(call[0]) for call in metric.calls]
    assert sizes == [32, 13]  # with the partial batch
    for call in metric.calls:
        assert all(type(array) is np.ndarray for array in call[:2])
    np.testing.assert_array_equal(
        np.concatenate([call[0] for call in metric.calls]), labels
    )
    np.testing.assert_allclose(
        np.concatenate([call[1] for call in metric.calls]),
        keras.ops.convert_to_numpy(trainer.model(features)),
        rtol=1e-5,
        atol=1e-6,
    )


class Passing(Measuring):
    """Its step hands over nested things, more than once, and plain data."""

    def process_metrics(self, metrics, labels, outputs):
        for metric in metrics or ():
            half = keras.ops.cast(outputs, "bfloat16")
            metric.update_state({"y": [labels, None]}, (half,), note="first")
            metric.update_state(labels, outputs, weights=labels * 2)


def test_nested_arguments_arrive_as_they_were(tmp_path):
    metric = Kept()
    make(tmp_path / "run", Passing(metric)).train()
    labels = classes_data("validation")[1]
    first, second = metric.calls[:2]
    np.testing.assert_array_equal(first[0]["y"][0], labels[:32])
    assert first[0]["y"][1] is None
    assert first[1][0].dtype == np.float32  # NumPy knows no bfloat16
    assert first[2] == {"note": "first"}
    np.testing.assert_array_equal(second[2]["weights"], 2 * labels[:32])


def test_results_are_logged_with_their_groups(tmp_path):
    trainer = make(tmp_path / "run", Measured(), summary_interval=4)
    history = trainer.train().history
    names = {
        "val_accuracy",
        "val_seen",
        "val_errors/mean",
        "val_errors/at",
        *(f"val_recall/class_{k}" for k in range(3)),
    }
    assert names <= set(history)
    assert history["val_seen"] == [45.0, 45.0]
    assert history["val_errors/at"] == [5.0, 10.0]
    logs = trainer.evaluate()
    assert logs["errors"]["mean"] == pytest.approx(1 - logs["accuracy"])
    features, labels = classes_data("validation")
    found = keras.ops.convert_to_numpy(trainer.model(features)).argmax(-1)
    for k in range(3):
        right = (found == labels)[labels == k].mean()
        assert logs["recall"][f"class_{k}"] == pytest.approx(right)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    last = [r for r in map(json.loads, lines) if r["kind"] == "validation"][-1]
    assert last["recall/class_1"] == logs["recall"]["class_1"]


class Fails(Kept):
    def __init__(self, where):
        super().__init__("fails")
        self.where = where

    def update_state(self, labels, outputs):
        super().update_state(labels, outputs)
        if self.where == "update":
            self.divide()

    def result(self):
        if self.where == "result":
            self.divide()
        return {}

    def divide(self):
        return 1 // 0


@pytest.mark.any_backend
@pytest.mark.parametrize("where", ["update", "result"])
def test_an_error_ends_validation_with_its_own_traceback(where, tmp_path):
    before = threading.active_count()
    trainer = make(tmp_path / "run", Measuring(Fails(where)))
    with pytest.raises(ZeroDivisionError) as caught:
        trainer.train()
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert frames[-1].name == "divide"
    # (A pool of the feed's may stay; other tests' threads may end.)
    until(lambda: threading.active_count() <= before + 1)
    assert "legato-host-metrics" not in {t.name for t in threading.enumerate()}


class SlowStep(Measuring):
    """Each batch of its validation takes its time on the "device"."""

    def build_inputs(self, split):
        batch_size = 1 if split == "validation" else 32
        return SlowSource(classes_data(split), batch_size=batch_size)


class SlowSource(legato.ArraySource):
    def iterate(self, **arguments):
        iterator = super().iterate(**arguments)
        if self.full_batch_size == 1:
            next_chunk = iterator.next_chunk

            def slowly(most):
                chunk = next_chunk(most)
                time.sleep(0.01 * chunk.num_batches)
                return chunk

            iterator.next_chunk = slowly
        return iterator


class Counting(SlowStep):
    """Counts the batches that are drawn.

    Args:
        drawn: how many, from the last beginning on: a list of one number.
    """

    def __init__(self, drawn):
        super().__init__()
        self._drawn = drawn

    def build_inputs(self, split):
        source = super().build_inputs(split)
        iterate, drawn = source.iterate, self._drawn

        def counted(**arguments):
            drawn[0] = 0
            iterator = iterate(**arguments)
            next_chunk = iterator.next_chunk

            def some(most):
                chunk = next_chunk(most)
                drawn[0] += chunk.num_batches
                return chunk

            iterator.next_chunk = some
            return iterator

        source.iterate = counted
        return source


@pytest.mark.filterwarnings("ignore::legato.errors.LegatoWarning")
def test_it_runs_beside_the_rest(tmp_path):
    drawn, seen = [0], []

    class Waits(Kept):
        """For the next batch to be drawn: in vain, if they took turns."""

        def update_state(self, labels, outputs):
            super().update_state(labels, outputs)
            until(lambda: drawn[0] > min(len(self.calls), 44))
            seen.append(len(labels))

    make(tmp_path / "run", Counting(drawn)).evaluate(metrics=[Waits()])
    assert seen == [1] * 45


@pytest.mark.filterwarnings("ignore::legato.errors.LegatoWarning")
def test_few_batches_wait(tmp_path):
    drawn, seen = [0], []

    class Late(Kept):
        def update_state(self, labels, outputs):
            super().update_state(labels, outputs)
            time.sleep(0.01)
            seen.append(drawn[0] - len(self.calls))

    make(tmp_path / "run", Counting(drawn)).evaluate(metrics=[Late()])
    assert len(seen) == 45
    # Those of a call wait for it, and for the one before; or four single ones.
    assert max(seen) <= 11


class ManyKinds(Measuring):
    """Hands over tensors of many dtypes and shapes, of several batches."""

    def __init__(self, *metrics, convolves=False):
        super().__init__(*metrics)
        self.convolves = convolves

    def build_model(self):
        layers = keras.layers
        if not self.convolves:
            return super().build_model()
        return keras.Sequential(
            [
                keras.Input((8,)),
                layers.Reshape((8, 1)),
                layers.Conv1D(4, 3),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )

    def build_inputs(self, split):
        return legato.ArraySource(
            classes_data(split), batch_size=4, shuffle=split == "train"
        )

    def process_metrics(self, metrics, labels, outputs):
        ops = keras.ops
        for metric in metrics or ():
            more = {
                "scalar": ops.sum(outputs),
                "whole": ops.cast(labels, "uint8"),
                "half": ops.cast(outputs, "bfloat16"),
                "truth": labels > 0,
                "none": ops.zeros((0, 3)),
            }
            metric.update_state(labels, outputs, **more)


@pytest.mark.parametrize("kind", ["small", "large", "convolves"])
def test_batches_come_one_by_one(kind, tmp_path, monkeypatch):
    """Whether the device takes one in a call, or several."""
    if kind == "large":
        monkeypatch.setattr(scope, "_OUTPUT_BYTES", 300)
    kept = Kept()
    task = ManyKinds(kept, convolves=kind == "convolves")
    trainer = make(tmp_path / "run", task)
    trainer.train()
    features, labels = classes_data("validation")
    outputs = keras.ops.convert_to_numpy(trainer.model(features))
    assert [len(call[0]) for call in kept.calls] == [4] * 11 + [1]
    for k, (own_labels, own_outputs, more) in enumerate(kept.calls):
        batch = slice(4 * k, 4 * k + 4)
        np.testing.assert_array_equal(own_labels, labels[batch])
        np.testing.assert_allclose(
            own_outputs, outputs[batch], rtol=1e-5, atol=1e-6
        )
        assert type(more["scalar"]) is np.ndarray
        assert more["scalar"].shape == ()
        # (A sum that cancels is as exact as its parts.)
        exact = 1e-5 * float(np.abs(own_outputs).sum())
        assert more["scalar"] == pytest.approx(own_outputs.sum(), abs=exact)
        assert more["whole"].dtype == np.uint8
        np.testing.assert_array_equal(more["whole"], own_labels)
        np.testing.assert_allclose(more["half"], own_outputs, rtol=1e-2)
        np.testing.assert_array_equal(more["truth"], own_labels > 0)
        assert more["none"].shape == (0, 3)


def test_fit_and_evaluate_take_them(tmp_path):
    features, labels = classes_data("train")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    model.compile(
        "sgd",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    kept = Kept()
    history = legato.fit(
        model,
        features,
        labels,
        validation_data=classes_data("validation"),
        validation_metrics=["accuracy", kept],
        verbose=0,
        run_dir=tmp_path / "run",
    ).history
    assert history["val_kept_batches"] == [2.0]
    assert set(history) == {
        "accuracy", "loss", "val_accuracy", "val_kept_batches", "val_loss"
    }  # fmt: skip
    logs = legato.evaluate(model, (features, labels), metrics=kept)
    assert logs["kept_batches"] == 5.0
    with pytest.raises(ConfigError, match="measure in validation only"):
        legato.fit(
            model, features, labels, train_metrics=[kept],
            run_dir=tmp_path / "other",
        )  # fmt: skip
    with pytest.raises(ConfigError, match="given all outputs"):
        legato.evaluate(model, (features, labels), metrics={"dense": [kept]})


class Unnamed(legato.HostMetric):
    def __init__(self):
        pass

    def update_state(self, labels, outputs): ...

    def result(self):
        return {}

    def reset_state(self): ...


class Returns(Unnamed):
    def __init__(self, value, name="returns"):
        legato.HostMetric.__init__(self, name)
        self.value = value

    def result(self):
        return self.value


class Both(Measuring):
    def build_metrics(self, training):
        return self._metrics()


class Halfway(Classifier):
    def aggregate_logs(self, state, step_logs):
        return None


class Odd(Classifier):
    def build_metrics(self, training):
        return [] if training else [Kept()]

    def process_metrics(self, metrics, labels, outputs):
        for metric in metrics or ():
            metric.update_state(labels, lambda: outputs)


def test_half_precision_is_a_number(tmp_path):
    half = keras.ops.cast(1.5, "bfloat16")
    task = Measuring(Returns({"a": half, "b": [half]}))
    history = make(tmp_path / "run", task).train().history
    assert history["val_a"][-1] == 1.5
    assert history["val_b"][-1] == [1.5]


def test_what_is_masked_is_not_known(tmp_path):
    array = np.ma.masked_array([1, 2], [False, True])
    results = {"a": np.ma.masked, "b": array, "c": [np.str_("cat")]}
    task = Measuring(Returns(results))
    history = make(tmp_path / "run", task, sinks=[]).train().history
    assert np.isnan(history["val_a"][-1])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[-2])
    assert record["kind"] == "validation" and record["c"] == ["cat"]
    np.testing.assert_array_equal(record["b"], [1.0, np.nan])


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("task", "error", "words"),
    [
        (Measuring(Unnamed()), ConfigError, r"super\(\).__init__"),
        (Measuring(Kept(), Kept()), ConfigError, "two metrics named 'kept'"),
        (Both(Kept()), ConfigError, "measure in validation only"),
        (Measuring(Returns(0.5)), StepError, "dict of results by name"),
        (Measuring(Returns({1: 2.0})), StepError, "dict of results by name"),
        (
            Measuring(Returns({"a": 1}), Returns({"a": 2}, "other")),
            StepError,
            "a host metric returned too",
        ),
        (
            Measuring(
                keras.metrics.SparseCategoricalAccuracy(name="a"),
                Returns({"a": 1}),
            ),
            StepError,
            "returned a, and so do",
        ),
        (Measuring(Returns({"loss": -1})), StepError, "returned loss, and so"),
        (
            Measuring(Returns({"a": 10**400})),
            StepError,
            r"the metric 'returns'\) returned 'a', a number of 1329 bits",
        ),
        (
            Measuring(Returns({"b": {"a": [np.datetime64("2020-01-01")]}})),
            StepError,
            "the metric 'returns'.*returned 'a', of dtype datetime64",
        ),
        (Measuring(Returns({"": 7})), StepError, "that is not empty"),
        (Measuring(Returns({"a\ud800": 7})), StepError, "Unicode text"),
        (
            Measuring(Returns({"a": object()})),
            SummaryError,
            "'a' is a object: it must be",
        ),
        (Measuring(Returns({"step": 7})), StepError, "each record of the logs"),
        (Halfway(), StepError, "but not reduce_aggregated_logs"),
        (Odd(), StepError, "tensors and plain data"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_use_is_refused(task, error, words, tmp_path):
    with pytest.raises(error, match=words):
        make(tmp_path / "run", task).train()


@pytest.mark.parametrize("name", ["", 3])
def test_names_are_checked(name):
    with pytest.raises(ConfigError, match="name="):
        Kept(name)


def test_in_a_step_it_can_only_be_updated(tmp_path):
    class Reads(Measuring):
        def process_metrics(self, metrics, labels, outputs):
            for metric in metrics or ():
                metric.result()

    with pytest.raises(StepError, match=r"'kept'.*result"):
        make(tmp_path / "run", Reads(Kept())).train()


class Draws(Kept):
    """Measures with random numbers: of NumPy's own generator, and PyTorch's."""

    def reset_state(self):
        super().reset_state()
        self.drawn = 0.0

    def update_state(self, labels, outputs):
        super().update_state(labels, outputs)
        self.drawn = np.random.random()
        if keras.config.backend() == "torch":
            import torch

            self.drawn += float(torch.rand(()))

    def result(self):
        return {"drawn": self.drawn}


class Signals(Draws):
    """Asks the run to stop, once, in the midst of a validation."""

    def __init__(self, validation):
        super().__init__("draws")
        self.at = [validation]

    def update_state(self, labels, outputs):
        super().update_state(labels, outputs)
        if len(self.resets) in self.at:
            self.at.clear()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)


class Dropped(Measuring):
    def build_model(self):
        return keras.Sequential(
            [
                keras.Input((8,)),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(3),
            ]
        )


def test_what_is_drawn_in_a_validation_that_is_broken_off(tmp_path):
    def run(name, metric):
        run_dir = tmp_path / name
        for _ in range(2):
            trainer = make(run_dir, Dropped(metric), train_steps=20)
            try:
                trainer.train()
                break
            except Stopped:
                metric = Draws("draws")
        else:
            pytest.fail("it did not end")
        return (run_dir / "metrics.jsonl").read_text()

    in_peace = run("in_peace", Draws("draws"))
    assert run("stopped", Signals(2)) == in_peace


@pytest.mark.any_backend
def test_a_signal_is_honoured_while_a_metric_hangs(tmp_path):
    let_go = threading.Event()

    class Hangs(Signals):
        def update_state(self, labels, outputs):
            super().update_state(labels, outputs)
            let_go.wait(600)

    began = time.perf_counter()
    trainer = make(tmp_path / "run", Measuring(Hangs(1)))
    with (
        pytest.warns(LegatoWarning, match="the metric 'draws' still runs"),
        pytest.raises(Stopped),
    ):
        trainer.train()
    assert time.perf_counter() - began < 60  # (it compiles, too)
    let_go.set()


class Remembers(Kept):
    def __init__(self):
        super().__init__()
        self.best = 0.0

    def result(self):
        self.best += 1
        return {"best": self.best}


def test_what_no_checkpoint_holds_is_named(tmp_path):
    with pytest.warns(ExactnessWarning, match=r"remembers\.best"):
        make(tmp_path / "run", Measuring(Remembers())).train()


class Weighted(Kept):
    def update_state(self, labels, outputs, sample_weight=None):
        self.calls.append(sample_weight)

    def result(self):
        return {"weight": float(np.sum(np.concatenate(self.calls)))}


def test_those_that_take_weights_get_them():
    features, labels = classes_data("validation")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    weights = np.linspace(0, 1, len(labels)).astype("float32")
    kept = Kept()
    logs = legato.evaluate(
        model,
        (features, labels, weights),
        metrics=[Weighted("weighted"), kept],
    )
    assert logs["weight"] == pytest.approx(weights.sum())
    assert kept.calls[0][2] == {}


class UsesKeras(Kept):
    """Another network and unseeded randomness, as metrics of images do."""

    def update_state(self, labels, outputs):
        noise = keras.random.normal((2,))
        keras.ops.cond(noise[0] > 0, lambda: noise, lambda: -noise)
        keras.random.dropout(keras.ops.ones((3,)), 0.5)
        super().update_state(labels, outputs)
        time.sleep(0.002)


@pytest.mark.any_backend
def test_keras_works_in_them_as_elsewhere(tmp_path):
    trainer = make(tmp_path / "run", SlowStep(UsesKeras()))
    trainer.train()
    for _ in range(3):
        trainer.evaluate()


class Lists(Kept):
    def result(self):
        return {
            "row": [np.float32(1), 2],
            "names": ["a", "b"],
            "matrix": [np.arange(2), np.arange(2)],
        }


@pytest.mark.any_backend
def test_lists_of_numbers_are_logs_and_others_are_not(tmp_path):
    history = make(tmp_path / "run", Measuring(Lists())).train().history
    assert history["val_row"] == [[1.0, 2.0], [1.0, 2.0]]
    assert "val_names" not in history and "val_matrix" not in history


@pytest.mark.any_backend
@pytest.mark.parametrize("progress", ["plain", "rich"])
def test_matrices_are_not_shown(tmp_path, progress, capsys):
    metrics = [legato.metrics.ConfusionMatrix(3), Lists()]
    task = Measuring(*metrics)
    history = make(tmp_path / "run", task, progress=progress).train().history
    assert np.shape(history["val_confusion_matrix"]) == (2, 3, 3)
    assert "[" not in capsys.readouterr().out.replace("[2K", "")
