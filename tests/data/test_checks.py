"""NaN and labels out of range are found before they spoil the weights."""

import keras
import numpy as np
import pytest

import legato
from legato.data import InputChecks
from legato.data import arrays as arrays_module
from legato.errors import DataError, LegatoWarning, NonFiniteLossError

N = 40


def data():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(N, 3, 2)).astype("float32")
    return x, generator.integers(0, 4, N)


def model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((3, 2)),
            keras.layers.Flatten(),
            keras.layers.Dense(4, activation="softmax"),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def fit(*data, run_dir, **given):
    return legato.fit(
        model(), *data, run_dir=run_dir, verbose=0, exact="off", **given
    )


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self._data = x, y

    def __len__(self):
        return N // 8

    def __getitem__(self, index):
        return tuple(a[8 * index : 8 * index + 8] for a in self._data)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_arrays_on_the_device(bad, tmp_path):
    x, y = data()
    x[17, 2, 1] = bad
    with pytest.raises(
        DataError,
        match=rf"^The training data: example 17 holds {bad} in 'x' at "
        r"\[2, 1\]\. Clean the data",
    ):
        fit(x, y, run_dir=tmp_path, check_numerics=True)
    # Nobody is made to wait for it who has not asked.
    with pytest.warns(LegatoWarning, match=r"goes on\. It is the data: .* 17"):
        fit(x, y, run_dir=tmp_path / "unchecked")


def test_arrays_that_are_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays_module, "_RESIDENT_BYTES", 0)
    x, y = data()
    x[17, 0, 0] = np.nan
    with pytest.raises(
        DataError,
        match=r"example \d of the batch \(example 17 of the data\) holds nan "
        r"in 'x' at \[0, 0\], in the batch of step \d\.",
    ):
        fit(x, y, batch_size=8, run_dir=tmp_path, check_numerics=True)


def test_batches(tmp_path):
    x, y = data()
    x[17] = np.nan
    with pytest.raises(
        DataError, match=r"example 1 of the batch holds nan .*of step 3\."
    ):
        fit(Batches(x, y), shuffle=False, run_dir=tmp_path, check_numerics=True)
    # It can be resumed when the data are clean.
    x[17] = 0
    history = fit(
        Batches(x, y), shuffle=False, run_dir=tmp_path, check_numerics=True
    )
    assert len(history.history["loss"]) == 1


def test_validation(tmp_path):
    x, y = data()
    bad = x.copy()
    bad[3] = np.inf
    with pytest.raises(
        DataError, match=r"^The validation data: example 3 .* step 1"
    ):
        fit(
            x,
            y,
            validation_data=Batches(bad, y),
            run_dir=tmp_path,
            check_numerics=True,
        )


@pytest.mark.parametrize("label", [4, -1])
def test_labels_in_arrays_are_looked_at_always(label, tmp_path):
    x, y = data()
    y[5] = label
    message = rf"example 5 holds the label {label} in 'y', and the model has 4"
    with pytest.raises(DataError, match=f"^The training data: {message}"):
        fit(x, y, run_dir=tmp_path)
    with pytest.raises(DataError, match=f"^The validation data: {message}"):
        fit(*data(), validation_data=(x, y), run_dir=tmp_path)
    assert not (tmp_path / "checkpoints").exists()  # before anything dear


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_labels_that_are_no_whole_numbers(kind, tmp_path):
    """A loss cuts them off, in silence."""
    x, y = data()
    whole = y.astype(kind)
    assert fit(x, whole, run_dir=tmp_path / "whole").history["loss"]
    broken = whole.copy()
    broken[7] = 2.5
    with pytest.raises(
        DataError,
        match=r"^The training data: example 7 holds the label 2\.5 in 'y', "
        r"which is no whole number, and the model has 4 classes: 0 to 3\. ",
    ):
        fit(x, broken, run_dir=tmp_path / "broken")
    with pytest.raises(
        DataError, match=r"example 7 of the batch .* 2\.5 in 'y'"
    ):
        fit(
            Batches(x, broken),
            shuffle=False,
            run_dir=tmp_path / "batches",
            check_numerics=True,
        )


def test_weights_are_called_by_their_name(tmp_path):
    x, y = data()
    weights = np.ones(N)
    weights[3] = np.nan
    with pytest.raises(DataError, match=r"3 holds nan in 'sample_weight'\."):
        fit(
            x,
            y,
            sample_weight=weights,
            run_dir=tmp_path,
            check_numerics=True,
        )


def test_labels_in_batches(tmp_path):
    x, y = data()
    y[9] = 4
    with pytest.raises(
        DataError, match=r"example 1 of the batch holds the label 4 .* step 2"
    ):
        fit(Batches(x, y), shuffle=False, run_dir=tmp_path, check_numerics=True)


