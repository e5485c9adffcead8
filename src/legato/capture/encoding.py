"""From live objects to a tree of JSON values and arrays."""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from legato.capture.changes import Token
from legato.capture.names import Names
from legato.types import JSON

# Beyond this, readers other than Python's lose digits.
_MAX_INT = 2**63

# What every safetensors reader knows. Other dtypes travel as bytes.
# fmt: off
_PLAIN_DTYPES = frozenset({
    "bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64",
    "uint8", "uint16", "uint32", "uint64",
})
# fmt: on

MAX_IMMUTABLE_DEPTH = 100


class UncapturableError(Exception):
    """An object turned out not to be capturable; `args[0]` says why."""


class References:
    """Objects that a checkpoint refers to by name and does not contain.

    The model and the other callbacks are such: a callback that holds one of
    them gets, when it is restored, the one of the running program.

    Args:
        objects: the objects by name.
        more: gives further ones, when something is met that could be one
            (the variables of the model: too many to list each time).
    """

    def __init__(
        self,
        objects: Mapping[str, object] | None = None,
        more: Callable[[], Mapping[str, object]] | None = None,
    ) -> None:
        self._objects = dict(objects or {})
        self._names = {id(o): name for name, o in self._objects.items()}
        self._more = more

    def _complete(self) -> None:
        if self._more is not None:
            for name, thing in self._more().items():
                self._objects.setdefault(name, thing)
                self._names.setdefault(id(thing), name)
            self._more = None

    def name_of(self, thing: object, *, in_more: bool = False) -> str | None:
        """The name of an object, if it is one of these."""
        if in_more:
            self._complete()
        return self._names.get(id(thing))

    def get(self, name: str) -> object | None:
        """The object of that name, if there is one."""
        if name not in self._objects:
            self._complete()
        return self._objects.get(name)


@dataclasses.dataclass(frozen=True)
class Captured:
    """The state of an object: a snapshot that shares nothing with it.

    Attributes:
        tree: JSON values.
        arrays: the arrays that `tree` refers to by name (copies).
        left_out: attribute path -> why it is not in the state.
        tokens: in memory only: what tells whether something that is left out
            has changed (see `legato.capture.changed`).
    """

    tree: JSON
    arrays: dict[str, np.ndarray]
    left_out: dict[str, str]
    tokens: dict[str, Token] = dataclasses.field(repr=False)


class Codec:
    """How one kind of object is written and put back.

    Restoring has three passes: `children` pairs what was captured with the
    live objects that stand in its place, `make` and `prepare` decode and
    check everything, and only then is anything changed, by the functions
    that `prepare` returned.
    """

    kind: str
    # When the changes are made: objects before what may hash them.
    order = 1

    def encode(self, obj: Any, encoder: "Encoder", path: str) -> dict[str, Any]:
        """The fields of the node of `obj`."""
        raise NotImplementedError

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        """Whether `live` is what this node was captured from."""
        return False

    def children(
        self, node: dict[str, Any], live: Any
    ) -> Iterator[tuple[JSON, Any]]:
        """What is inside: captured, and live in the same place."""
        return iter(())

    def make(self, node: dict[str, Any], live: Any, decoder: Any) -> Any:
        """The object: `live` if it can be changed in place, or a new one."""
        raise NotImplementedError

    def prepare(
        self, node: dict[str, Any], obj: Any, decoder: Any
    ) -> Callable[[], None] | None:
        """Decodes the contents; the result puts them into `obj`."""
        return None


