"""What `Task.build_inputs` may return, and `legato.fit` may take beside."""

import keras
import numpy as np
import pytest

import legato
from legato.errors import ConfigError, DataError
from tests.linear import Linear

N = 12
X = np.linspace(-1, 1, 2 * N, dtype="float32").reshape(N, 2)
Y = (X.sum(1) > 0).astype("float32")[:, None]


class Asks(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        rows = slice(4 * index, 4 * index + 4)
        return {"x": X[rows], "y": Y[rows]}


class Again:
    def __iter__(self):
        yield from (Asks()[i] for i in range(3))

    def __len__(self):
        return 3


def tensorflow():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices({"x": X, "y": Y}).batch(4)


def torch():
    data = pytest.importorskip("torch.utils.data")
    rows = [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)]
    return data.DataLoader(rows, batch_size=4)


def grain():
    grain = pytest.importorskip("grain")
    rows = [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)]
    return grain.MapDataset.source(rows).batch(4)


def generator():
    while True:
        yield from Again()


KINDS = {
    "source": lambda: legato.ArraySource({"x": X, "y": Y}, 4, shuffle=False),
    "py": Asks,
    "again": Again,
    "tensorflow": tensorflow,
    "torch": torch,
    "grain": grain,
    "generator": generator,
}


class Nested(Linear):
    """Its batches are dicts, which is up to the Task."""

    def __init__(self, make):
        self._make = make

    def build_inputs(self, split):
        return self._make()

    def _loss(self, inputs, model):
        return keras.ops.mean((model(inputs["x"]) - inputs["y"]) ** 2)

    def train_step(self, inputs, model, optimizer, metrics=None):
        loss, gradients = legato.value_and_grad(
            lambda: self._loss(inputs, model), model.trainable_variables
        )
        optimizer.apply(gradients, model.trainable_variables)
        return {"loss": loss}

    def validation_step(self, inputs, model, metrics=None):
        return {"loss": self._loss(inputs, model)}


class Pairs(Nested):
    """Those of `fit`."""

    def train_step(self, inputs, model, optimizer, metrics=None):
        x, y = inputs
        return super().train_step({"x": x, "y": y}, model, optimizer, metrics)

    def validation_step(self, inputs, model, metrics=None):
        x, y = inputs
        return super().validation_step({"x": x, "y": y}, model, metrics)


def train(task, run_dir, **config):
    keras.utils.set_random_seed(0)
    trainer = legato.Trainer(
        task,
        run_dir=run_dir,
        config=legato.TrainerConfig(
            **{
                "epochs": 2,
                "steps_per_epoch": 3,
                "validation_steps": 3,
                "progress": "none",
                "exact": "off",
                **config,
            }
        ),
    )
    return trainer.train().history


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_may_return_any_data(kind, tmp_path):
    """The same batches, whatever holds them: the same losses."""
    found = train(Nested(KINDS[kind]), tmp_path / "run")
    wanted = train(Nested(KINDS["source"]), tmp_path / "wanted")
    assert len(found["val_loss"]) == 2
    if kind == "py":  # shuffled in training, as in `fit`
        assert found["val_loss"] == pytest.approx(wanted["val_loss"], rel=0.1)
    else:
        assert found == wanted


def test_a_task_may_return_plain_arrays(tmp_path):
    """As in Keras: 32 to a batch, and shuffled for training alone."""
    task = Pairs(lambda: (X, Y))
    trainer = legato.Trainer(
        task, run_dir=tmp_path, config=legato.TrainerConfig(epochs=1)
    )
    source, evaluator = trainer._parts.source, trainer._parts.evaluator
    assert source.full_batch_size == N  # fewer than 32
    first = source.iterate(seed=1, capacity=1).next_chunk(1).operands
    again = source.iterate(seed=2, capacity=1).next_chunk(1).operands
    assert not np.array_equal(first, again)
    validation = evaluator.source.iterate(seed=1, capacity=1).next_chunk(1)
    assert validation.operands[0].tolist() == list(range(N))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: "data.csv", r"build_inputs\('train'\) is a str"),
        (lambda: 3, r"build_inputs\('train'\) is a int"),
        (lambda: [1.0, 2.0], "holds a float.*Turn numbers into an array"),
        (lambda: {}, "hold no array"),
        (lambda: iter([]), "it gave no batch"),
        (lambda: (X, Y[:3]), "different numbers of examples"),
    ],
)
def test_what_is_no_data_is_named(data, message, tmp_path):
    with pytest.raises(DataError, match=message):
        train(Pairs(data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_data_to_train_on(tmp_path):
    with pytest.raises(ConfigError, match="returned None: give the data"):
        train(Pairs(lambda: None), tmp_path)


def model():
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def test_fit_takes_a_source(tmp_path):
    keras.utils.set_random_seed(1)
    first = legato.fit(
        model(), X, Y, batch_size=4, shuffle=False, epochs=2,
        validation_data=(X, Y), run_dir=tmp_path / "arrays", verbose=0,
    )  # fmt: skip
    keras.utils.set_random_seed(1)
    source = legato.ArraySource((X, Y), 4, shuffle=False)
    second = legato.fit(
        model(), source, epochs=2, validation_data=source,
        run_dir=tmp_path / "source", verbose=0,
    )  # fmt: skip
    assert first.history == second.history
    found = legato.evaluate(second.model, source)
    assert found["loss"] == pytest.approx(second.history["val_loss"][-1])


class Examples:
    """By their number, and in no other way."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], Y[index]


def torch_examples():
    torch = pytest.importorskip("torch")
    from torch.utils.data import TensorDataset

    return TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))


@pytest.mark.parametrize("make", [Examples, torch_examples])
def test_single_examples_are_put_into_batches(make, tmp_path):
    histories = []
    for number, data in enumerate(((X, Y), (make(),))):
        keras.utils.set_random_seed(1)
        history = legato.fit(
            model(), *data, batch_size=4, shuffle=False, epochs=2,
            run_dir=tmp_path / str(number), verbose=0,
        )  # fmt: skip
        histories.append(history.history)
    assert histories[0] == histories[1]
    task = Pairs(make)
    assert train(task, tmp_path / "task", steps_per_epoch=None)["loss"]


def test_single_examples_have_their_own_labels(tmp_path):
    with pytest.raises(DataError, match=r"^y was given.*Examples"):
        legato.fit(model(), Examples(), Y, run_dir=tmp_path)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("y", Y),
        ("batch_size", 4),
        ("sample_weight", Y),
        ("class_weight", {0: 1.0}),
    ],
)
def test_a_source_has_its_own(argument, value, tmp_path):
    source = legato.ArraySource((X, Y), 4)
    with pytest.raises(DataError, match=f"^{argument}.*Leave {argument} out"):
        legato.fit(model(), source, run_dir=tmp_path, **{argument: value})
