"""What `keras.Model.fit` takes as data, or a Task returns, as data sources.

The rules of `fit` are Keras's own (`keras.src.trainers.data_adapters`), and so
are the batches: `(x,)`, `(x, y)` or `(x, y, sample_weight)`, nested as the
user's data are. Where Keras fails deep inside, or passes over an argument in
silence, the argument is named here. Those of a Task are left as they are.
"""

import inspect
import math
import numbers
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NoReturn

import keras
import numpy as np

from legato.compat import keras_data
from legato.data.arrays import ArraySource
from legato.data.batches import named_part
from legato.data.beside import gathered, stays_on_host, what_holds
from legato.data.columns import Column, as_column
from legato.data.iterables import IterableSource
from legato.data.order import check_shuffle
from legato.data.pydataset import PyDatasetSource
from legato.data.random_access import RandomAccessSource
from legato.data.readers import (
    Adapter,
    GeneratorFunction,
    Iterable,
    Kept,
    OneShot,
    Reader,
    StatefulIterator,
    told_by,
)
from legato.data.source import DataSource
from legato.data.stream_state import is_stream
from legato.data.structure import Structure
from legato.errors import DataError, LegatoWarning

_BATCH_SIZE = 32  # Keras's


def fit_source(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    shuffle: bool | Literal["batch"] = False,
    class_weight: Mapping[int, float] | None = None,
    steps_per_epoch: int | None = None,
    name: str = "x",
    steps_name: str = "steps_per_epoch",
    keep: bool = False,
) -> DataSource:
    """The data of `keras.Model.fit`, by the same arguments.

    Args:
        x: the features: arrays of any library, or lists, tuples and dicts of
            them; or all of the data: a `legato.DataSource`, a
            `keras.utils.PyDataset`, a `tf.data.Dataset`, a PyTorch
            `DataLoader`, a Grain dataset or loader, a Hugging Face
            `IterableDataset` of batches, a generator, or any object
            that gives batches when it is iterated over, again and again; or
            a dataset of single examples, `(x, y)`: PyTorch's or Hugging
            Face's, or any object with `__len__` and `__getitem__` that cannot
            be iterated over.
        y: the targets, if x are arrays; None may stand for those of an output.
        sample_weight: weights of the examples, if x are arrays: one array for
            all outputs, or as many as y.
        batch_size: examples in a batch, if x are arrays; 32 by default, or
            what makes `steps_per_epoch` batches.
        shuffle: a new order in each epoch, for arrays and PyDatasets; "batch"
            mixes arrays within batches only. Others order themselves.
        class_weight: class -> weight of its examples.
        steps_per_epoch: steps after which an epoch ends for the training loop.
            Data that end sooner begin anew there (Keras ends the epoch with a
            warning). It stands for the length of data that have none.
        name: what the caller calls `x`, for messages.
        steps_name: what it calls `steps_per_epoch`, likewise.
        keep: take the first `steps_per_epoch` batches of a generator, keep
            them in memory, and give them again in each epoch, which is
            announced; for validation.

    Returns:
        A source whose batches are tuples as `fit` makes them.

    Raises:
        DataError: these arguments do not go together, or the data are none;
            the message names the argument, the rule and the remedy.
    """
    check_number("batch_size", batch_size)
    check_number(steps_name, steps_per_epoch)
    shuffle = check_shuffle(shuffle)
    _check_class_weight(class_weight)
    if x is None:
        raise DataError(f"{name}=None: give the data to train on.")
    x, y, sample_weight = map(gathered, (x, y, sample_weight))
    if isinstance(x, DataSource):
        _refuse_beside(
            x,
            name,
            y=y,
            sample_weight=sample_weight,
            batch_size=batch_size,
            class_weight=class_weight,
        )
        return x
    if _gives_examples_by_number(x):
        _refuse_beside(
            x, name, y=y, sample_weight=sample_weight, class_weight=class_weight
        )
        return RandomAccessSource(x, batch_size or _BATCH_SIZE, shuffle=shuffle)
    if not are_arrays((x, y, sample_weight)):
        return _batch_source(
            x,
            y,
            sample_weight,
            batch_size=batch_size,
            shuffle=bool(shuffle),
            class_weight=class_weight,
            steps_per_epoch=steps_per_epoch,
            name=name,
            steps_name=steps_name,
            keep=keep,
        )
    return _array_source(
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        shuffle=shuffle,
        class_weight=class_weight,
        steps_per_epoch=steps_per_epoch,
        name=name,
    )


