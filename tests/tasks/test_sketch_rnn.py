"""Sketch-RNN: drawings, their files, the density, and the callbacks."""

import pickle
import types
import zipfile

import keras
import numpy as np
import pytest

from legato.errors import DataError
from legato.tasks import pictures, sketch_rnn, strokes
from tests.contracts.garden import Sketches


def on_host(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


# Drawings.

A = np.array([[3, 4, 0], [0, -2, 1], [5, 0, 0]])
B = np.array([[1, 1, 1]])


@pytest.mark.any_backend
def test_padded_by_hand():
    found = strokes.padded([A, B], 4, scale=2.0)
    np.testing.assert_array_equal(
        found,
        [
            [
                [0, 0, 1, 0, 0],
                [1.5, 2, 1, 0, 0],
                [0, -1, 0, 1, 0],
                [2.5, 0, 1, 0, 0],
                [0, 0, 0, 0, 1],
            ],
            [[0, 0, 1, 0, 0], [0.5, 0.5, 0, 1, 0], *[[0, 0, 0, 0, 1]] * 3],
        ],
    )


@pytest.mark.any_backend
def test_files_of_quickdraw(tmp_path):
    def drawings(*arrays):
        out = np.empty(len(arrays), object)
        out[:] = [each.astype("int16") for each in arrays]
        return out

    path = tmp_path / "cat.npz"
    longer = np.tile(A, (4, 1))
    np.savez_compressed(
        path,
        train=drawings(A, B, longer),
        valid=drawings(B, A),
        test=drawings(A),
    )
    scale = np.std(np.concatenate([A, B, longer])[:, :2])
    train = strokes.quickdraw(path, "train", 4)
    np.testing.assert_array_equal(train, strokes.padded([A, B], 4, scale))
    validation = strokes.quickdraw(path, "validation", 4)
    np.testing.assert_array_equal(validation, train[::-1])


@pytest.mark.any_backend
def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    path = tmp_path / "evil.npz"
    array = np.empty(1, object)
    array[0] = Evil()
    np.savez(path, train=array, valid=array)
    with pytest.raises(DataError, match="print, not an array"):
        strokes.quickdraw(path, "train")
    np.savez(path, train=np.zeros(3), valid=np.zeros(3))
    with pytest.raises(DataError, match="float64, not drawings"):
        strokes.quickdraw(path, "train")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.npy", pickle.dumps([A]))
    with pytest.raises(DataError, match="no file of QuickDraw's"):
        strokes.quickdraw(path, "train")


@pytest.mark.any_backend
def test_shapes_depend_on_their_number_alone():
    made = strokes.shapes("train", 9, 16)
    np.testing.assert_array_equal(strokes.shapes("train", 4, 16), made[:4])
    assert made.shape == (9, 17, 5)
    assert len({each.tobytes() for each in made}) == 9
    assert (made[..., 2:].sum(axis=-1) == 1).all()
    lifted = made[..., 3].sum(axis=1)
    assert set(lifted) == {1, 2}  # stars and houses


# The model.


def test_the_density_is_that_of_the_formula():
    random = np.random.default_rng(0)
    outputs = random.normal(size=(2, 4, 21)).astype("float32")  # 3 mixtures
    moves = random.normal(size=(2, 4, 2)).astype("float32")
    given = map(keras.ops.convert_to_tensor, (outputs, moves))
    found = on_host(sketch_rnn.mixture_log_density(*given, 3))
    logits, mx, my, sx, sy, r = np.split(outputs[..., :18].astype(float), 6, -1)
    sx, sy, r = np.exp(sx), np.exp(sy), 0.999 * np.tanh(r)
    x, y = (moves[..., :1] - mx) / sx, (moves[..., 1:] - my) / sy
    z = x**2 + y**2 - 2 * r * x * y
    density = np.exp(-z / (2 * (1 - r**2)))
    density /= 2 * np.pi * sx * sy * np.sqrt(1 - r**2)
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = np.log((weights * density).sum(axis=-1))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.any_backend
def test_the_callbacks_anneal_by_their_counters():
    task = Sketches()
    optimizer = task.build_optimizer()
    for callback in task.build_callbacks():
        callback.set_model(types.SimpleNamespace(optimizer=optimizer))
        for _ in range(3):
            callback.on_train_batch_begin(0)
        assert callback.batches == 3
    share = 1 - (1 - task.kl_start) * task.kl_rate**2
    found = float(on_host(task.annealed.value))
    assert found == pytest.approx(task.kl_weight * share)
    rest = (task.learning_rate - task.least_learning_rate) * task.decay**2
    found = float(on_host(optimizer.learning_rate))
    assert found == pytest.approx(task.least_learning_rate + rest)


@pytest.mark.any_backend
def test_what_is_drawn():
    drawn = strokes.padded([np.array([[0, 0, 0], [10, 0, 1], [0, 9, 0]])], 4, 1)
    found = pictures.sketches(np.concatenate([drawn, drawn]), size=32)
    assert found.shape == (32, 64, 3)
    rows, columns = np.nonzero(found[:, :32, 0] == 0)
    assert rows.max() - rows.min() <= 2  # the second line is not drawn
    assert columns.max() - columns.min() >= 15
