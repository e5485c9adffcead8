"""What `legato.fit` adds to Keras's, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import threading
import warnings

import keras
import ml_dtypes
import numpy as np
import pytest

import legato
from legato import backends
from legato.checkpoint import load_checkpoint
from legato.errors import (
    ConfigError,
    DataError,
    ExactnessError,
    ExactnessWarning,
    Interrupted,
    LegatoError,
    LegatoWarning,
    RestoreError,
    RunDirError,
)
from legato.when import any_due
from tests.contracts.models import cross_entropy, mlp, points

X, Y = points()


def made(optimizer="sgd", metrics=("accuracy",), **options):
    model = mlp()
    model.compile(optimizer, cross_entropy(), metrics=list(metrics), **options)
    return model


def fit(model, run_dir, **arguments):
    arguments = {
        "x": X,
        "y": Y,
        "batch_size": 16,
        "epochs": 2,
        "verbose": 0,
        **arguments,
    }
    return legato.fit(model, **arguments, run_dir=run_dir)


def weights(model):
    return [np.array(w) for w in model.get_weights()]


def equal(ours, theirs):
    return all(map(np.array_equal, ours, theirs))


WITHOUT_TENSORFLOW = """
import sys

import keras
import legato
import numpy as np

x = np.ones((20, 4), "float32")
inputs = keras.Input((4,))
hidden = keras.layers.Dense(3, kernel_regularizer="l2")(inputs)
hidden = keras.layers.Dropout(0.1)(keras.layers.LayerNormalization()(hidden))
model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
rate = keras.optimizers.schedules.CosineDecay(0.1, 9)
model.compile(keras.optimizers.AdamW(rate), "mse", metrics=["mae"])
legato.fit(
    model, x, x[:, :1], epochs=2, batch_size=8, validation_split=0.2,
    verbose=0, run_dir=sys.argv[1],
)
others = {"tensorflow", "torch"} - {keras.config.backend()}
assert not others & {*sys.modules}
"""


@pytest.mark.skipif(
    keras.config.backend() == "tensorflow", reason="it is what computes"
)
def test_libraries_that_are_not_used_are_not_imported(tmp_path):
    # Seconds and hundreds of megabytes for whoever has them installed.
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, str(tmp_path)], check=True
    )


# -- metrics ------------------------------------------------------------------


class Spy(keras.metrics.Metric):
    """Counts how often it is traced."""

    traced = 0

    def __init__(self, name="spy"):
        super().__init__(name=name)
        self.total = self.add_variable((), "zeros", name="total")

    def update_state(self, y_true, y_pred, sample_weight=None):
        type(self).traced += 1
        self.total.assign_add(keras.ops.mean(y_pred))

    def result(self):
        return self.total.value


def programs(monkeypatch):
    """The programs of all steps that are traced from now on, as text."""
    seen = []
    compile_loop = backends.current().compile_loop

    def recording(*args, **options):
        loop = compile_loop(*args, **options)
        traced = getattr(loop, "_traced", None)
        if traced is not None:  # TensorFlow
            kinds = sorted(op.type for op in traced.graph.get_operations())
            seen.append(" ".join(kinds))
        return loop

    monkeypatch.setattr(
        type(backends.current()), "compile_loop", staticmethod(recording)
    )
    if keras.config.backend() == "jax":
        from legato.backends.jax import loop as jax_loop

        program = jax_loop.StepProgram

        def noting(closed, *args):
            seen.append(str(closed.jaxpr))
            return program(closed, *args)

        monkeypatch.setattr(jax_loop, "StepProgram", noting)
    return seen


def test_metrics_that_are_off_are_not_in_the_program(tmp_path, monkeypatch):
    seen = programs(monkeypatch)
    fit(made(metrics=[]), tmp_path / "without")
    without = list(seen)
    seen.clear()
    Spy.traced = 0
    model = made(metrics=["accuracy", Spy()])
    history = fit(model, tmp_path / "off", train_metrics=None)
    assert seen == without
    assert Spy.traced == 0
    assert not model.metrics[1].variables
    assert list(history.history) == ["loss"]
    arrays = load_checkpoint(tmp_path / "off" / "final").arrays
    assert not [path for path in arrays if path.startswith("metrics")]
    seen.clear()
    fit(made(metrics=["accuracy", Spy()]), tmp_path / "on")
    assert Spy.traced > 0
    assert seen != without or keras.config.backend() == "torch"


def test_losses_of_outputs_are_metrics_too(tmp_path):
    from tests.contracts.models import several_outputs

    kinds = [several_outputs(), several_outputs()]
    histories = [
        legato.fit(
            kind.model,
            **kind.data,
            epochs=2,
            shuffle=False,
            verbose=0,
            run_dir=tmp_path / str(number),
            train_metrics=train_metrics,
            validation_metrics=train_metrics,
        ).history
        for number, (kind, train_metrics) in enumerate(
            zip(kinds, ("compiled", None), strict=True)
        )
    ]
    assert list(histories[1]) == ["loss", "val_loss"]
    np.testing.assert_allclose(
        histories[0]["loss"], histories[1]["loss"], rtol=1e-6
    )
    assert equal(*(weights(kind.model) for kind in kinds))


def test_validation_may_measure_what_training_does_not(tmp_path):
    history = fit(
        made(metrics=[]),
        tmp_path / "run",
        validation_split=0.2,
        train_metrics=None,
        validation_metrics=["accuracy"],
    ).history
    assert list(history) == ["loss", "val_accuracy", "val_loss"]


class LabelMean(keras.metrics.Mean):
    """The mean label of the batches that it is given."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(keras.ops.cast(y_true, "float32"))