def task_source(
    data: Any, name: str, *, shuffle: bool, steps_per_epoch: int | None = None
) -> DataSource:
    """What `Task.build_inputs` returned.

    Args:
        data: a source; or arrays or a dataset of single examples, of which
            batches of 32 are made; or what gives batches: see `fit_source`.
            Batches may be nested in any way.
        name: what the caller calls it, for messages.
        shuffle: a new order in each epoch, for arrays and PyDatasets.
        steps_per_epoch: see `fit_source`. Of data that can be read only once
            these are all, where `shuffle` is False: for validation.

    Raises:
        DataError: they are none.
    """
    if isinstance(data, DataSource):
        return data
    data = gathered(data)
    if are_arrays(data):
        return ArraySource(data, _BATCH_SIZE, shuffle=shuffle)
    if _gives_examples_by_number(data):
        return RandomAccessSource(data, _BATCH_SIZE, shuffle=shuffle)
    return _batch_source(
        data,
        None,
        None,
        batch_size=None,
        shuffle=shuffle,
        class_weight=None,
        steps_per_epoch=steps_per_epoch,
        name=name,
        steps_name="steps_per_epoch" if shuffle else "validation_steps",
        keep=not shuffle,
        as_given=True,
    )


def split_validation(
    x: Any, y: Any, sample_weight: Any, validation_split: float
) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]:
    """The last part of the data for validation, the same as Keras takes.

    Args:
        x: the features, as `fit_source` takes arrays.
        y: the targets.
        sample_weight: the weights.
        validation_split: which part, between 0 and 1.

    Returns:
        `(x, y, sample_weight)` for training, and for validation.

    Raises:
        DataError: they are no arrays, or too few, or the part is none.
    """
    if (
        isinstance(validation_split, bool)
        or not isinstance(validation_split, int | float | np.number)
        or not 0 < validation_split < 1
    ):
        raise DataError(
            f"validation_split={validation_split!r}: it must be a number "
            "between 0 and 1, the part of the data that is kept for "
            "validation."
        )
    arrays = gathered((x, y, sample_weight))
    if not are_arrays(arrays) or not Structure.leaves(x):
        raise DataError(
            f"validation_split={validation_split} with x of type "
            f"{type(x).__name__}: only arrays can be split. Give "
            "validation_data instead."
        )
    structure = Structure(arrays)
    columns = _columns(arrays, structure, "x")
    _check_lengths(columns, structure, "x")
    length = columns[0].shape[0]
    first = math.floor(length * (1.0 - validation_split))
    if first in (0, length):
        raise DataError(
            f"validation_split={validation_split}: of {length} examples, this "
            "leaves none for training or none for validation. Give more data, "
            "or another part."
        )
    return (
        structure.pack([c.part(0, first) for c in columns]),
        structure.pack([c.part(first, length) for c in columns]),
    )


