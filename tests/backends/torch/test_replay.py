"""Steps replayed without Python: the same bits, and never out of date."""

import types

import keras
import numpy as np
import pytest
import torch
from keras import ops
from tests.contracts import runs
from tests.contracts.fit_scenarios import FIT_SCENARIOS
from tests.contracts.scenarios import SCENARIOS, Classifier

import legato
from legato.backends.torch import recording, replay, views

# Training steps of these ask Python for the value of a tensor, or are
# PyTorch's own.
NEVER = {
    *("gan", "vae", "half_precision", "accumulation", "averages"),
    *("conditional", "recovering", "fit/loss_scale", "fit/accumulation"),
    *("fit/own_step", "fit/own_train_step", "fit/own_metrics"),
    "fit/adversaries",
}
# The steps of others once more, with data from elsewhere, or with callbacks.
ALIKE = {
    *("board", "scheduled", "fit/csv_logger", "fit/data_loader"),
    *("fit/epochs_of_steps", "fit/grain", "fit/plateau", "fit/py_dataset"),
    *("fit/shuffle", "fit/tells", "fit/tf_data", "fit/tf_data_told"),
}
NAMES = [
    name
    for name in (*SCENARIOS, *(f"fit/{each}" for each in FIT_SCENARIOS))
    if name not in ALIKE
]


@pytest.fixture(autouse=True)
def early(monkeypatch):
    monkeypatch.setattr(replay, "AFTER_STEPS", 2)


@pytest.fixture
def replayed(monkeypatch):
    """How many steps each replay ran."""
    counts = []
    call = replay.Replay.__call__

    def counted(self, values, operands, at):
        counts.append(len(at))
        return call(self, values, operands, at)

    monkeypatch.setattr(replay.Replay, "__call__", counted)
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits(name, tmp_path, replayed):
    for way in ("python", "replayed"):
        keras.utils.set_random_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            if way == "python":
                patch.setattr(replay, "AFTER_STEPS", 10**9)
            runs.train_here(name, tmp_path / way, {"keep_last": None})
        assert way == "replayed" or not sum(replayed)
    found, compared = runs.differences(tmp_path / "python", tmp_path / way)
    assert not found
    assert compared
    assert sum(replayed) or name in NEVER


def test_a_step_is_recorded_once(tmp_path, monkeypatch):
    """In a call of many steps too, of which the first ones are Python's."""
    made = []
    record = recording.Recording

    def recorded(*arguments):
        made.append(arguments)
        return record(*arguments)

    monkeypatch.setattr("legato.backends.torch.recording.Recording", recorded)
    fit_with("nothing", tmp_path)
    assert len(made) == 1


def view_of_views(x):
    y = x * 2
    z = y.detach().t().unsqueeze(0).permute(2, 0, 1)  # one view
    same = y.t().t()  # none
    return [z + 1, same * 3, y[1:].t() + 1]


def recorded_views():
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.arange(12.0).reshape(3, 4)
    return x, make_fx(view_of_views, tracing_mode="fake")(x)


def operations(module):
    return [str(n.target) for n in module.graph.nodes if n.op[:4] == "call"]


def test_views_of_views_are_one_view():
    x, recorded = recorded_views()
    program = views.WithoutViews(recorded)
    wanted = view_of_views(x)
    for _ in range(2):
        found = program(x)
        assert all(map(torch.equal, found, wanted))
    names = operations(program._run)
    assert names.count("aten.as_strided.default") == 1
    assert len(names) == len(operations(recorded)) - 5


def test_views_stay_where_tensors_lie_otherwise():
    """Than the recording, which saw no real ones, has it."""
    x, recorded = recorded_views()
    program = views.WithoutViews(recorded)
    (name,) = program._first._expected  # of the product
    program._first._expected[name] = (3, 4), (1, 3)
    wanted = view_of_views(x)
    for _ in range(2):
        assert all(map(torch.equal, program(x), wanted))
    assert operations(program._run) == operations(recorded)


class Tuned(keras.layers.Layer):
    """Python values of all kinds decide what it does."""

    def __init__(self):
        super().__init__()
        self.scale = 1.0
        self.table = {"scale": [1.0]}
        self.settings = types.SimpleNamespace(scale=1.0)

    def call(self, x):
        factor = self.scale * self.table["scale"][0] * self.settings.scale
        return x * factor * SETTINGS.scale * _scale * self.shared

    shared = 1.0


class Settings:
    scale = 1.0


SETTINGS = Settings()
_scale = 1.0


class Sets(keras.callbacks.Callback):
    """Changes one of them in the midst of training."""

    def __init__(self, where):
        super().__init__()
        self._where = where

    def get_state(self):
        return {}

    def set_state(self, state):
        del state

    def on_epoch_end(self, epoch, logs=None):
        self._set(0.5 if epoch in (2, 3) else 1.0)

    def on_train_end(self, logs=None):
        self._set(1.0)

    def _set(self, value):
        layer = self.model.layers[1]
        match self._where:
            case "attribute":
                layer.scale = value
            case "container":
                layer.table["scale"][0] = value
            case "namespace":
                layer.settings.scale = value
            case "class":
                Tuned.shared = value
            case "object":
                SETTINGS.scale = value
            case "global":
                globals()["_scale"] = value
            case "closure":
                CELL[0](value)
            case "dropout":
                self.model.layers[0].rate = 0.5 * value
            case "optimizer":
                self.model.optimizer.momentum = 0.8 * value


