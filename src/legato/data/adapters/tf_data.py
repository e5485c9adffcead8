"""`tf.data.Dataset`, on any backend."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from legato.data.readers import Passes, Reader
from legato.errors import DataError

# A copy of a dataset holds its arrays three times while it is made.
_COPIED_BYTES = 512 * 2**20

# Where these follow a shuffle, a pass that was only begun does not leave its
# generator where a whole pass does: they begin their input late, again, or
# not at all.
_LATE = ("Cache", "Concatenate", "Repeat", "ShuffleAndRepeat")


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
        functions = [
            node for f in graph.library.function for node in f.node_def
        ]
        for node in (*graph.node, *functions):
            order = _attribute(node, "deterministic")
            if order is not None and order.s == b"false":
                self._note_order()
                break
        shuffles = [node for node in graph.node if _is_random(node)]
        for node in shuffles:
            seeds = [
                constants[name]
                for name in node.input
                if name in constants and _is_integer(constants[name])
            ][-2:]
            if seeds and not any(int(tf.make_ndarray(s)) for s in seeds):
                self._note_seed(f"{node.op.removesuffix('V3')} has no seed")
        for node in functions:
            if _draws(node) and not _has_seed(node):
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
        # Its own objects tell less, but whether it shuffles.
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
        self._opened += 1
        for handle, name in self._handles:
            # Under the same name a copy would share it with the dataset.
            handle.name = f"{name}/legato/{id(self)}/{self._opened}"
        with tf.device("CPU:0"):
            variant = tf.raw_ops.DatasetFromGraph(
                graph_def=self._graph.SerializeToString()
            )
        copy = tf.data.experimental.from_variant(
            variant, self._dataset.element_spec
        )
        return _CountedPasses(copy, self._skip)


class _Passes(Passes):
    """Iterates over a dataset."""

    def __init__(self, dataset: Any) -> None:
        self._dataset: Any = dataset

    def begin(self, number: int) -> Iterator[Any]:
        return map(_to_numpy, iter(self._dataset))

    def close(self) -> None:
        self._dataset = None


class _CountedPasses(_Passes):
    """Iterates over a dataset that counts the iterations.

    Args:
        dataset: the dataset.
        skip: what must be drawn of a pass that is skipped; None: all of it.
    """

    def __init__(self, dataset: Any, skip: int | None) -> None:
        super().__init__(dataset)
        self._skip = skip
        self._begun = 0

    def begin(self, number: int) -> Iterator[Any]:
        while self._begun < number:
            self._begun += 1
            for _ in itertools.islice(iter(self._dataset), self._skip):
                pass
        self._begun += 1
        return super().begin(number)


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


def _is_integer(tensor: Any) -> bool:
    return tensor.dtype == tf.int64.as_datatype_enum