def _batch_source(
    x: Any,
    y: Any,
    sample_weight: Any,
    *,
    batch_size: int | None,
    shuffle: bool,
    class_weight: Mapping[int, float] | None,
    steps_per_epoch: int | None,
    name: str,
    steps_name: str,
    keep: bool,
    as_given: bool = False,
) -> DataSource:
    """A source of what gives batches by itself."""
    is_py = isinstance(x, keras.utils.PyDataset)
    if not is_py and not _is_iterable(x):
        _refuse(x, y, sample_weight, name)
    _refuse_beside(
        x, name, y=y, sample_weight=sample_weight, batch_size=batch_size
    )
    if is_py:
        return PyDatasetSource(
            x,
            shuffle=shuffle,
            class_weight=class_weight,
            steps_per_epoch=steps_per_epoch,
            name=name,
            steps_name=steps_name,
            as_given=as_given,
        )
    reader = _reader(x)
    if keep and isinstance(reader, OneShot) and steps_per_epoch is not None:
        reader = Kept(reader, steps_per_epoch, steps_name)
    source = IterableSource(
        reader,
        class_weight=class_weight,
        steps_per_epoch=steps_per_epoch,
        name=name,
        steps_name=steps_name,
        as_given=as_given,
    )
    if isinstance(reader, Kept) and not as_given:
        # (Keras goes on in the generator.)
        warnings.warn(
            f"{name} (generator) can be read once: its first "
            f"{steps_name}={reader.count} batches are kept in memory (about "
            f"{source.batch_bytes * reader.count / 1e6:.1f} MB) and used "
            "each time, so that all results are of the same data.",
            LegatoWarning,
            stacklevel=5,
        )
    return source


_BESIDE = {
    "y": "the targets come with the batches: (x, y)",
    "sample_weight": "the weights come with the batches: (x, y, sample_weight)",
    "batch_size": "it makes the batches itself",
    "class_weight": "the weights come with the batches: (x, y, sample_weight)",
}


def _refuse_beside(x: Any, name: str, **given: Any) -> None:
    """What is no argument beside data that give whole batches."""
    for argument, value in given.items():
        if value is not None:
            shown = f"={value}" if argument == "batch_size" else ""
            raise DataError(
                f"{argument}{shown} was given with {name} of type "
                f"{type(x).__name__}: {_BESIDE[argument]}. Leave {argument} "
                "out."
            )


def _is_iterable(x: Any) -> bool:
    if isinstance(x, list | tuple | dict | set | str | bytes):
        return False
    if is_stream(x):
        return True
    if keras_data.is_array(x) or _gives_examples(x):
        return False
    return (
        hasattr(x, "__iter__")
        or isinstance(x, keras_data.DataAdapter)
        or inspect.isgeneratorfunction(x)
    )


def _gives_examples(x: Any) -> bool:
    """Whether it is a dataset of single examples, not of batches."""
    modules = {cls.__module__.partition(".")[0] for cls in type(x).__mro__}
    loads = keras_data.is_torch_dataloader(x)
    return not loads and bool(modules & {"torch", "datasets"})


def _gives_examples_by_number(x: Any) -> bool:
    if isinstance(x, keras.utils.PyDataset) or keras_data.is_array(x):
        return False
    by_number = hasattr(x, "__len__") and hasattr(x, "__getitem__")
    return by_number and (_gives_examples(x) or not hasattr(x, "__iter__"))


def _reader(x: Any) -> Reader:
    if keras_data.is_tf_dataset(x):
        from legato.data.adapters.tf_data import TensorFlowDataset

        return TensorFlowDataset(x)
    if keras_data.is_torch_dataloader(x):
        from legato.data.adapters.torch_loader import TorchLoader

        return TorchLoader(x)
    if keras_data.is_grain_dataset(x):
        from legato.data.adapters.grain_data import GrainDataset

        return GrainDataset(x)
    if is_stream(x):
        from legato.data.adapters.hugging_face import HuggingFaceStream

        return HuggingFaceStream(x)
    if isinstance(x, keras_data.DataAdapter):
        return Adapter(x)
    if inspect.isgeneratorfunction(x):  # also a method, or a partial of one
        return GeneratorFunction(x)
    if not isinstance(x, Iterator):
        return Iterable(x)
    return StatefulIterator(x) if told_by(x) else OneShot(x)


def are_arrays(nested: Any) -> bool:
    """Whether these are arrays of any library, nested in any way."""
    return all(map(keras_data.is_array, keras.tree.flatten(nested)))