@pytest.mark.parametrize(
    "when", [legato.Every(1), legato.Every(4), legato.Sample(0.4)], ids=str
)
@pytest.mark.parametrize("compiled", [False, True])
def test_metrics_at_some_steps(when, compiled, tmp_path):
    metric = LabelMean(name="label")
    model = made(metrics=[metric] if compiled else [])
    history = fit(
        model,
        tmp_path / "run",
        epochs=3,
        batch_size=10,
        shuffle=False,
        train_metrics=when if compiled else {metric: when},
    ).history
    batches = Y.reshape(9, 10).astype("float64").mean(axis=1)
    for epoch in range(3):
        steps = np.arange(9 * epoch, 9 * epoch + 9)
        due = np.broadcast_to(when.is_due(steps), 9)
        assert any_due(when, steps[0], steps[-1] + 1) == due.any()
        np.testing.assert_allclose(
            history["label"][epoch], batches[due].mean(), rtol=1e-6
        )


class Groups(keras.metrics.Metric):
    """Its result is a dict, with a dict in it."""

    def __init__(self, name="groups"):
        super().__init__(name=name)
        self.total = self.add_variable((), "zeros", name="total")

    def update_state(self, y_true, y_pred, sample_weight=None):
        labels = keras.ops.cast(y_true, "float32")
        self.total.assign(self.total + keras.ops.sum(labels))

    def result(self):
        total = self.total + 0.0
        return {"a": total, "label": total * 2, "in": {"b": total * 3}}


def iou():
    return keras.metrics.MeanIoU(3, name="shared", sparse_y_pred=False)


def several(shared, weighted=False):
    """What `compile` takes; names clash, and objects are there twice."""
    given = {"metrics": [LabelMean(name="label"), Groups()]}
    if shared is not None:
        given["metrics"] += [shared, shared]
    if weighted:
        given["weighted_metrics"] = [shared, Groups()]
    return given


@pytest.mark.parametrize(
    "make",
    [
        lambda: several(None),
        lambda: several(LabelMean(name="shared")),
        lambda: several(LabelMean(name="shared"), weighted=True),
        lambda: several(iou()),
        lambda: several(Groups("shared"), weighted=True),
        lambda: {"metrics": [LabelMean(name="twice")] * 2},
    ],
)
def test_metrics_are_named_as_by_keras(make, tmp_path):
    arguments = {"epochs": 2, "batch_size": 15, "shuffle": False, "verbose": 0}
    known = {**arguments, "validation_data": (X, Y)}
    theirs = made(**make()).fit(X, Y, **known).history
    ours = fit(made(**make()), tmp_path / "run", **known).history
    assert sorted(ours) == sorted(theirs)
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-5)
    if "weighted_metrics" not in make():
        chosen = fit(
            made(metrics=[]),
            tmp_path / "chosen",
            **known,
            train_metrics=make()["metrics"],
            validation_metrics=make()["metrics"],
        ).history
        assert chosen == ours
    model = made(**make())
    assert sorted(legato.evaluate(model, (X, Y))) == sorted(
        model.evaluate(X, Y, verbose=0, return_dict=True)
    )