def test_labels_of_several_outputs(tmp_path):
    inputs = keras.layers.Input((2,))
    several = keras.Model(
        inputs,
        {
            "digit": keras.layers.Dense(3, "softmax", name="digit")(inputs),
            "size": keras.layers.Dense(1, name="size")(inputs),
        },
    )
    several.compile(
        "sgd",
        {
            "digit": keras.losses.SparseCategoricalCrossentropy(),
            "size": "mse",
        },
    )
    y = {"digit": np.arange(8) % 4, "size": np.arange(8.0)}
    with pytest.raises(DataError, match=r"example 3 .* label 3 in 'y\.digit'"):
        legato.fit(several, np.zeros((8, 2)), y, run_dir=tmp_path)


@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.SparseCategoricalCrossentropy(ignore_class=-1),
        legato.losses.SmoothedCrossentropy(ignore_class=-1),
        lambda y, p: keras.ops.mean(p, axis=-1),
    ],
)
def test_other_losses_may_have_other_labels(loss, tmp_path):
    x, y = data()
    y[5] = -1
    other = model()
    other.compile("sgd", loss)
    legato.fit(other, x, y, run_dir=tmp_path, verbose=0)


@pytest.mark.parametrize("ignored", [None, 255])
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("name", ["kerass", "smoothed", "dice"])
def test_labels_of_other_losses(name, column, ignored, tmp_path):
    loss = {
        "kerass": keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=ignored
        ),
        "smoothed": legato.losses.SmoothedCrossentropy(ignore_class=ignored),
        "dice": legato.losses.DiceLoss(ignore_label=ignored),
    }[name]
    x = np.zeros((8, 5, 2), "float32")
    y = np.arange(40).reshape(8, 5) % 3
    if column:
        y = y[..., None]

    def train(y, run):
        maps = keras.Sequential([keras.Input((5, 2)), keras.layers.Dense(3)])
        maps.compile("sgd", loss)
        return legato.fit(maps, x, y, run_dir=tmp_path / run, verbose=0)

    if ignored is not None:
        y[2, 1] = ignored
    assert np.isfinite(train(y, run="good").history["loss"]).all()
    if name != "kerass":
        shares = np.full((8, 5, 3), 1 / 3)  # no indices
        assert train(shares, run="shares").history["loss"]
    y[5, 3] = 3
    words = r"example 5 holds the label 3 in 'y', and the model has 3 classes: "
    words += "0 to 2" + (", and 255, which is ignored" if ignored else "")
    with pytest.raises(DataError, match=words):
        train(y, run="bad")


def test_labels_of_weight_zero_may_be_anything(tmp_path):
    x, y = data()
    y[5] = -1
    other = model()
    other.compile("sgd", legato.losses.SmoothedCrossentropy())
    weights = np.arange(len(y)) != 5
    history = legato.fit(
        other, x, y, sample_weight=weights, run_dir=tmp_path, verbose=0
    ).history
    assert np.isfinite(history["loss"]).all()


class Classifies(legato.Task):
    """Whose loss is NaN where its inputs are."""

    label_classes = {"1": 4}  # noqa: RUF012

    def __init__(self, x, y):
        self._data = x, y

    def build_model(self):
        return model()

    def build_optimizer(self):
        return keras.optimizers.SGD(0.1)

    def build_inputs(self, split):
        if split == "train":
            return legato.ArraySource(self._data, 8, shuffle=False)
        return None

    def build_losses(self, labels, outputs, aux_losses=None):
        return keras.ops.mean(outputs)


@pytest.mark.parametrize("moved", [True, False])
def test_a_loss_that_is_nan_is_traced_to_the_data(moved, tmp_path, monkeypatch):
    if moved:
        monkeypatch.setattr(arrays_module, "_RESIDENT_BYTES", 0)
    x, y = data()
    x[11, 0, 0] = np.nan
    trainer = legato.Trainer(
        Classifies(x, y),
        run_dir=tmp_path,
        config=legato.TrainerConfig(epochs=1, progress="none"),
    )
    with pytest.raises(
        NonFiniteLossError,
        match=r"It is the data: example 3 of the batch \(example 11 of the "
        r"data\) holds nan in '0' at \[0, 0\]\.",
    ):
        trainer.train()


def test_labels_of_a_task(tmp_path):
    x, y = data()
    y[2] = 9
    with pytest.raises(DataError, match="example 2 holds the label 9"):
        legato.Trainer(
            Classifies(x, y),
            run_dir=tmp_path,
            config=legato.TrainerConfig(epochs=1),
        )


def test_large_values_that_are_finite_pass():
    x = np.full((4, 3), np.finfo("float32").max, "float32")
    InputChecks(legato.ArraySource((x,), 2), "The data").check_all()