def _array_source(
    x: Any,
    y: Any,
    sample_weight: Any,
    *,
    batch_size: int | None,
    shuffle: bool | Literal["batch"],
    class_weight: Mapping[int, float] | None,
    steps_per_epoch: int | None,
    name: str,
) -> ArraySource:
    if y is None and (sample_weight is not None or class_weight is not None):
        argument = "class_weight" if sample_weight is None else "sample_weight"
        raise DataError(
            f"{argument} was given and y was not: weights are those of the "
            "targets. Give y too, or leave it out."
        )
    if sample_weight is not None:
        if class_weight is not None:
            raise DataError(
                "class_weight and sample_weight were both given: each is the "
                "weight of the examples. Multiply them into sample_weight, or "
                "leave one out."
            )
        sample_weight = _spread_weight(y, sample_weight)
    if class_weight is not None:
        if keras.tree.is_nested(y):
            raise DataError(
                "class_weight was given with several y: it is for models "
                "with a single output. Give sample_weight, with an array for "
                "each output."
            )
        labels = keras_data.to_numpy(_column(y, "y"))
        if stays_on_host(labels.dtype):
            raise DataError(
                "class_weight was given, and y holds "
                f"{what_holds(labels.dtype)}: its keys are the numbers of "
                "classes. Number the classes in y: "
                "np.unique(y, return_inverse=True)[1]."
            )
        sample_weight = keras_data.class_weight_to_sample_weights(
            labels, class_weight
        )
    data = (x, y, sample_weight)
    data = data[: 1 if y is None else 2 if sample_weight is None else 3]
    structure = Structure(data)
    columns = _columns(data, structure, name)
    if not Structure.leaves(x):
        raise DataError(f"{name}={x!r:.80} holds no array. Give at least one.")
    length = _check_lengths(columns, structure, name)
    if batch_size is None:
        batch_size = _BATCH_SIZE
        if steps_per_epoch is not None:
            batch_size = math.ceil(length / steps_per_epoch)
    return ArraySource(structure.pack(columns), batch_size, shuffle=shuffle)


def _columns(data: Any, structure: Structure, name: str) -> list[Column]:
    """The arrays of `(x, y, sample_weight)`; a bad one is named."""
    names = (name, "y", "sample_weight")
    return [
        _column(value, named_part(path, names))
        for path, value in zip(
            structure.paths(), Structure.leaves(data), strict=True
        )
    ]


def _column(value: Any, argument: str) -> Column:
    try:
        column = as_column(value, every_float=True)
    except DataError as error:
        _refuse_table(value, argument)
        raise DataError(f"{argument}: {error}") from error
    if stays_on_host(column.dtype):
        _refuse_table(value, argument)
    return column


def _refuse_table(value: Any, argument: str) -> None:
    """Columns of pandas' of which no array of numbers comes, by name."""
    if type(value).__module__.split(".")[0] != "pandas" or value.ndim > 2:
        return
    names = [argument] if value.ndim == 1 else [repr(c) for c in value.columns]
    dtypes = value.dtypes.tolist() if value.ndim == 2 else [value.dtype]
    columns = list(zip(names, dtypes, strict=True))
    others = [f"{name} ({d})" for name, d in columns if d.kind not in "biuf"]
    if len(others) == len(columns):
        return  # what stays on the host
    where = "" if value.ndim == 1 else f"{argument}: the column "
    if others:
        raise DataError(
            f"{where}{others[0]} holds no numbers, and others do. Number what "
            "it holds (pandas.factorize), leave the column out, or, where it "
            'holds numbers as objects, take .astype("float32").'
        )
    odd = [
        (name, d)
        for name, d in columns
        if not isinstance(d, np.dtype) or d.kind == "b"
    ]
    if odd:
        name, dtype = odd[0]
        raise DataError(
            f"{where}{name} is of dtype {dtype}, of which pandas makes objects "
            f'here, not numbers. Give {argument}.astype("float32").'
        )