def test_groups_of_a_metric_at_some_steps(tmp_path):
    history = fit(
        made(metrics=[Groups()]),
        tmp_path / "run",
        epochs=3,
        train_metrics=legato.Every(10),
    ).history
    assert [*map(np.isnan, history["b"])] == [True, False, True]


def test_steps_are_written_as_in_a_config(tmp_path):
    whens = {"a": 2, "b": {"every": 2}, "c": legato.Every(2), "d": None}
    history = fit(
        made(metrics=[]),
        tmp_path / "run",
        train_metrics={LabelMean(name=k): when for k, when in whens.items()},
    ).history
    assert history["a"] == history["b"] == history["c"]
    assert "d" not in history


def test_a_metric_that_was_never_due_is_no_number(tmp_path):
    history = fit(
        made(), tmp_path / "run", epochs=3, train_metrics=legato.Every(10)
    ).history
    assert np.isnan(history["accuracy"][0])
    assert not np.isnan(history["accuracy"][1])
    assert np.isnan(history["accuracy"][2])


def test_a_sample_is_random_and_the_same_everywhere():
    steps = np.arange(100_000, dtype=np.int32)
    due = legato.Sample(0.25).is_due(steps)
    assert abs(due.mean() - 0.25) < 0.005
    assert abs(np.corrcoef(due[1:], due[:-1])[0, 1]) < 0.02
    assert list(np.flatnonzero(due)[:6]) == FIRST
    on_device = legato.Sample(0.25).is_due(
        keras.ops.convert_to_tensor(steps, "int32")
    )
    assert np.array_equal(keras.ops.convert_to_numpy(on_device), due)
    other = legato.Sample(0.25, seed=1).is_due(steps)
    assert abs(np.corrcoef(due, other)[0, 1]) < 0.02


FIRST = [5, 6, 9, 15, 25, 26]


# -- what hooks cost, and may do ----------------------------------------------


class Counting:
    """Counts how often values come from the device."""

    def __init__(self, monkeypatch):
        self.count = 0
        backend = type(backends.current())
        to_host = backend.to_host

        def counting(itself, *args):
            self.count += 1
            return to_host(itself, *args)

        monkeypatch.setattr(backend, "to_host", counting)


def test_nothing_is_fetched_at_each_step_without_batch_hooks(
    tmp_path, monkeypatch
):
    counting = Counting(monkeypatch)
    seen = []
    fit(
        made(),
        tmp_path / "run",
        epochs=4,
        batch_size=1,
        callbacks=[
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: seen.append(logs)
            ),
            keras.callbacks.EarlyStopping(monitor="loss", patience=9),
        ],
    )
    assert len(seen) == 4
    # 360 steps; the first calls are short, until their pace is known.
    assert counting.count < 30


