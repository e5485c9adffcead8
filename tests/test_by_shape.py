"""Batches of many shapes: each is compiled once, told, and limited."""

import keras
import numpy as np
import pytest

import legato
from legato.errors import DataError

on_eager = pytest.mark.skipif(
    keras.config.backend() == "torch", reason="nothing is compiled"
)


class Ragged(keras.utils.PyDataset):
    """Each batch as long as its longest sequence."""

    def __init__(self, lengths):
        super().__init__()
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        length = self.lengths[index]
        x = np.full((4, length), 1 / length, "float32")
        return x, np.full((4, 1), index, "float32")


def fit(lengths, run_dir, epochs=1, **changes):
    keras.utils.set_random_seed(0)
    inputs = keras.layers.Input((None,))
    mean = keras.layers.Lambda(
        lambda x: keras.ops.mean(x, axis=1, keepdims=True),
        output_shape=(1,),
    )
    model = keras.Model(inputs, keras.layers.Dense(1)(mean(inputs)))
    model.compile("sgd", "mse")
    return legato.fit(
        model,
        Ragged(lengths),
        shuffle=False,
        epochs=epochs,
        run_dir=run_dir,
        verbose=2,
        **changes,
    )


@on_eager
def test_each_shape_is_compiled_once_and_told(tmp_path, capsys):
    fit([3, 5, 3, 5, 7, 5], tmp_path, epochs=2)
    told = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "new shape of batch" in line
    ]
    assert len(told) == 2
    assert "train_step is compiled for a new shape" in told[0]
    assert "0: [4, 5], 1: [4, 1]: number 2 of at most 32." in told[0]
    assert "0: [4, 7], 1: [4, 1]: number 3 of at most 32." in told[1]


@on_eager
def test_there_is_a_limit_and_the_run_can_go_on(tmp_path):
    lengths = [3, 4, 5, 6]
    wanted = fit(lengths, tmp_path / "wanted", epochs=2).history
    limited = {"max_batch_shapes": 3, "checkpoint_interval": 1}
    with pytest.raises(
        DataError,
        match=r"compiled for 3 shapes of batches, and a batch of yet another "
        r"shape came, 0: \[4, 6\], 1: \[4, 1\]; max_batch_shapes=3 .*"
        r"legato\.Pad",
    ):
        fit(lengths, tmp_path / "run", epochs=2, **limited)
    found = fit(lengths, tmp_path / "run", epochs=2, max_batch_shapes=4)
    assert found.history == wanted


def test_a_partial_batch_is_no_surprise(tmp_path, capsys):
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.zeros((7, 2), "float32")
    legato.fit(model, x, x[:, :1], batch_size=4, run_dir=tmp_path, verbose=2)
    assert "new shape" not in capsys.readouterr().err


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="compiled steps are limited"
)
def test_eager_steps_have_no_limit(tmp_path):
    lengths = [3, 4, 5, 3, 6]
    wanted = fit(lengths, tmp_path / "wanted", epochs=3).history
    found = fit(lengths, tmp_path / "run", epochs=3, max_batch_shapes=2)
    assert found.history == wanted


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_batch_that_the_model_does_not_take_is_named(tmp_path, split):
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    good, bad = Ragged([3] * 6), Ragged([3, 3, 3, 3, 5, 3])
    train, validation = (bad, good) if split == "train" else (good, bad)
    with pytest.raises(ValueError, match="incompatible") as caught:
        legato.fit(
            model, train, validation_data=validation, shuffle=False,
            run_dir=tmp_path, verbose=0,
        )  # fmt: skip
    which = {
        "train": "the batch of step 5",
        "validation": "batch 4 of the validation data",
    }[split]
    (note,) = [n for n in caught.value.__notes__ if "shapes" in n]
    assert note == (
        f"(This is {which}, with the shapes 0: [4, 5], 1: [4, 1]; the first "
        "batches had 0: [4, 3], 1: [4, 1].)"
    )
