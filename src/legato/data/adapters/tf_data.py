"""`tf.data.Dataset`, on any backend.

TensorFlow saves what its iterators hold (positions, the contents of the
buffers of shuffles, of prefetching and of parallel maps) and puts it back. So
the data go on where they were, whatever was in the buffers; but what was in
those of its threads depends on the instant.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from legato.data.encoding import CannotEncodeError
from legato.data.readers import Passes, Reader
from legato.data.source import DataState
from legato.data.state import Opaque
from legato.errors import DamagedError, DataError

# A copy of a dataset holds its arrays three times while it is made.
_COPIED_BYTES = 512 * 2**20

# Where these follow a shuffle, a pass that was only begun does not leave its
# generator where a whole pass does: they begin their input late, again, or
# not at all.
_LATE = ("Cache", "Concatenate", "Repeat", "ShuffleAndRepeat")


# What is larger is not saved: the pass is read again.
_SAVED_BYTES = 64 * 2**20
# To save the contents of a buffer takes as long as to fill a part of it. So
# it is done after so many batches, and the few that follow are read again.
_INTERVAL = 64
_BUFFERED_PER_BATCH = 8

_SAVED_TYPE = "tensorflow::Iterator"
_COMPRESSED_TYPE = "tensorflow.data.CompressedElement"
# Names what is a dataset among the elements that are held: its program would
# be read from the file.
_NESTED_KEY = b"is_dataset"
_FAIL_IF_STATEFUL = 2


# What calls its functions several at a time.
_PARALLEL = (
    *("ParallelMap", "ParallelInterleave", "ParallelFilter"),
    *("MapAndBatch", "LegacyParallelInterleave"),
)
# What draws from a `tf.random.Generator`.
_GENERATORS = (
    *("RngReadAndSkip", "StatefulRandom", "StatefulStandardNormal"),
    *("StatefulTruncatedNormal", "StatefulUniform", "NonDeterministicInts"),
)

_Library = dict[str, list[Any]]
"""The operations of each function, by its name."""


class TensorFlowDataset(Reader):
    """Reads a `tf.data.Dataset` so that each reading is the first.

    A dataset that shuffles anew in each iteration counts the iterations, in
    this process. So each reading has a copy whose count begins at none, and
    pass 3 is begun after three others.

    Args:
        dataset: the dataset.
    """

    kind = "tf.data.Dataset"
    threads = True
    ahead = True
    methods = ("state",)
    tells_end = True
    interval = _INTERVAL

    def __init__(self, dataset: Any) -> None:
        super().__init__()
        if not isinstance(dataset, tf.data.Dataset):
            raise DataError(
                f"a {type(dataset).__name__} is not supported: it belongs to "
                "a distribution. Give the tf.data.Dataset itself."
            )
        self._dataset = dataset
        cardinality = int(dataset.cardinality())
        self.endless = cardinality == tf.data.INFINITE_CARDINALITY
        if cardinality >= 0:
            self.length = cardinality
        self._graph: Any = None
        self._handles: list[Any] = []
        self._skip: int | None = 0
        self._opened = 0
        if dataset.options().deterministic is False:
            self._note_order()
        self._examine()

    def _note_order(self) -> None:
        self.notes.append(
            "its order varies, for it has deterministic=False. Leave that out"
        )

    def _examine(self) -> None:
        """Finds in its graph what changes from pass to pass, or varies."""
        graph = self._serialise()
        if graph is None:
            return
        constants = {
            node.name: node.attr["value"].tensor
            for node in graph.node
            if node.op == "Const"
        }
        library = _library(graph)
        functions = [node for nodes in library.values() for node in nodes]
        in_turn = self._note_parallel((*graph.node, *functions), library)
        for node in (*graph.node, *functions):
            order = _attribute(node, "deterministic")
            if order is not None and order.s == b"false":
                self._note_order()
                break
        shuffles = [node for node in graph.node if _is_random(node)]
        buffered = sum(
            int(tf.make_ndarray(constants[name]))
            for node in shuffles
            for name in list(node.input)[1:2]
            if name in constants and _is_integer(constants[name])
        )
        self.interval = max(_INTERVAL, buffered // _BUFFERED_PER_BATCH)
        for node in shuffles:
            seeds = [
                constants[name]
                for name in node.input
                if name in constants and _is_integer(constants[name])
            ][-2:]
            if seeds and not any(int(tf.make_ndarray(s)) for s in seeds):
                self._note_seed(f"{node.op.removesuffix('V3')} has no seed")
        for node in functions:
            if in_turn and _draws(node) and not _has_seed(node):
                self._note_seed(f"{node.op} in one of its functions has none")
            if node.op.startswith(("Assign", "ResourceScatter")):
                self.notes.append(
                    "one of its functions writes to a tf.Variable, which is "
                    "not put back. Let it depend on its input alone"
                )
                break
        # A second look would fill the buffers again.
        self.cheap = not shuffles
        if any(map(_reshuffles, shuffles)):
            self._graph = graph
            self._find_counts(graph, shuffles)

    def _note_parallel(self, nodes: Iterable[Any], library: _Library) -> bool:
        """Tells of calls that take turns to draw; True if there are none.

        The order of the turns varies: what a trial shows of it is luck.
        """
        for node in nodes:
            if not _calls_in_parallel(node):
                continue
            for called in _called(node, library):
                if _takes_turns(called):
                    self._note_turns(f"{called.op} in a function of {node.op}")
                    return False
        return True

    def _note_parallel_of(self, dataset: Any) -> bool:
        """The same of a dataset that is not in a graph; True if it does."""
        for function in getattr(dataset, "_functions", list)():
            graph = function.function.graph.as_graph_def()
            library = _library(graph)
            nodes = [
                *graph.node,
                *(node for each in library.values() for node in each),
            ]
            name = type(dataset).__name__.strip("_")
            if name.startswith(_PARALLEL):
                for node in nodes:
                    if _takes_turns(node):
                        self._note_turns(f"{node.op} in a function of {name}")
                        return True
            if not self._note_parallel(nodes, library):
                return True
        return False

    def _note_turns(self, what: str) -> None:
        self.notes.append(
            f"{what} draws in calls that run in parallel, in an order that "
            "varies, whatever its seed is. Use tf.random.stateless_uniform "
            "(or another stateless operation) with a seed made of the element "
            "or of its number (`enumerate()`), or leave out num_parallel_calls"
        )

    def _find_counts(self, graph: Any, shuffles: list[Any]) -> None:
        """Finds where the graph keeps what it counts."""
        # Nodes come after their inputs.
        shuffled: set[str] = set()
        late = []
        for node in graph.node:
            after = any(n.partition(":")[0] in shuffled for n in node.input)
            if after or node in shuffles:
                shuffled.add(node.name)
                if node.op.startswith(_LATE):
                    late.append(node)
            if after and node in shuffles:
                self._skip = 1  # a shuffle begins its input when it is drawn
        if late:
            self._skip = None
        # A cache of what comes before may be shared, and filled once.
        used = {name for node in (*shuffles, *late) for name in node.input}
        self._handles = [
            (handle, handle.name)
            for node in graph.node
            if node.op == "Const" and node.name in used
            for handle in node.attr["value"].tensor.resource_handle_val
        ]

    def _note_seed(self, what: str) -> None:
        self.notes.append(
            f"{what}: another process draws something else. Give it one: "
            "`shuffle(..., seed=1)`, or call keras.utils.set_random_seed "
            "before the dataset is made"
        )

    def _serialise(self) -> Any:
        too_large = _held_bytes(self._dataset) > _COPIED_BYTES
        graph: Any = tf.compat.v1.GraphDef()
        if not too_large:
            with contextlib.suppress(tf.errors.OpError):
                # (1: what lies outside of the graph is referred to.)
                text = tf.raw_ops.DatasetToGraphV2(
                    input_dataset=_variant(self._dataset),
                    external_state_policy=1,
                )
                graph.ParseFromString(text.numpy())
                return graph
        # Its own objects tell less, but what is called, and whether it
        # shuffles.
        for each in _chain(self._dataset):
            if self._note_parallel_of(each):
                break
        shuffles = [
            each
            for each in _chain(self._dataset)
            if "Shuffle" in type(each).__name__
        ]
        for each in shuffles:
            seeds = [getattr(each, name, 0) for name in ("_seed", "_seed2")]
            if not any(map(int, seeds)):
                self._note_seed("a shuffle has no seed")
        if any(getattr(s, "_reshuffle_each_iteration", 1) for s in shuffles):
            why = "is large" if too_large else "refers to what is outside of it"
            self.cheap = False
            self.notes.append(
                f"it shuffles, and cannot be copied (it {why}): its order "
                "depends on how often it was iterated over in this process. "
                "Shuffle with reshuffle_each_iteration=False, or give arrays "
                "or a keras.utils.PyDataset"
            )
        return None

    def open(self) -> Passes:
        """A copy that was never iterated over, where that matters."""
        if self._graph is None:
            return _Passes(self._dataset)
        return _CountedPasses(self._copy, self._skip)

    def _copy(self) -> Any:
        self._opened += 1
        for handle, name in self._handles:
            # Under the same name a copy would share it with the dataset.
            handle.name = f"{name}/legato/{id(self)}/{self._opened}"
        with tf.device("CPU:0"):
            variant = tf.raw_ops.DatasetFromGraph(
                graph_def=self._graph.SerializeToString()
            )
        return tf.data.experimental.from_variant(
            variant, self._dataset.element_spec
        )


class _Passes(Passes):
    """Iterates over a dataset."""

    def __init__(self, dataset: Any) -> None:
        self._dataset: Any = dataset
        self._iterator: Any = None

    def begin(self, number: int) -> Iterator[Any]:
        self._iterator = iter(self._dataset)
        return map(_to_numpy, self._iterator)

    def get_state(self) -> DataState | None:
        return _save(self._iterator)

    def resume(self, number: int, state: DataState) -> Iterator[Any]:
        self._iterator = iter(self._dataset)
        _restore(self._iterator, state)
        return map(_to_numpy, self._iterator)

    def close(self) -> None:
        self._dataset = self._iterator = None


class _CountedPasses(_Passes):
    """Iterates over a dataset that counts the iterations.

    Args:
        copy: makes one that was never iterated over.
        skip: what must be drawn of a pass that is skipped; None: all of it.
    """

    def __init__(self, copy: Callable[[], Any], skip: int | None) -> None:
        super().__init__(copy())
        self._copy = copy
        self._skip = skip
        self._begun = 0
        self._resumed = False

    def begin(self, number: int) -> Iterator[Any]:
        if self._resumed:
            # The iterator that was put back knows the count, not the dataset.
            self._dataset, self._begun = self._copy(), 0
            self._resumed = False
        while self._begun < number:
            self._begun += 1
            for _ in itertools.islice(iter(self._dataset), self._skip):
                pass
        self._begun += 1
        return super().begin(number)

    def get_state(self) -> DataState | None:
        if self._skip is None and self._begun > 1:
            return None  # of what has not begun, the count is not in it
        return super().get_state()

    def resume(self, number: int, state: DataState) -> Iterator[Any]:
        self._resumed = True
        return super().resume(number, state)


def _save(iterator: Any) -> DataState:
    try:
        with tf.device("CPU:0"):
            saved = tf.raw_ops.SerializeIterator(
                resource_handle=iterator._iterator_resource,
                external_state_policy=_FAIL_IF_STATEFUL,
            )
            held = tf.io.serialize_tensor(saved).numpy()
    except tf.errors.OpError as error:
        why = str(error.message).rpartition("}}")[2].partition("[Op")[0]
        raise CannotEncodeError(
            f"TensorFlow cannot save where it is: {why.strip()}"
        ) from error
    if _NESTED_KEY in held:
        raise CannotEncodeError(
            "its buffers hold datasets, as windows are, and no program is "
            "read from a checkpoint"
        )
    if len(held) > _SAVED_BYTES:
        raise CannotEncodeError(
            f"its buffers hold {len(held) / 2**20:.0f} MB, and at most "
            f"{_SAVED_BYTES / 2**20:.0f} MB are saved"
        )
    return np.frombuffer(held, np.uint8).copy().view(Opaque)


def _restore(iterator: Any, state: DataState) -> None:
    if not isinstance(state, np.ndarray) or state.dtype != np.uint8:
        raise DamagedError("data state: not that of tf.data.")
    _check(state.tobytes())
    with tf.device("CPU:0"):
        tf.raw_ops.DeserializeIterator(
            resource_handle=iterator._iterator_resource,
            serialized=tf.io.parse_tensor(state.tobytes(), tf.variant),
        )


def _check(held: bytes) -> None:
    """That it holds values alone, and no dataset (which has functions)."""
    tensor = tf.compat.v1.make_tensor_proto(0)
    variant: Any = type(tensor.variant_val.add())
    try:
        tensor.ParseFromString(held)
        count = tensor.tensor_shape.dim[0].size
        content, sizes = tensor.tensor_content, []
        for _ in range(count):
            size, content = _varint(content)
            sizes.append(size)
        is_good = len(content) == sum(sizes)
        for size in sizes:
            part = variant.FromString(content[:size])
            content = content[size:]
            is_good &= (
                part.type_name == _SAVED_TYPE
                and _NESTED_KEY not in part.metadata
                and all(map(_holds_values, part.tensors))
            )
    except Exception as error:  # of the parser, which has many
        raise DamagedError(f"data state: not that of tf.data: {error}") from (
            error
        )
    if not is_good:
        raise DamagedError("data state: not that of tf.data.")


def _holds_values(tensor: Any) -> bool:
    """Whether a tensor in a state holds numbers and texts, and no dataset."""
    if tensor.dtype != tf.variant.as_datatype_enum:
        return tensor.dtype != tf.resource.as_datatype_enum
    # (In its content anything could lie, in a format of its own.)
    return not tensor.tensor_content and all(
        each.type_name == _COMPRESSED_TYPE and not each.tensors
        for each in tensor.variant_val
    )


def _varint(content: bytes) -> tuple[int, bytes]:
    value = shift = 0
    for i, byte in enumerate(content[:10]):
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, content[i + 1 :]
    raise ValueError("a length has no end")


def _to_numpy(element: Any) -> Any:
    return tf.nest.map_structure(_leaf_to_numpy, element)


def _leaf_to_numpy(leaf: Any) -> Any:
    if isinstance(leaf, tf.RaggedTensor):
        leaf = leaf.to_tensor()
    elif isinstance(leaf, tf.SparseTensor):
        leaf = tf.sparse.to_dense(leaf)
    return None if leaf is None else np.asarray(leaf)


def _variant(dataset: Any) -> Any:
    return tf.data.experimental.to_variant(dataset)


def _chain(dataset: Any) -> Iterator[Any]:
    yield dataset
    for each in getattr(dataset, "_inputs", list)():
        yield from _chain(each)


def _held_bytes(dataset: Any) -> int:
    """Of the arrays that the dataset was made from."""
    return sum(
        tensor.dtype.size * (tensor.shape.num_elements() or 0)
        for each in _chain(dataset)
        for tensor in getattr(each, "_tensors", ())
        if isinstance(tensor, tf.Tensor)
    )


def _is_random(node: Any) -> bool:
    return "Shuffle" in node.op or node.op.startswith("RandomDataset")


def _reshuffles(node: Any) -> bool:
    names = ("reshuffle_each_iteration", "rerandomize_each_iteration")
    return any(node.attr[name].b for name in names if name in node.attr)


def _attribute(node: Any, name: str) -> Any:
    # To ask for one that is not there would put it there.
    return node.attr.get(name)


def _has_seed(node: Any) -> bool:
    seeds = [_attribute(node, name) for name in ("seed", "seed2")]
    return any(seed is not None and seed.i for seed in seeds)


def _draws(node: Any) -> bool:
    """Whether it is an operation with a generator of its own."""
    return "seed2" in node.attr and "Dataset" not in node.op


def _library(graph: Any) -> _Library:
    return {f.signature.name: list(f.node_def) for f in graph.library.function}


def _calls_in_parallel(node: Any) -> bool:
    return node.op.startswith(_PARALLEL)


def _takes_turns(node: Any) -> bool:
    return _draws(node) or node.op.startswith(_GENERATORS)


def _called(node: Any, library: _Library) -> Iterator[Any]:
    """The operations of a node's functions, and of those that they call."""
    seen: set[str] = set()
    upcoming = [node]
    while upcoming:
        for value in upcoming.pop().attr.values():
            for each in (value.func, *value.list.func):
                if each.name and each.name not in seen:
                    seen.add(each.name)
                    yield from library.get(each.name, ())
                    upcoming += library.get(each.name, ())


def _is_integer(tensor: Any) -> bool:
    return tensor.dtype == tf.int64.as_datatype_enum