def test_measuring_in_a_hook_leaves_the_metrics_of_training_alone(tmp_path):
    class Measuring(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.evaluate(X[:20], Y[:20], verbose=0)
            self.model.predict(X[:5], verbose=0)

    plain = fit(made(), tmp_path / "plain").history
    measured = fit(made(), tmp_path / "other", callbacks=[Measuring()]).history
    assert plain == measured


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_epoch_end"])
def test_an_exception_in_a_hook_leaves_a_usable_model(hook, tmp_path):
    class Failing(keras.callbacks.Callback):
        pass

    def fail(self, number, logs=None):
        if number == 1 + 2 * (hook == "on_train_batch_end"):
            raise RuntimeError("in the hook")

    setattr(Failing, hook, fail)
    model = made("adam")
    with pytest.raises(RuntimeError, match="in the hook"):
        fit(
            model,
            tmp_path / "run",
            checkpoint_interval=2,
            callbacks=[Failing()],
            epochs=3,
        )
    assert np.isfinite(model.predict(X, verbose=0)).all()
    assert "evaluate" not in vars(model)
    fit(model, tmp_path / "run", epochs=3, checkpoint_interval=2)
    whole = made("adam")
    fit(whole, tmp_path / "whole", epochs=3, checkpoint_interval=2)
    assert equal(weights(model), weights(whole))


def test_ctrl_c_and_then_predict(tmp_path):
    class Interrupting(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                os.kill(os.getpid(), signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    model = made("adam")
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(model, tmp_path / "run", epochs=4, callbacks=[Interrupting()])
    assert isinstance(caught.value, Interrupted)
    assert np.isfinite(model.predict(X, verbose=0)).all()
    model.evaluate(X, Y, verbose=0)
    history = fit(model, tmp_path / "run", epochs=4, callbacks=[Interrupting()])
    assert history.epoch == [0, 1, 2, 3]
    whole = made("adam")
    fit(whole, tmp_path / "whole", epochs=4)
    assert equal(weights(model), weights(whole))


def test_a_second_fit_goes_on_from_the_first(tmp_path):
    model = made("adam")
    first = fit(model, tmp_path / "first")
    second = fit(model, tmp_path / "second")
    assert second.history["loss"][0] < first.history["loss"][0]
    # Both again, as a script that is run again would do it.
    again = made("adam")
    assert fit(again, tmp_path / "first").history == first.history
    assert fit(again, tmp_path / "second").history == second.history
    assert equal(weights(model), weights(again))
    fresh = made("adam")
    fit(fresh, tmp_path / "third")
    assert fit(fresh, tmp_path / "fourth").history == second.history


def test_the_order_is_a_function_of_the_callers_seed(tmp_path):
    histories = []
    for number, seed in enumerate((1, 1, 2)):
        model = made()
        keras.utils.set_random_seed(seed)
        run = tmp_path / str(number)
        histories.append(fit(model, run, epochs=1).history)
    assert histories[0] == histories[1] != histories[2]


def test_a_longer_run_is_extended(tmp_path):
    model = made("adam")
    fit(model, tmp_path / "run", epochs=1)
    model = made("adam")
    history = fit(model, tmp_path / "run", epochs=3)
    whole = made("adam")
    assert fit(whole, tmp_path / "whole", epochs=3).history == history.history
    assert equal(weights(model), weights(whole))


# -- the rules of resume= -----------------------------------------------------


def test_resume_must_and_never(tmp_path):
    with pytest.raises(RunDirError, match="there is no checkpoint"):
        fit(made(), tmp_path / "run", resume="must")
    fit(made(), tmp_path / "run", resume="never")
    with pytest.raises(RunDirError, match="holds a run at step"):
        fit(made(), tmp_path / "run", resume="never")
    assert fit(made(), tmp_path / "run", resume="must").epoch == [0, 1]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: made("adam"), ["SGD", "Adam"]),
        (lambda: made(keras.optimizers.SGD(0.5)), ["learning_rate", "0.5"]),
    ],
)
def test_another_optimizer_is_refused_or_taken(make, names, tmp_path):
    fit(made(), tmp_path / "run", epochs=1)
    with pytest.raises(RestoreError) as caught:
        fit(make(), tmp_path / "run", epochs=2)
    assert all(name in str(caught.value) for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = fit(make(), tmp_path / "run", epochs=2, resume="override")
    assert history.epoch == [0, 1]


def test_another_loss_is_refused_or_taken(tmp_path):
    fit(made(), tmp_path / "run", epochs=1)
    model = mlp()
    model.compile("sgd", lambda y, out: keras.ops.mean(out**2))
    with pytest.raises(RestoreError, match="loss"):
        fit(model, tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, tmp_path / "run", resume="override")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 8}, "batch_size"),
        ({"shuffle": False}, "shuffle"),
        ({"x": X[:80], "y": Y[:80]}, "examples"),
        ({"x": X + 1}, "rows_sha256"),
        ({"class_weight": {0: 1, 1: 2, 2: 3}}, "data"),
        ({"initial_epoch": 1}, "initial_epoch"),
        ({"steps_per_epoch": 3}, "steps_per_epoch"),
    ],
)
def test_other_data_are_refused(changes, named, tmp_path):
    fit(made(), tmp_path / "run", epochs=1)
    with pytest.raises(RestoreError, match=named):
        fit(made(), tmp_path / "run", **{"epochs": 3, **changes})