class Encoder:
    """Writes a graph of objects as a flat table.

    The table is flat so that neither recursion here nor the depth of the
    file depends on how deep the user's objects are nested.
    """

    def __init__(
        self,
        find: Callable[[object], Codec | str],
        references: References,
        names: Names,
    ) -> None:
        self._find = find
        self._references = references
        self._names = names
        self._memo: dict[int, int] = {}
        # An id is only good for as long as its object lives, and some
        # (bound methods) are made when they are looked at.
        self._alive: list[object] = []
        self._queue: collections.deque = collections.deque()
        self._depth = 0
        self.nodes: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.left_out: dict[str, str] = {}
        self.tokens: dict[str, Token] = {}

    def run(self) -> None:
        """Writes everything that was met but not written yet."""
        while self._queue:
            number, obj, codec, path, self._depth = self._queue.popleft()
            try:
                fields = codec.encode(obj, self, path)
            except UncapturableError as error:
                fields = self._left_out(obj, path, str(error))
            else:
                fields["kind"] = codec.kind
            self.nodes[number] = fields

    def root(self, obj: object, codec: Codec) -> JSON:
        """How the object itself is written."""
        return {"ref": self._add(obj, codec, "", False)}

    def value(self, obj: object, path: str, *, nested: bool = False) -> JSON:
        """How `obj` is written where it is held.

        Args:
            obj: any object.
            path: where it is, for messages.
            nested: the holder cannot be made before what it holds.
        """
        kind = type(obj)
        if obj is None or kind is bool or kind is float:
            return obj  # type: ignore[return-value]
        if kind is int and -_MAX_INT <= obj < _MAX_INT:  # type: ignore[operator]
            return obj  # type: ignore[return-value]
        if kind is str and _is_text(obj):  # type: ignore[arg-type]
            return obj  # type: ignore[return-value]
        number = self._memo.get(id(obj))
        if number is None:
            name = self._references.name_of(obj)
            if name is not None:
                return {"reference": name}
            codec = self._find(obj)
            if (
                isinstance(codec, Codec)
                and codec.kind in ("variable", "keras")
                and (name := self._references.name_of(obj, in_more=True))
            ):
                return {"reference": name}
            number = self._add(obj, codec, path, nested)
        return {"ref": number}

    def _add(
        self, obj: object, codec: Codec | str, path: str, nested: bool
    ) -> int:
        number = len(self.nodes)
        self._memo[id(obj)] = number
        self._alive.append(obj)
        depth = self._depth + 1 if nested else 0
        if depth > MAX_IMMUTABLE_DEPTH:
            codec = "tuples are nested too deep"
        if isinstance(codec, str):
            self.nodes.append(self._left_out(obj, path, codec))
        else:
            self.nodes.append({})
            self._queue.append((number, obj, codec, path, depth))
        return number

    def _left_out(self, obj: object, path: str, why: str) -> dict[str, Any]:
        self.left_out[path] = why
        self.tokens[path] = Token.of(obj)
        return {"kind": "left out", "path": path, "why": why}

    def note_class(self, obj: object, path: str) -> None:
        """Remembers that `obj` can be put back only if it is there already.

        If it was not there when training began, it will not be there when a
        new process resumes.
        """
        if not self._names.knows(type(obj)):
            self.tokens[path] = Token.of_class(type_name(obj))

    def array(self, array: np.ndarray, path: str) -> dict[str, Any]:
        """Stores a copy of an array; the result describes it."""
        dtype = array.dtype
        if dtype.hasobject:
            raise UncapturableError("an array of Python objects")
        base = re.sub(r"[^A-Za-z0-9_]+", ".", path).strip(".")[:80] or "value"
        name = base
        if name in self.arrays:
            name = f"{base}.{len(self.arrays)}"
        # A copy in any case: the callback may go on to change its array while
        # the checkpoint is still being written.
        copy = np.array(array, order="C", copy=True, subok=False)
        node: dict[str, Any] = {"array": name}
        if dtype.name not in _PLAIN_DTYPES or not dtype.isnative:
            node["dtype"] = _describe(dtype)
            node["shape"] = list(copy.shape)
            copy = np.frombuffer(copy.tobytes(), np.uint8)
        if array.flags.fnc:
            # Sums over it would be taken in another order.
            node["order"] = "F"
        self.arrays[name] = copy
        return node


def _is_text(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, as in odd file names
        return False
    return True


def _describe(dtype: np.dtype) -> JSON:
    if dtype.fields is not None:
        # In the order of `names`, which that of `fields` need not be.
        parts = [(name, *dtype.fields[name][:2]) for name in dtype.names or ()]  # pyright: ignore
        described = [[name, _describe(part), at] for name, part, at in parts]
        return [*described, dtype.itemsize]
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"of": _describe(base), "shape": list(shape)}
    # `bfloat16.str` is "<V2", which would come back as something else.
    return dtype.str if dtype.type.__module__ == "numpy" else dtype.name


def type_name(obj: object) -> str:
    """The full name of the type of an object."""
    cls = type(obj)
    return f"{cls.__module__}.{cls.__qualname__}"
