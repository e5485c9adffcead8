"""What no device takes: beside the arrays, and to the right place."""

import datetime
import decimal

import keras
import numpy as np
import pytest

import legato
from legato.data import beside, fit_source
from legato.errors import DamagedError, DataError, StepError
from tests.data.reading import assert_equal, read, take, through_disk
from tests.data.sources import NAMED, NAMES, X
from tests.linear import Linear

N = 11  # not a multiple of the batch size
FEATURES = np.linspace(-1, 1, 2 * N, dtype="float32").reshape(N, 2)
TARGETS = np.arange(N, dtype="float32")[:, None]


# -- values -------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a", "bcd", ""]),
        np.array([["ä\0", "\U0001f600"]]),
        np.array([b"a\0b", b""]),
        np.array(["2026-01-01", "NaT"], "M8[ns]"),
        np.array([3, -7], "m8[ms]"),
        np.zeros((0, 2), "U3"),
        np.array(["a\0", b"b\0", None, 3, 0.1, {"a": (1, [2])}], object),
        beside.gathered(["a", "bc"]),
        np.array(["a", "bc"], np.dtypes.StringDType()),
    ],
)
def test_values_come_back_from_a_checkpoint(array):
    found = beside.restored(through_disk(beside.saved(array)))
    wanted = array
    if array.dtype.kind == "T":
        wanted = array.astype(object)
    assert found is not None and found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert repr(found.tolist()) == repr(wanted.tolist())


def test_arrays_among_objects_come_back():
    array = np.empty(3, object)
    array[:] = [np.array(["a"]), np.array([None], object), np.arange(2)]
    found = beside.restored(through_disk(beside.saved(array)))
    for one, other in zip(found, array, strict=True):
        assert one.dtype == other.dtype and one.tolist() == other.tolist()


@pytest.mark.parametrize(
    "array",
    [
        np.array([decimal.Decimal(1)], object),
        np.array([object()]),
        np.zeros(2, [("a", "f4")]),
    ],
)
def test_what_cannot_be_saved_is_left_out(array):
    assert beside.saved(array) is None
    assert beside.restored(None) is None


@pytest.mark.parametrize(
    "state",
    [
        3,
        {"dtype": "<U3", "shape": [2], "bytes": np.zeros(3, np.uint8)},
        {"dtype": "<U3", "shape": [-2], "bytes": np.zeros(24, np.uint8)},
        {"dtype": "O", "shape": [1], "bytes": np.zeros(8, np.uint8)},
        {"dtype": "<M8[x]", "shape": [1], "bytes": np.zeros(8, np.uint8)},
        {"dtype": "<U3", "shape": [2], "bytes": "abc"},
        {"shape": [2], "items": [1]},
        {"shape": [1], "items": [{"~beside": {"shape": [2]}}]},
        {"shape": [1], "items": [{"~other": 1}]},
    ],
)
def test_damage(state):
    with pytest.raises(DamagedError, match="data state"):
        beside.restored(state)


def test_lists_of_strings_are_arrays_of_objects():
    batch = (X, [("a", "b\0"), {"c": ["d"], "e": [1, 2]}])
    found = beside.gathered(batch)
    assert found[0] is X
    assert found[1][0].tolist() == ["a", "b\0"]
    assert found[1][1]["c"].dtype == object and found[1][1]["e"] == [1, 2]
    same = (X, [{"a": 1}])
    assert beside.gathered(same) is same


def test_objects_are_copied():
    array = np.empty(2, object)
    array[:] = [[1], "a"]
    found = beside.owned(array)
    array[0].append(2)
    assert found.tolist() == [[1], "a"]


# -- in a step ----------------------------------------------------------------