def test_another_model_is_refused(tmp_path):
    fit(made(), tmp_path / "run", epochs=1)
    keras.utils.set_random_seed(1)
    wider = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(14, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )
    wider.compile("sgd", cross_entropy())
    before = weights(wider)
    with pytest.raises(RestoreError, match="units"):
        fit(wider, tmp_path / "run")
    assert equal(before, weights(wider))
    activation = mlp()
    activation.layers[0].activation = keras.activations.relu
    activation.compile("sgd", cross_entropy())
    with pytest.raises(RestoreError, match=r"tanh.*relu"):
        fit(activation, tmp_path / "run")


def test_callbacks_may_come_and_go(tmp_path):
    stopping = keras.callbacks.EarlyStopping(monitor="loss", patience=9)
    fit(made(), tmp_path / "run", epochs=1, callbacks=[stopping])
    history = fit(
        made(), tmp_path / "run", callbacks=[keras.callbacks.TerminateOnNaN()]
    )
    assert history.epoch == [0, 1]


def test_what_is_not_exact_is_refused_or_named(tmp_path, monkeypatch):
    fit(made(), tmp_path / "run", epochs=1)
    monkeypatch.setattr("legato.machine.usable_cpus", lambda: 977)
    with pytest.raises(ExactnessError, match="977"):
        fit(made(), tmp_path / "run", exact="strict")
    with pytest.warns(legato.errors.ExactnessWarning, match="977"):
        fit(made(), tmp_path / "run")