def _spread_weight(y: Any, sample_weight: Any) -> Any:
    """One array of weights for each output, as Keras does it."""
    if not keras.tree.is_nested(y):
        return sample_weight
    if isinstance(sample_weight, list | tuple | dict):
        try:
            keras.tree.assert_same_structure(y, sample_weight)
        except ValueError:
            raise DataError(
                "sample_weight is not nested as y is: "
                f"{Structure(sample_weight)} and {Structure(y)}. Give an array "
                "(or None) for each output, or a single one for all."
            ) from None
        return sample_weight
    shape = tuple(sample_weight.shape)
    if len(shape) != 1 and (len(shape) != 2 or shape[1] != 1):
        raise DataError(
            f"sample_weight has shape {shape}, and y is nested: a single array "
            "for all outputs must have shape (examples,). Give one for each "
            "output."
        )
    return keras.tree.map_structure(lambda _: sample_weight, y)


def _check_lengths(columns: list, structure: Structure, name: str) -> int:
    names = [name, "y", "sample_weight"]
    lengths = {}
    for path, column in zip(structure.paths(), columns, strict=True):
        first, _, rest = path.partition(".")
        lengths[names[int(first)] + f".{rest}" * bool(rest)] = column.shape[0]
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key}: {n}" for key, n in lengths.items())
        raise DataError(
            f"The arrays have different numbers of examples ({listed}). Every "
            "array must have one row for each example."
        )
    length = next(iter(lengths.values()))
    if length == 0:
        raise DataError(
            f"{name} is empty: 0 examples. Give at least one example."
        )
    return length


def check_number(argument: str, value: Any) -> None:
    """Checks a size or a count of the user's.

    Raises:
        DataError: it is no positive int, nor None.
    """
    if value is None:
        return
    if (
        isinstance(value, bool)
        or not isinstance(value, int | np.integer)
        or value < 1
    ):
        raise DataError(
            f"{argument}={value!r}: it must be an int of at least 1, or None."
        )


def _check_class_weight(class_weight: Any) -> None:
    if class_weight is not None and (
        not isinstance(class_weight, Mapping) or not class_weight
    ):
        raise DataError(
            f"class_weight={class_weight!r:.80}: it must be a dict, such as "
            "{0: 1.0, 1: 2.5}: class -> weight."
        )
    for key, weight in (class_weight or {}).items():
        is_number = isinstance(key, numbers.Real | np.bool_)
        if not is_number or float(key) % 1 != 0:
            raise DataError(
                f"class_weight has the key {key!r}: its keys are the numbers "
                "of classes, such as {0: 1.0, 1: 2.5}, and no label is ever "
                "equal to this one."
            )
        if not _is_finite(weight):
            raise DataError(
                f"class_weight[{key!r}]={weight!r:.80}: it must be a finite "
                "number, the weight of the examples of that class."
            )


def _is_finite(weight: Any) -> bool:
    try:
        return not isinstance(weight, str) and math.isfinite(weight)
    except (TypeError, ValueError):
        return False


def _refuse(x: Any, y: Any, sample_weight: Any, name: str) -> NoReturn:
    parts = {name: x, "y": y, "sample_weight": sample_weight}
    for part, value in parts.items():
        for leaf in keras.tree.flatten(value):
            if keras_data.is_array(leaf):
                continue
            kind = type(leaf).__name__
            if part == "sample_weight" and isinstance(leaf, numbers.Real):
                raise DataError(
                    f"sample_weight={leaf!r}: there must be one weight for "
                    "each example, in an array of shape (examples,), such as "
                    f"np.full(len(x), {float(leaf)})."
                )
            if inspect.isfunction(value) or inspect.ismethod(value):
                raise DataError(
                    f"{part} is a {kind}, which is no data. If it gives them, "
                    f"call it: {part}()."
                )
            if leaf is value:
                raise DataError(
                    f"{part} is a {kind}, which are no data that `fit` takes. "
                    "Give arrays, a keras.utils.PyDataset, a tf.data.Dataset, "
                    "a PyTorch DataLoader, or a generator of batches. (What "
                    "gives single examples needs a loader around it.)"
                )
            raise DataError(
                f"{part} is a {type(value).__name__} that holds a {kind}: a "
                "list or dict must hold arrays, one for each input or output "
                "of the model. Turn numbers into an array: "
                f"np.array({part})."
            )
    raise AssertionError("these are arrays")