USES = {
    "add": lambda v, x: v + x,
    "added": lambda v, x: x + v,
    "multiplied": lambda v, x: x * v,
    "compared": lambda v, x: v == "name 1",
    "compared to": lambda v, x: x == v,
    "unlike": lambda v, x: v != "name 1",
    "indexed": lambda v, x: v[0],
    "iterated": lambda v, x: list(v),
    "length": lambda v, x: len(v),
    "truth": lambda v, x: bool(v),
    "shape": lambda v, x: v.shape,
    "dtype": lambda v, x: v.dtype,
    "converted": lambda v, x: keras.ops.convert_to_tensor(v),
    "ops": lambda v, x: keras.ops.add(x, v),
    "ops first": lambda v, x: keras.ops.multiply(v, x),
    "ops mean": lambda v, x: keras.ops.mean(v),
    "ops equal": lambda v, x: keras.ops.equal(x, v),
    "cast": lambda v, x: keras.ops.cast(v, "float32"),
    "shape of": lambda v, x: keras.ops.shape(v),
    "stacked": lambda v, x: keras.ops.stack([x, v]),
    "loss": lambda v, x: keras.losses.mean_squared_error(v, x),
    "NumPy": lambda v, x: np.asarray(v),
    "layer": lambda v, x: keras.layers.Dense(1)(v),
    "layer of dicts": lambda v, x: keras.layers.Identity()({"v": v, "x": x}),
}


class Uses(Linear):
    """A task that does something with its strings."""

    def __init__(self, use=None, split="train"):
        self._use = use
        self._split = split

    def build_inputs(self, split):
        return legato.ArraySource((FEATURES, labels()), 4, shuffle=False)

    def build_losses(self, labels, model_outputs, aux_losses=None):
        return keras.ops.mean((labels["y"] - model_outputs) ** 2)

    def train_step(self, inputs, model, optimizer, metrics=None):
        if self._use is not None and self._split == "train":
            self._use(inputs[1]["name"], inputs[0])
        return super().train_step(inputs, model, optimizer, metrics)

    def validation_step(self, inputs, model, metrics=None):
        if self._use is not None and self._split == "validation":
            self._use(inputs[1]["name"], inputs[0])
        return super().validation_step(inputs, model, metrics)


def labels():
    return {
        "y": TARGETS,
        "name": np.array(NAMES[:N]),
        "when": np.datetime64("2026-01-01") + np.arange(N),
    }


def trainer(task, run_dir, callbacks=(), **config):
    keras.utils.set_random_seed(0)
    settings = {"epochs": 1, "progress": "none", **config}
    return legato.Trainer(
        task,
        run_dir=run_dir,
        config=legato.TrainerConfig(**settings),
        callbacks=list(callbacks),
    )


class Batches(keras.callbacks.Callback):
    """Each batch is a call of its own."""

    def on_train_batch_end(self, batch, logs=None):
        pass

    def on_test_batch_end(self, batch, logs=None):
        pass


@pytest.mark.parametrize("use", USES)
def test_to_use_them_as_tensors_is_an_error(use, tmp_path):
    with pytest.raises(StepError) as caught:
        trainer(Uses(USES[use]), tmp_path).train()
    assert "the strings at '1.name' of its batch as a tensor" in str(
        caught.value
    )
    assert "Turn them into numbers in the data" in str(caught.value)


def test_so_it_is_in_validation(tmp_path):
    with pytest.raises(StepError, match=r"the strings at '1\.name'"):
        trainer(Uses(USES["ops"], "validation"), tmp_path).train()
    assert "on the host" in repr(beside.HostValue(0, "1", "strings"))


def test_a_metric_of_the_device_does_not_take_them(tmp_path):
    class Task(Uses):
        def build_metrics(self, training):
            return [] if training else [keras.metrics.MeanSquaredError()]

        def process_metrics(self, metrics, labels, model_outputs):
            for metric in metrics or ():
                metric.update_state(labels["name"], model_outputs)

    with pytest.raises(StepError, match="other metrics"):
        trainer(Task(), tmp_path).train()


# -- on the host --------------------------------------------------------------


class Pairs(legato.HostMetric):
    """Keeps all that it is given."""

    def reset_state(self):
        self.names = []
        self.rows = []
        self.whens = []

    def update_state(self, labels, outputs):
        assert len(labels["name"]) == len(outputs)
        self.names += labels["name"].tolist()
        self.rows += labels["y"][:, 0].astype(int).tolist()
        self.whens += labels["when"].tolist()

    def result(self):
        return {"pairs": float(len(self.names))}


