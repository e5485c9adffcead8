"""Drawings as strokes of a pen, as QuickDraw has them.

A drawing is `[points, 3]`: how far the pen moves to the right and down, and
whether it is lifted afterwards ("stroke-3"). For training all have one length
and five numbers a point ("stroke-5"): the move, divided by a common scale, and
one of three states of the pen: down, lifted, or the drawing is over.
"""

import os
import pickle
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from legato.errors import DataError

START = (0.0, 0.0, 1.0, 0.0, 0.0)
"""The point before the first."""


def quickdraw(
    path: str | os.PathLike[str], split: str, max_length: int = 250
) -> np.ndarray:
    """The drawings of a file of QuickDraw's, in "stroke-5".

    Args:
        path: an `.npz` file with arrays `train`, `valid` and `test`, whose
            elements are drawings in "stroke-3".
        split: "train" or "validation".
        max_length: longer drawings are left out.

    Returns:
        float32 `[drawings, max_length + 1, 5]`.

    Raises:
        DataError: it is no such file, or holds anything but arrays.
    """
    name = "valid" if split == "validation" else split
    chosen = [each for each in _read(path, name) if len(each) <= max_length]
    scale = deviation(_read(path, "train"))
    return padded(chosen, max_length, scale)


def shapes(
    split: str, drawings: int, max_length: int = 32, seed: int = 0
) -> np.ndarray:
    """Houses and stars with an unsteady hand, in "stroke-5".

    Args:
        split: "train" or "validation".
        drawings: how many.
        max_length: points of each, at most; at least 16.
        seed: of what is drawn.

    Returns:
        float32 `[drawings, max_length + 1, 5]`.
    """
    key = (seed, int(split == "train"))
    made = [
        draw(np.random.default_rng((*key, index))) for index in range(drawings)
    ]
    return padded(made, max_length, scale=10.0)


def draw(rng: np.random.Generator) -> np.ndarray:
    """A house or a star, of about 20 units, in "stroke-3"."""
    if rng.random() < 0.5:
        walls = [(0, 0), (0, 14), (16, 14), (16, 0), (0, 0), (8, -9), (16, 0)]
        door = [(6, 14), (6, 7), (10, 7), (10, 14)]
        strokes = [walls, door]
    else:
        angles = np.arange(6) * 4 * np.pi / 5 - np.pi / 2
        strokes = [np.stack([10 * np.cos(angles), 10 * np.sin(angles)], -1)]
    size = rng.uniform(0.8, 1.2, 2)
    points, lifted = [], []
    for stroke in strokes:
        jitter = rng.normal(scale=0.5, size=(len(stroke), 2))
        points.append(np.array(stroke) * size + jitter)
        lifted += [0] * (len(stroke) - 1) + [1]
    moves = np.diff(np.concatenate(points), axis=0, prepend=points[0][:1])
    return np.column_stack([moves, lifted])


def deviation(drawings: Sequence[np.ndarray]) -> float:
    """The standard deviation of all moves, which is a common scale."""
    return float(np.std(np.concatenate([each[:, :2] for each in drawings])))


def padded(
    drawings: Sequence[np.ndarray], length: int, scale: float
) -> np.ndarray:
    """Drawings of one length, each after `START`.

    Args:
        drawings: in "stroke-3", none longer than `length`.
        length: of all.
        scale: moves are divided by it.

    Returns:
        float32 `[drawings, length + 1, 5]`.
    """
    out = np.zeros((len(drawings), length + 1, 5), np.float32)
    out[:, 0] = START
    out[:, 1:, 4] = 1
    for row, drawing in zip(out, drawings, strict=True):
        points = row[1 : len(drawing) + 1]
        points[:, :2] = drawing[:, :2] / scale
        points[:, 2] = drawing[:, 2] == 0
        points[:, 3] = drawing[:, 2] == 1
        points[:, 4] = 0
    return out


def _read(path: str | os.PathLike[str], name: str) -> list[np.ndarray]:
    """The drawings of a part of a file."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as f:
            version = np.lib.format.read_magic(f)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            _, _, dtype = read(f)
            if not dtype.hasobject:
                raise DataError(f"{name!r} holds {dtype}, not drawings")
            found = _ArraysOnly(f, encoding="latin1").load()
        drawings = [np.asarray(each) for each in found]
        if not all(d.ndim == 2 and d.shape[1] == 3 for d in drawings):
            raise DataError(f"{name!r} holds what is not [points, 3]")
    except (
        OSError,
        KeyError,
        ValueError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        DataError,
    ) as error:
        raise DataError(
            f"{os.fspath(path)!r} is no file of QuickDraw's: {error}. It must "
            "be an .npz file with arrays train, valid and test of drawings."
        ) from error
    return drawings


class _ArraysOnly(pickle.Unpickler):
    """Arrays of objects are pickled; nothing but arrays is made of them."""

    _ALLOWED = ("_reconstruct", "ndarray", "dtype", "scalar")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self._ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants {module}.{name}, not an array")