CELL = []


def fit_with(where, run_dir, callbacks=None, epochs=12):
    keras.utils.set_random_seed(0)
    factor = 1.0

    def change(value):
        nonlocal factor
        factor = value

    CELL[:] = [change]

    def loss(y, outputs):
        return ops.mean(ops.square(outputs - y)) * factor

    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dropout(0.5),
            Tuned(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.8), loss)
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    legato.fit(
        model,
        x,
        x.sum(axis=1, keepdims=True),
        batch_size=8,
        epochs=epochs,
        verbose=0,
        exact="off",
        callbacks=[Sets(where)] if callbacks is None else callbacks,
        run_dir=run_dir,
    )
    return [weight.tobytes() for weight in model.get_weights()]


KINDS = [
    *("attribute", "container", "namespace", "class", "object", "global"),
    *("closure", "dropout", "optimizer"),
]


@pytest.mark.parametrize("where", KINDS)
def test_what_python_sees_may_change(where, tmp_path, replayed, monkeypatch):
    ours = fit_with(where, tmp_path / "replayed")
    assert sum(replayed) > 12
    count = len(replayed)
    monkeypatch.setattr(replay, "AFTER_STEPS", 10**9)
    assert ours == fit_with(where, tmp_path / "python")
    assert len(replayed) == count
    assert ours != fit_with("nothing", tmp_path / "unchanged")


class Counting(keras.layers.Layer):
    """Does something else each second time."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def call(self, x):
        self.calls += 1
        return x * (1.0 if self.calls % 2 else 0.5)


class Random(keras.layers.Layer):
    """Draws from NumPy."""

    def call(self, x):
        return x * float(np.random.uniform(0.5, 1))


class OwnRandom(keras.layers.Layer):
    """Has a generator."""

    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def call(self, x):
        return x * float(self.generator.uniform(0.5, 1))


@pytest.mark.parametrize("layer", [Counting, Random, OwnRandom])
def test_steps_that_change_pythons_values_are_not_replayed(
    layer, tmp_path, replayed, monkeypatch
):
    def train(way):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((4,)), layer(), keras.layers.Dense(1)]
        )
        model.compile("sgd", "mse")
        x = np.ones((64, 4), "float32")
        legato.fit(
            model,
            x,
            x[:, :1],
            batch_size=8,
            epochs=3,
            verbose=0,
            exact="off",
            run_dir=tmp_path / way,
        )
        return model.get_weights()[0].tobytes()

    ours = train("replayed")
    assert not replayed[1:]
    monkeypatch.setattr(replay, "AFTER_STEPS", 10**9)
    assert ours == train("python")


def test_a_metric_that_is_not_due_is_cut_out(tmp_path, monkeypatch):
    sizes = {}
    cut = recording.Recording._cut

    def counted(self, decided):
        module = cut(self, decided)
        sizes[decided] = len(module.graph.nodes)
        return module

    monkeypatch.setattr(recording.Recording, "_cut", counted)

    class Measured(Classifier):
        def build_metrics(self, training):
            when = {legato.Every(3): 1, legato.Sample(0.5): 1}
            return {
                keras.metrics.SparseTopKCategoricalAccuracy(
                    k=2, name=str(number)
                ): each
                for number, each in enumerate(when)
            }

    def train(interval):
        legato.Trainer(
            Measured() if interval else Classifier(),
            run_dir=tmp_path / str(interval),
            config=legato.TrainerConfig(
                train_steps=40,
                validation_interval=None,
                train_metrics_interval=interval,
                progress="none",
            ),
        ).train()

    train(1)
    assert set(sizes) == {(a, b) for a in (True, False) for b in (True, False)}
    none, all_ = sizes[False, False], sizes[True, True]
    assert none < sizes[True, False] < all_
    sizes.clear()
    train(0)
    # (What two metrics hold is given, and left alone.)
    assert sizes[()] == none - 4


def test_what_goes_to_the_host_is_the_same(tmp_path, replayed, monkeypatch):
    class Seen(legato.HostMetric):
        def reset_state(self):
            pass

        def update_state(self, labels, outputs):
            seen[-1].append((labels.tobytes(), outputs.tobytes()))

        def result(self):
            return {}

    class Watched(Classifier):
        def build_metrics(self, training):
            return [] if training else [Seen()]

    seen = []
    for after in (2, 10**6):
        seen.append([])
        monkeypatch.setattr(replay, "AFTER_STEPS", after)
        replayed.clear()
        legato.Trainer(
            Watched(),
            run_dir=tmp_path / str(after),
            config=legato.TrainerConfig(
                train_steps=16, validation_interval=2, progress="none"
            ),
        ).train()
        assert bool(replayed) == (after == 2)
    assert seen[0] == seen[1] and len(seen[0]) > 10


@pytest.mark.parametrize("compiles", ["auto", False])
def test_it_can_be_turned_off(compiles, tmp_path, replayed):
    legato.Trainer(
        Classifier(),
        run_dir=tmp_path / "run",
        config=legato.TrainerConfig(
            train_steps=40,
            validation_interval=10,
            torch_compile=compiles,
            progress="none",
        ),
    ).train()
    assert bool(replayed) == (compiles == "auto")