class Measures(Uses):
    def __init__(self, make=None):
        super().__init__()
        self._make = make
        self.metric = Pairs()
        self.seen = []

    def build_inputs(self, split):
        if self._make is None:
            return super().build_inputs(split)
        return self._make()

    def build_metrics(self, training):
        return [] if training else [self.metric]

    def validation_step(self, inputs, model, metrics=None):
        logs = super().validation_step(inputs, model, metrics)
        labels = inputs[1]
        return {**logs, "of": [labels["name"], {"y": labels["y"]}, "plain"]}

    def aggregate_logs(self, state, step_logs):
        names, rows, plain = step_logs["of"]
        assert plain == "plain"
        rows = rows["y"][:, 0].astype(int).tolist()
        state = [] if state is None else state
        return [*state, *zip(names.tolist(), rows, strict=True)]

    def reduce_aggregated_logs(self, aggregated_logs, global_step):
        self.seen = aggregated_logs
        return {"count": float(len(aggregated_logs))}


def parts(size=4):
    for start in range(0, N, size):
        rows = slice(start, start + size)
        yield FEATURES[rows], {k: v[rows] for k, v in labels().items()}


class Asks(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        x, y = list(parts())[index]
        return x, {**y, "name": list(y["name"])}


class Again:
    def __len__(self):
        return 3

    def __iter__(self):
        for x, y in parts():
            yield x, {**y, "name": tuple(y["name"])}


def rows():
    whens = labels()["when"]
    return [
        (FEATURES[i], {"y": TARGETS[i], "name": NAMES[i], "when": whens[i]})
        for i in range(N)
    ]


def examples(**kwargs):
    return legato.RandomAccessSource(rows(), 4, shuffle=False, **kwargs)


def tensorflow():
    tf = pytest.importorskip("tensorflow")
    data = {k: v for k, v in labels().items() if k != "when"}
    data = tf.data.Dataset.from_tensor_slices((FEATURES, data)).batch(4)
    return data.map(lambda x, y: (x, {**y, "when": y["name"]}))


def torch():
    data = pytest.importorskip("torch.utils.data")

    def collate(examples):
        found = data.default_collate([(x, y["y"]) for x, y in examples])
        names = [y["name"] for _, y in examples]
        whens = np.array([y["when"] for _, y in examples])
        return found[0], {"y": found[1], "name": names, "when": whens}

    return data.DataLoader(rows(), batch_size=4, collate_fn=collate)


def generator():
    while True:
        yield from parts()


SOURCES = {
    "arrays": None,
    "py": Asks,
    "iterable": Again,
    "examples": examples,
    "examples, threads": lambda: examples(workers=2),
    "tensorflow": tensorflow,
    "torch": torch,
    "generator": generator,
}


@pytest.mark.parametrize("callbacks", [[], [Batches()]])
@pytest.mark.parametrize("source", SOURCES)
def test_host_metrics_get_the_right_ones(source, callbacks, tmp_path):
    task = Measures(SOURCES[source])
    history = trainer(
        task, tmp_path, callbacks, epochs=2, steps_per_epoch=3,
        validation_steps=3, exact="off",
    ).train()  # fmt: skip
    metric = task.metric
    names = [n.decode() if source == "tensorflow" else n for n in metric.names]
    assert metric.rows == sorted(metric.rows) or source in ("py",)
    assert sorted(metric.rows) == list(range(N))
    assert names == [NAMES[row] for row in metric.rows]
    if source != "tensorflow":
        days = [datetime.date(2026, 1, 1 + row) for row in metric.rows]
        assert metric.whens == days
    assert [row for _, row in task.seen] == metric.rows
    assert [name for name, _ in task.seen] == metric.names
    assert history.history["val_pairs"] == [N, N]
    assert history.history["val_count"] == [N, N]


def test_a_metric_that_is_given_strings_alone(tmp_path):
    class Task(Measures):
        aggregate_logs = legato.Task.aggregate_logs
        reduce_aggregated_logs = legato.Task.reduce_aggregated_logs

        def validation_step(self, inputs, model, metrics=None):
            (metric,) = metrics
            metric.update_state(inputs[1]["name"], 3)
            return {"loss": keras.ops.mean(inputs[0])}

    task = Task()
    given = []
    task.metric.update_state = lambda *args: given.append(args)
    trainer(task, tmp_path).train()
    assert [name for names, _ in given for name in names] == NAMES[:N]
    assert {three for _, three in given} == {3}


def test_objects_of_any_class(tmp_path):
    objects = np.array([decimal.Decimal(i) for i in range(N)], object)

    class Task(Measures):
        def build_inputs(self, split):
            found = {**labels(), "name": objects}
            return legato.ArraySource((FEATURES, found), 4, shuffle=False)

    task = Task()
    trainer(task, tmp_path).train()
    assert task.metric.names == objects.tolist()


# -- legato.fit ---------------------------------------------------------------


class Named(legato.HostMetric):
    def reset_state(self):
        self.found = []

    def update_state(self, labels, outputs):
        self.found += zip(
            labels["name"].reshape(-1).tolist(),
            labels["y"][:, 0].tolist(),
            outputs["y"][:, 0].tolist(),
            strict=True,
        )

    def result(self):
        return {"named": float(len(self.found))}


def model():
    x = keras.layers.Input((2,), name="x")
    found = keras.Model({"x": x}, {"y": keras.layers.Dense(1, name="y")(x)})
    found.compile("sgd", "mse")
    return found


@pytest.mark.parametrize("kind", ["numpy", "list", "pandas"])
def test_fit_gives_them_to_host_metrics(kind, tmp_path):
    pandas = pytest.importorskip("pandas")
    as_kind = {"numpy": np.array, "list": list, "pandas": pandas.Series}[kind]
    names = as_kind(NAMES[:N])
    x, y = {"x": FEATURES, "id": names}, {"y": TARGETS, "name": names}
    histories = []
    for with_names in (True, False):
        keras.utils.set_random_seed(0)
        metric = Named()
        data = (x, y) if with_names else ({"x": FEATURES}, {"y": TARGETS})
        extra = {"validation_metrics": [metric]} if with_names else {}
        history = legato.fit(
            model(), *data, batch_size=4, epochs=2, validation_data=data,
            verbose=0, run_dir=tmp_path / str(with_names), **extra,
        )  # fmt: skip
        histories.append(history.history)
        if with_names:
            assert [n for n, _, _ in metric.found] == NAMES[:N]
            assert [r for _, r, _ in metric.found] == list(range(N))
    assert histories[0].pop("val_named") == [N, N]
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.array(NAMES[:N]), TARGETS),
        (FEATURES, NAMES[:N]),
        ((FEATURES, np.array(NAMES[:N])), TARGETS),
    ],
)
def test_fit_refuses_what_the_model_would_get(x, y, tmp_path):
    with pytest.raises(DataError, match=r"no device takes.*(StringL|unique)"):
        legato.fit(model(), x, y, run_dir=tmp_path / "run", verbose=0)