# -- bad input ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 2.5}, "epochs=2.5"),
        ({"initial_epoch": -1}, "initial_epoch=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"verbose": 7}, "verbose=7"),
        ({"validation_split": 1.5}, "validation_split=1.5"),
        ({"validation_metrics": ["accuracy"]}, "no validation data"),
        ({"validation_freq": 0}, "validation_freq"),
        ({"train_metrics": "accuracy"}, "train_metrics='accuracy'"),
        ({"train_metrics": 7}, "train_metrics=7"),
        ({"train_metrics": ["nonsense"]}, "train_metrics.*nonsense"),
        (
            {"train_metrics": {"accuracy": legato.Every(3), "mse": "x"}},
            "train_metrics: 'mse': 'x': it must be a number of steps",
        ),
        ({"train_metrics": {"accuracy": 0}}, "train_metrics: 'accuracy': Ev"),
        ({"train_metrics": {"accuracy": {}}}, "train_metrics: 'accuracy': {}"),
        (
            {"train_metrics": ["top_k_categorical_accuracy"]},
            "train_metrics",
        ),
        ({"checkpoint_interval": 0}, "checkpoint_interval"),
        ({"keep_last": 0}, "keep_last"),
        ({"exact": "yes"}, "exact"),
        ({"resume": "perhaps"}, "resume"),
        ({"x": None}, "x=None"),
        ({"y": Y[:-1]}, "different numbers of examples"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"callbacks": [keras.callbacks.EarlyStopping]}, "callbacks"),
        ({"callbacks": [keras.callbacks.BackupAndRestore("b")]}, "run_dir"),
        ({"callbacks": 3}, "callbacks is 3"),
        ({"callbacks": {"a": 3}}, r"callbacks\['a'\] is 3"),
        *(({"shuffle": s}, f"shuffle={s!r}") for s in ("bad", 5, "False", {})),
        ({"validation_data": (X, Y, Y, Y)}, "validation_data is a tuple of 4"),
        ({"validation_data": ()}, "validation_data is a tuple of 0"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    model = made()
    before = weights(model)
    with pytest.raises(LegatoError, match=message):
        fit(model, tmp_path / "run", **arguments)
    assert equal(before, weights(model))
    assert not [*(tmp_path / "run").glob("checkpoints/*")]


@pytest.mark.parametrize("run_dir", [None, 5, b"runs"])
def test_a_run_dir_that_is_no_path(run_dir):
    with pytest.raises(ConfigError, match=f"run_dir={run_dir!r}: .* a path"):
        fit(made(), run_dir)


@pytest.mark.parametrize("nested", ["alone", "dict", "list of lists", "list"])
def test_callbacks_as_keras_takes_them(nested, tmp_path):
    class Counts(keras.callbacks.Callback):
        epochs = 0

        def on_epoch_end(self, epoch, logs=None):
            self.epochs += 1

    counts = Counts()
    callbacks = {
        "alone": counts,
        "dict": {"mine": counts},
        "list of lists": [[counts]],
        "list": keras.callbacks.CallbackList([counts]),
    }[nested]
    fit(made(), tmp_path, callbacks=callbacks)
    assert counts.epochs == 2


def test_validation_data_are_tried_before_training(tmp_path):
    model = made()
    before = weights(model)
    with pytest.raises(ValueError, match="incompatible") as caught:
        fit(model, tmp_path, validation_data=(X[:, :-1], Y))
    note = "(These are the validation data: their inputs have the shapes (5,)"
    assert any(each.startswith(note) for each in caught.value.__notes__)
    assert equal(before, weights(model))
    assert not [*tmp_path.glob("checkpoints/*")]


def test_a_model_that_is_not_compiled(tmp_path):
    with pytest.raises(ConfigError, match="not compiled"):
        fit(mlp(), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"keras\.Model"):
        fit("a model", tmp_path / "run")


def test_metrics_of_a_model_with_its_own_step(tmp_path):
    from tests.contracts.models import own_step

    kind = own_step()
    with pytest.raises(ConfigError, match="defines train_step"):
        legato.fit(
            kind.model, **kind.data, train_metrics=None, run_dir=tmp_path / "a"
        )


def test_a_train_function_of_its_own_is_refused(tmp_path):
    class Own(keras.Sequential):
        def make_train_function(self, force=False):
            return None

    model = Own([keras.Input((6,)), keras.layers.Dense(3)])
    model.compile("sgd", cross_entropy())
    with pytest.raises(ConfigError, match="make_train_function"):
        fit(model, tmp_path / "run")


# -- evaluate -----------------------------------------------------------------


def test_evaluate_is_what_keras_measures(tmp_path):
    model = made("adam")
    fit(model, tmp_path / "run")
    theirs = model.evaluate(X, Y, return_dict=True, verbose=0)
    ours = legato.evaluate(model, (X, Y))
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    some = legato.evaluate(model, (X, Y), batch_size=16, steps=2)
    theirs = model.evaluate(X[:32], Y[:32], return_dict=True, verbose=0)
    assert some["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_evaluate_any_checkpoint_with_any_metric(tmp_path):
    model = made("adam", metrics=[])
    seen = []

    class Measuring(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(legato.evaluate(self.model, (X, Y), metrics=["acc"]))

    fit(model, tmp_path / "run", epochs=3, callbacks=[Measuring()])
    other = mlp()  # not even compiled
    before = weights(other)
    for epoch in range(3):
        step = 6 * (epoch + 1)
        found = legato.evaluate(
            other,
            (X, Y),
            metrics=["acc"],
            checkpoint=tmp_path / "run",
            which=step,
        )
        assert found["acc"] == seen[epoch]["acc"]
    newest = legato.evaluate(
        other, (X, Y), metrics=["acc"], checkpoint=tmp_path / "run"
    )
    assert newest["acc"] == seen[-1]["acc"]
    assert equal(before, weights(other))
    with pytest.raises(LegatoError, match="7"):
        legato.evaluate(model, (X, Y), checkpoint=tmp_path / "run", which=7)


def test_evaluate_refuses(tmp_path):
    with pytest.raises(ConfigError, match="not compiled"):
        legato.evaluate(mlp(), (X, Y))
    with pytest.raises(ConfigError, match="data=None"):
        legato.evaluate(made(), None)
    with pytest.raises(LegatoError, match="nowhere"):
        legato.evaluate(made(), (X, Y), checkpoint=tmp_path / "nowhere")
    with pytest.raises(DataError):
        legato.evaluate(made(), (X, Y[:3]))


def batches():
    """Others each time that it is asked."""
    for i in range(100):
        yield X[i % 4 * 16 :][:16], Y[i % 4 * 16 :][:16]


KEEPS = r"validation_data \(generator\).*first validation_steps=2 .*kept in me"


def test_a_generator_measures_the_same_each_time(tmp_path):
    """As arrays do that hold its first batches; also where it goes on."""
    wanted = fit(
        made(), tmp_path / "arrays", epochs=3, validation_data=(X[:32], Y[:32])
    ).history
    given = {"validation_data": batches(), "validation_steps": 2}
    with pytest.warns(LegatoWarning, match=KEEPS):
        found = fit(made(), tmp_path / "whole", epochs=3, **given).history
    assert found == wanted
    for epochs in (1, 3):
        given["validation_data"] = batches()  # as a new process does
        with pytest.warns(LegatoWarning, match=KEEPS):
            found = fit(made(), tmp_path / "run", epochs=epochs, **given)
    assert found.history == wanted


@pytest.mark.filterwarnings(f"ignore:{KEEPS}")
def test_a_generator_that_is_gone_on_in_is_named(tmp_path):
    given = {"validation_data": batches(), "validation_steps": 2}
    fit(made(), tmp_path, epochs=1, **given)
    named = "validation_data: the first batch is another one"
    with pytest.warns(ExactnessWarning, match=named):
        fit(made(), tmp_path, epochs=2, **given)


def test_inexact_validation_data_are_named(tmp_path):
    """As those of training are: what they measure is not the run's."""

    class Entropic(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return X[:16] + os.urandom(1)[0], Y[:16]

    given = {"validation_data": Entropic(), "epochs": 1}
    named = r"validation_data \(Entropic\): batch 0 was drawn twice"
    with pytest.warns(ExactnessWarning, match=named) as caught:
        fit(made(), tmp_path / "warned", **given)
    assert sum("drawn twice" in str(w.message) for w in caught) == 1
    with pytest.raises(ExactnessError, match=named):
        fit(made(), tmp_path / "strict", exact="strict", **given)


def test_a_generator_without_an_end_in_validation(tmp_path):
    with pytest.raises(DataError, match=r"validation_data.*validation_steps"):
        fit(made(), tmp_path / "run", validation_data=batches())
    with pytest.raises(DataError, match=r"data \(generator\).*give steps,"):
        legato.evaluate(made(), batches())
    assert not (tmp_path / "run").exists()


class Silent(keras.layers.Layer):
    """Adds a loss of its own."""

    def call(self, x):
        self.add_loss(keras.ops.mean(x**2))
        return x


class Reconstructs(keras.Sequential):
    def compute_loss(self, x, y, y_pred, *_, **__):
        return keras.ops.mean((x[:, :1] - y_pred[:, :1]) ** 2)


N = len(X)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"y": None}, r"^The training data hold no y, .*Give y, or batches"),
        ({"validation_data": (X,)}, r"^The validation data hold no y"),
        (
            {"sample_weight": {"a": np.ones(N)}},
            r"^The training data: sample_weight is a dict of \['a'\], .*single",
        ),
        (
            {"sample_weight": np.ones((N, 7))},
            r"sample_weight of shape \(16, 7\) .* of y of shape \(16, ?1?\): "
            r".*\. Give one weight for each example: shape \(examples,\)\.",
        ),
        (
            {"validation_data": (X, Y, np.ones((N, 7)))},
            r"^The validation data: sample_weight of shape \(16, 7\)",
        ),
    ],
)
def test_what_the_loss_cannot_be_computed_with(given, words, tmp_path):
    with pytest.raises(DataError, match=f"(?s){words}"):
        fit(made(), tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_needs_no_targets(tmp_path):
    """Or any weights, as Keras takes them."""
    model = keras.Sequential([keras.Input(X.shape[1:])])
    model.add(keras.layers.Dense(1))
    model.add(Silent())
    model.compile("sgd")
    assert fit(model, tmp_path / "added", y=None).history["loss"]
    own = Reconstructs([keras.Input(X.shape[1:]), keras.layers.Dense(1)])
    own.compile("sgd", "mse")
    assert fit(own, tmp_path / "own", y=None).history["loss"]
    weighted = {"sample_weight": {"any": np.ones((N, 7))}}
    assert fit(own, tmp_path / "any", **weighted).history["loss"]
    listed = {"sample_weight": [np.ones((N, 1, 1))]}
    assert fit(made(), tmp_path / "listed", **listed).history["loss"]


def table(**columns):
    import pandas as pd

    zeros = np.zeros(N, "float32")
    given = {"a": zeros, "b": zeros, "c": np.arange(N), **columns}
    return pd.DataFrame({k: pd.Series(v) for k, v in given.items()})


def series(values, dtype):
    import pandas as pd

    return pd.Series(values, dtype=dtype)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: {"x": table(b=X[:, 0] > 0)}, r"^x: the column 'b' is of dtype "
         r"bool, .*Give x\.astype\(\"float32\"\)"),
        (lambda: {"x": {"t": table(b=series([1, None] * (N // 2), "Int64"))}},
         r"^x\.t: the column 'b' is of dtype Int64.*Give x\.t\.astype"),
        (lambda: {"x": table(c=["u"] * N)}, r"^x: the column 'c' \(\w+\) holds "
         r"no numbers.*pandas\.factorize"),
        (lambda: {"y": series([1, None] * (N // 2), "Int64")},
         r"^y is of dtype Int64, .*Give y\.astype"),
        (lambda: {"y": series([0] * N, "boolean"), "class_weight": {0: 1}},
         r"^y is of dtype boolean"),
        (lambda: {"y": series(["u", "v"] * (N // 2), "category")},
         r"^y holds objects.*numbers, take .*Number the classes: np\.unique"),
        (lambda: {"y": np.array(["u"] * N)}, r"^y holds strings.*Number the"),
        (lambda: {"y": np.array(["u"] * N), "class_weight": {0: 1}},
         r"class_weight was given, and y holds strings.*np\.unique"),
        (lambda: {"sample_weight": np.array(["1"] * N)},
         r"^sample_weight holds strings, .*take \.astype"),
        (lambda: {"sample_weight": 2}, r"^sample_weight=2: there must be one "
         r"weight for each.*np\.full\(len\(x\), 2\.0\)"),
        (lambda: {"sample_weight": np.array(2.0)}, r"^sample_weight: The data "
         r"hold the scalar"),
        (lambda: {"x": lambda: batches(), "y": None, "batch_size": None},
         r"^x is a function, which is no data.*call it: x\(\)"),
        (lambda: {"validation_data": lambda: batches()},
         r"call it: validation_data\(\)"),
    ],
)  # fmt: skip
def test_arrays_of_no_numbers_are_named(given, words, tmp_path):
    with pytest.raises(DataError, match=f"(?s){words}"):
        fit(made(), tmp_path / "run", **given())
    assert not (tmp_path / "run").exists()


@pytest.mark.any_backend
def test_whatever_a_callback_adds_to_the_logs_ends_nothing(tmp_path):
    odd = {
        "bytes": b"x",
        "complex": 1j,
        "date": np.datetime64("2020-01-01"),
        "member": signal.SIGINT,
        "object": object(),
        "text": np.str_("x"),
        "half": np.zeros((), ml_dtypes.bfloat16),
    }
    adds = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(odd)
    )
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    legato.fit(
        model, np.zeros((4, 2)), np.zeros((4, 1)), run_dir=tmp_path / "run",
        callbacks=[adds], verbose=0,
    )  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[-1])
    assert record["member"] == 2 and record["text"] == "x"
    assert record["half"] == 0 and "x" in record["bytes"]
