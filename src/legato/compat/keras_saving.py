"""What Keras saves: weights in files, by their names there, and configs.

Private names of Keras's saving are touched here and nowhere else. No code and
no config of a file is read: of a `.keras` archive, its weights alone.
"""

import contextlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import ml_dtypes
import numpy as np
from keras.src.saving import saving_lib
from keras.src.utils import module_utils

_WEIGHTS = "model.weights.h5"


class _Names(saving_lib.H5IOStore):
    """Notes under which name each variable would be saved."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._at = ""

    def __bool__(self) -> bool:
        return True

    def make(self, path: str, metadata: Any = None) -> "_Names":
        del metadata
        self._at = path
        return self

    def __setitem__(self, key: str, value: Any) -> None:
        self.found[f"{self._at}/vars/{key}".lstrip("/")] = value


def saved_names(model: keras.Model) -> dict[str, keras.Variable]:
    """The weights of a model, by the names that a file would hold them under.

    Args:
        model: of which all is built.
    """
    store = _Names()
    saving_lib._save_state(
        model,
        weights_store=store,
        assets_store=None,
        inner_path="",
        visited_saveables=set(),
    )
    weights = {id(variable): variable for variable in model.weights}
    return {
        name: weights[id(value)]
        for name, value in store.found.items()
        if id(value) in weights
    }


def read_weights(
    path: Path, wanted: dict[str, tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, ...]]]:
    """Read weights from a `.weights.h5` or a `.keras` file.

    Args:
        path: the file.
        wanted: shapes by the names of `saved_names`.

    Returns:
        The arrays that are wanted and have these shapes, and the shapes of all
        that there are.

    Raises:
        ValueError: if the file is not of this kind, or links to others.
        OSError: if it cannot be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    arrays: dict[str, np.ndarray] = {}
    with _open(path) as file:

        def visit(name: str, item: Any) -> None:
            # (Links are not followed.)
            if not isinstance(item, h5py.Dataset):
                return
            if item.external or item.is_virtual:
                raise ValueError(f"{name} links to another file")
            shapes[name] = tuple(item.shape)
            if wanted.get(name) == shapes[name]:
                # So no more is read than the model takes.
                arrays[name] = _array(item)

        file.visititems(visit)
    return arrays, shapes


@contextlib.contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    with contextlib.ExitStack() as stack:
        source: Any = path
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            try:
                source = stack.enter_context(archive.open(_WEIGHTS))
            except KeyError:
                raise ValueError(f"it holds no {_WEIGHTS}") from None
        yield stack.enter_context(h5py.File(source, "r"))


def _array(item: h5py.Dataset) -> np.ndarray:
    if item.attrs.get("dtype") == "bfloat16":
        return np.array(item, dtype=ml_dtypes.bfloat16)
    array = np.array(item)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{item.name} holds {array.dtype}, not numbers")
    return array


@contextlib.contextmanager
def without_training(model: Any) -> Iterator[None]:
    """Inside, a model is as if it had never been compiled.

    Its optimizer's state, and what counts its loss, would be saved with it.
    """
    names = ("optimizer", "compiled", "_loss_tracker", "_compile_metrics")
    taken = {name: vars(model)[name] for name in names if name in vars(model)}
    vars(model).update(dict.fromkeys(taken) | {"compiled": False})
    try:
        yield
    finally:
        vars(model).pop("compiled")
        vars(model).update(taken)


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Inside, `get_config` does not import TensorFlow if nobody has.

    Keras looks whether what it writes down is TensorFlow's (3.15), and imports
    it for that where it is installed: seconds, and hundreds of megabytes, on
    any backend. No value is of a library that has not been imported.
    """
    library: Any = module_utils.tensorflow
    asked = library._available
    if "tensorflow" not in sys.modules:
        library._available = False
    try:
        yield
    finally:
        library._available = asked or None  # if not: asked again