# -- sources ------------------------------------------------------------------


def test_the_kind_of_an_array_stays():
    class Changes(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            y = np.arange(3.0) if index == 2 else np.array(["a", "b", "c"])
            return X[:3], y

    with pytest.raises(DataError, match="float64 at 1, where the first batch"):
        read(fit_source(Changes()), 4)


def test_ragged_strings_are_objects():
    source = NAMED["named examples"]()
    batch = read(source, 1)[0]
    assert batch["words"].shape == (5,) and batch["name"].shape == (5,)
    assert all(w.tolist()[-1] in n for w, n in zip(*_words(batch), strict=True))


def _words(batch):
    return batch["words"], batch["name"]


def test_padding_leaves_strings_alone():
    rows = [{"x": np.arange(i + 1), "t": ["a"] * (i + 1)} for i in range(3)]
    source = legato.RandomAccessSource(
        rows, 3, collate=legato.Pad(), shuffle=False
    )
    (batch,) = read(source, 1)
    assert batch["x"].tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 2]]
    assert [t.tolist() for t in batch["t"]] == [["a"], ["a"] * 2, ["a"] * 3]


def test_process_workers_send_them(tmp_path):
    pytest.importorskip("cloudpickle")
    wanted = read(NAMED["named examples"](), 11)
    source = NAMED["named examples"](workers=2, processes=True)
    assert_equal(read(source, 11), wanted)


def test_what_was_given_out_does_not_change():
    """Though the memory that workers share is written again and again."""
    source = NAMED["named examples"]()
    iterator = source.iterate(seed=5, capacity=1)
    found = [take(iterator, source, 1)[0] for _ in range(8)]
    iterator.close()
    assert_equal(found, read(source, 8))
