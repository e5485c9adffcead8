"""What callbacks set in layers and optimizers: seen by steps, and saved."""

import enum
import json
from pathlib import Path

import keras
import numpy as np
import pytest

import legato
from legato.errors import DamagedError, ExactnessWarning
from legato.settings import ChangedSettings, Settings
from tests.linear import Linear


class Gain(keras.layers.Layer):
    """Looks at some of what it has."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.factor = 1.0
        self.notes = "nobody looks at these"
        self.calls = 0

    def call(self, x):
        self.calls += 1
        return self.factor * x


class Scaled(keras.losses.Loss):
    scale: float

    def __init__(self):
        super().__init__()
        self.scale = 3.0

    def call(self, y_true, y_pred):
        return self.scale * (y_true - y_pred)


CALLS = []


class Task(Linear):
    def build_model(self):
        return keras.Sequential(
            [
                keras.layers.Input((2,)),
                keras.layers.Dense(1, kernel_initializer="ones"),
                Gain(),
            ]
        )

    def build_inputs(self, split):
        x = np.ones((8, 2), "float32")
        return legato.ArraySource(
            (x, np.zeros((8, 1), "float32")), batch_size=4, shuffle=False
        )

    def build_losses(self, labels, model_outputs, aux_losses=None):
        return keras.ops.mean(keras.ops.square(labels - model_outputs))

    def train_step(self, batch, model, optimizer, metrics=None):
        CALLS.append(1)
        return super().train_step(batch, model, optimizer, metrics)


class At(keras.callbacks.Callback):
    """Does something at the end of an epoch."""

    def __init__(self, epoch, what):
        super().__init__()
        self.epoch, self.what = epoch, what

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            self.what(self.model)

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def train(run_dir, *what, epochs=3, **config):
    callbacks = [At(0, each) for each in what]
    trainer = legato.Trainer(
        Task(),
        run_dir=run_dir,
        config=legato.TrainerConfig(
            epochs=epochs,
            validation_interval="epoch",
            checkpoint_interval="epoch",
            **{"progress": "none", **config},
        ),
        callbacks=callbacks,
    )
    history = trainer.train()
    return trainer, history.history


def set_factor(value):
    def do(model):
        model.layers[1].factor = value

    return do


def clip(model):
    model.optimizer.clipnorm = 1e-3


def weights(trainer):
    return [np.array(w) for w in trainer.model.get_weights()]


def test_steps_and_validations_see_it(tmp_path):
    _, history = train(tmp_path, set_factor(0.0))
    # The epoch that ends when it is set has been validated.
    assert history["loss"][0] > 0 and history["val_loss"][0] > 0
    assert history["loss"][1:] == history["val_loss"][1:] == [0, 0]


def test_an_optimizer_sees_it(tmp_path):
    before, _ = train(tmp_path / "before", epochs=1)
    after, _ = train(tmp_path / "after", clip, epochs=2)
    moved = [
        a - b for a, b in zip(weights(after), weights(before), strict=True)
    ]
    # Two steps, each of the rate times the norm. (Not of both together: each
    # gradient is clipped by itself.)
    for each in moved:
        assert 0 < np.linalg.norm(each) <= 2 * 0.1 * 1e-3 * 1.001


def test_resuming_goes_on_with_it(tmp_path):
    whole, expected = train(tmp_path / "whole", clip, set_factor(0.5))
    train(tmp_path / "parts", clip, set_factor(0.5), epochs=1)
    # The callbacks have had their turn: only the checkpoint knows.
    trainer, history = train(tmp_path / "parts")
    assert trainer.optimizer.clipnorm == 1e-3
    assert trainer.model.layers[1].factor == 0.5
    assert history == expected
    for one, other in zip(weights(whole), weights(trainer), strict=True):
        assert one.tobytes() == other.tobytes()
    # And a third process, which did not set them either.
    trainer, _ = train(tmp_path / "parts", epochs=4)
    assert trainer.optimizer.clipnorm == 1e-3


def test_it_is_told(tmp_path, capsys):
    train(tmp_path, set_factor(0.25), progress="plain")
    lines = capsys.readouterr().err.splitlines()
    told = (
        "The training step is made anew: model/2_gain.factor is 0.25 (1.0)."
        in lines
    )
    # (Where Python runs at each step, nothing need be made anew.)
    assert told is (keras.config.backend() != "torch")


def test_what_no_step_looks_at_makes_no_step_anew(tmp_path):
    def do(model):
        model.layers[1].notes = "others"
        model.current_epoch = 3
        model.optimizer.note = 5

    counts = []
    for number, what in enumerate([(), (do,)]):
        CALLS.clear()
        train(tmp_path / str(number), *what, torch_compile=False)
        counts.append(len(CALLS))
    assert counts[0] == counts[1]


def test_what_the_steps_python_counts_makes_no_step_anew(tmp_path):
    one = []
    for epochs in (2, 4):
        CALLS.clear()
        train(tmp_path / str(epochs), epochs=epochs)
        one.append(len(CALLS))
    # (`Gain` counts its calls, in validation too.)
    assert one[0] == one[1] or keras.config.backend() == "torch"


def test_what_cannot_be_saved_is_named(tmp_path):
    factor = keras.ops.ones((1,))
    with pytest.warns(ExactnessWarning, match=r"2_gain\.factor was set to"):
        train(tmp_path, set_factor(factor), epochs=1)


def test_a_program_without_them_is_told(tmp_path):
    settings = ChangedSettings()
    settings.begin({"model": Task().build_model()})
    audit = settings.set_state({"model/9_gone": {"rate": 0.5}})
    assert [(each.name, each.status) for each in audit] == [
        ("", "restored"),
        ("model/9_gone.rate", "missing"),
    ]


class Keeps(keras.layers.Layer):
    """Leaves what it computed in validation, perhaps a tracer, lying about."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.last = 0.0
        self.none = None

    def call(self, x, training=False):
        if not training:
            self.last, self.none = x, x
        return x


class Reads(Keeps):
    def read(self):
        return self.last, self.none


@pytest.mark.parametrize("layer", [Keeps, Reads])
def test_what_a_trace_leaves_ends_no_run(layer, tmp_path, monkeypatch):
    build_model = Task.build_model

    def build(task):
        model = build_model(task)
        model.add(layer())
        return model

    monkeypatch.setattr(Task, "build_model", build)
    # (It is told where something looks at it.)
    exact = "strict" if layer is Keeps else "off"
    train(tmp_path, exact=exact)


class Mode(enum.IntEnum):
    A = 1


@pytest.mark.any_backend
def test_what_only_looks_plain_is_not_saved():
    model = Task().build_model()
    changed = ChangedSettings()
    changed.begin({"model": model})
    model.layers[1].factor = Mode.A
    assert changed.get_state() == {}
    assert "2_gain.factor was set to <Mode.A: 1>" in changed.inexact


@pytest.mark.any_backend
def test_metrics_have_settings():
    metric = keras.metrics.Precision(top_k=1)
    changed = ChangedSettings()
    changed.begin({"metrics": {metric: legato.Every(2)}}, [metric])
    metric.top_k = 3
    assert changed.get_state() == {"metrics/0": {"top_k": 3}}


@pytest.mark.any_backend
def test_which_count():
    model = Task().build_model()
    model.add(keras.layers.Dropout(0.25, name="drop"))
    model.add(keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2()))
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(
            keras.optimizers.schedules.ExponentialDecay(0.5, 3, 0.5),
            momentum=0.5,
        )
    )
    settings = Settings(
        {
            "model": model,
            "optimizer": optimizer,
            "task": {"losses": {"own": Scaled()}, "data": [1.0] * 1000},
        }
    )
    values = settings.read()
    assert values["model/2_gain"].keys() == {"factor", "calls"}
    assert "built" not in values["model/4_dense"]
    assert values["model/3_dropout"]["rate"] == 0.25
    assert values["model/4_dense/kernel_regularizer"]["l2"] == 0.01
    inner = values["optimizer/inner_optimizer"]
    assert inner["momentum"] == 0.5 and inner["clipnorm"] is None
    decay = values["optimizer/inner_optimizer/_learning_rate"]
    assert decay["decay_steps"] == 3
    assert values["task/losses/own"]["scale"] == 3.0
    assert "model" not in values or "stop_training" not in values["model"]


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "value", [1e-3, float("inf"), True, 3, "text", None, np.float32(0.1)]
)
def test_values_come_back_as_they_were(value):
    model = Task().build_model()
    changed = ChangedSettings()
    changed.begin({"model": model})
    model.layers[1].factor = value
    state = changed.get_state()
    again = Task().build_model()
    fresh = ChangedSettings()
    fresh.begin({"model": again})
    fresh.set_state(state)
    found = again.layers[1].factor
    assert type(found) is type(value) and repr(found) == repr(value)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "state",
    [
        [],
        {"model/2_gain": 3},
        {"model/2_gain": {"factor": [1]}},
        {"model/2_gain": {"factor": {"dtype": "nonsense", "value": 1}}},
        {"model/2_gain": {"factor": {"dtype": "float32", "value": "x"}}},
        {"model/2_gain": {"factor": {"value": 1}}},
    ],
    ids=json.dumps,
)
def test_damaged(state):
    settings = ChangedSettings()
    settings.begin({"model": Task().build_model()})
    with pytest.raises(DamagedError, match="settings"):
        settings.set_state(state)


def test_settings_are_in_the_checkpoint(tmp_path):
    train(tmp_path, clip)
    (newest,) = sorted(Path(tmp_path, "checkpoints").glob("step_*"))[-1:]
    host = json.loads((newest / "host.json").read_bytes())
    clipnorm = {"~f": (1e-3).hex()}
    assert host["settings"]["optimizer"] == {"clipnorm": clipnorm}
