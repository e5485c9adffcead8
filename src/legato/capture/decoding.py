"""From a tree of JSON values back into live objects.

The tree is not trusted. Whatever is wrong with it, the result is a
`DamagedError` or a `RestoreError`, and nothing has been changed.
"""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from legato.capture.encoding import Codec, References
from legato.capture.names import Names, is_library
from legato.errors import DamagedError, RestoreError
from legato.types import JSON

ABSENT = object()
"""Stands for a live value that is not there."""

_MAX_DEPTH = 400  # frames of Python: `make` and `value` for each level

_NO_DEFAULT: Any = object()


def field(
    node: Mapping[str, Any], name: str, kind: type, default: Any = _NO_DEFAULT
) -> Any:
    """A field of a node that has the type it must have.

    Raises:
        DamagedError: if it has not.
    """
    value = node.get(name, default)
    # `True` is an int for Python, but not in what we wrote.
    if type(value) is not kind:
        raise DamagedError(
            f"callback state: `{name}` is {type(value).__name__}, not "
            f"{kind.__name__}."
        )
    return value


class Decoder:
    """Decodes one tree; see `Codec` for its three passes.

    Args:
        nodes: the table of objects.
        arrays: the arrays that they name.
        codecs: how each kind is decoded.
        find: tells whether an object can be captured.
        references: the objects that the tree refers to.
        names: what may be looked up by name.
    """

    def __init__(
        self,
        nodes: list[Any],
        arrays: Mapping[str, np.ndarray],
        codecs: Mapping[str, Codec],
        find: Callable[[object], Codec | str],
        references: References,
        names: Names,
    ) -> None:
        for node in nodes:
            if not isinstance(node, dict) or not (
                node.get("kind") == "left out"
                or (
                    isinstance(node.get("kind"), str) and node["kind"] in codecs
                )
            ):
                raise DamagedError("callback state: an unknown kind of object.")
        self._nodes = nodes
        self._arrays = arrays
        self._codecs = codecs
        self._find = find
        self._references = references
        self._names = names
        self._live: dict[int, object] = {}
        self._claimed: set[int] = set()
        self._made: dict[int, object] = {}
        self._making: set[int] = set()
        self._new: set[int] = set()
        self._decoded: dict[int, np.ndarray] = {}
        self._unprepared: collections.deque[int] = collections.deque()
        self._resembling: list[tuple[int, object]] = []
        self.removed: list[str] = []
        self.left = {
            str(node.get("path")): str(node.get("why"))
            for node in nodes
            if node["kind"] == "left out"
        }

    # -- pass 1: what stands where ------------------------------------------

    def pair(self, value: JSON, live: object) -> None:
        """Takes `live` to be what `value` was captured from, and goes on.

        One live object stands for one captured object: lists that were two
        do not become one because the program begins with one.
        """
        self._pair(value, live)
        # Functions that were edited since: only if nothing fits better.
        while self._resembling:
            number, function = self._resembling.pop(0)
            if number not in self._live and id(function) not in self._claimed:
                self._claim(number, function)

    def _pair(self, value: JSON, live: object) -> None:
        queue: collections.deque = collections.deque([(value, live)])
        while queue:
            value, live = queue.popleft()
            number = self._number(value)
            if number is None or live is ABSENT or number in self._live:
                continue
            node = self._nodes[number]
            if node["kind"] == "left out":
                self._live[number] = live
                continue
            if id(live) in self._claimed:
                continue
            codec = self._codecs[node["kind"]]
            if codec.accepts(node, live):
                queue.extend(self._claim(number, live))
            elif getattr(codec, "resembles", _never)(node, live):
                self._resembling.append((number, live))

    def _claim(self, number: int, live: object) -> list[tuple[JSON, object]]:
        self._live[number] = live
        self._claimed.add(id(live))
        if not is_library(type(live).__module__):
            self._names.trust(type(live))
        node = self._nodes[number]
        return list(self._codecs[node["kind"]].children(node, live))

    def _number(self, value: JSON) -> int | None:
        if type(value) is dict and len(value) == 1 and "ref" in value:
            number = field(value, "ref", int)
            if not 0 <= number < len(self._nodes):
                raise DamagedError("callback state: a dangling reference.")
            return number
        return None

    # -- pass 2: everything is made and checked -----------------------------

    def decode(self, value: JSON) -> tuple[Any, Callable[[], None]]:
        """The object that `value` describes, and what puts its contents in.

        Raises:
            DamagedError: if the tree is not one that was captured.
            RestoreError: if it cannot be put into this program.
        """
        obj = self.value(value)
        changes = []
        while self._unprepared:
            number = self._unprepared.popleft()
            node = self._nodes[number]
            codec = self._codecs[node["kind"]]
            change = codec.prepare(node, self._made[number], self)
            if change is not None:
                changes.append((codec.order, -number, change))
        changes.sort(key=lambda item: item[:2])

        def apply() -> None:
            for _, _, change in changes:
                change()

        return obj, apply

    def value(self, value: JSON) -> Any:
        """The object that a value describes; its contents may come later."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        number = self._number(value)
        if number is not None:
            return self._object(number)
        if type(value) is dict and len(value) == 1 and "reference" in value:
            name = field(value, "reference", str)
            found = self._references.get(name)
            if found is None:
                raise RestoreError(f"it refers to {name!r}, which is not here.")
            return found
        raise DamagedError("callback state: no value.")

    def _object(self, number: int) -> Any:
        if number in self._made:
            return self._made[number]
        node = self._nodes[number]
        live = self._live.get(number)
        if node["kind"] == "left out":
            if live is None or not isinstance(self._find(live), str):
                raise RestoreError(
                    f"it holds {node.get('why')!s:.100}, which could not be "
                    "saved, and which is not there when training begins."
                )
            return live
        if number in self._making or len(self._making) > _MAX_DEPTH:
            raise DamagedError("callback state: nested without end.")
        self._making.add(number)
        codec = self._codecs[node["kind"]]
        obj = codec.make(node, live, self)
        self._making.discard(number)
        self._made[number] = obj
        if obj is not live:
            self._new.add(id(obj))
        self._unprepared.append(number)
        return obj

    def find(self, node: Mapping[str, Any], kind: type, key="class") -> Any:
        """The class or function that a node names.

        Raises:
            RestoreError: if it may not be looked up, or is not there.
        """
        found = self._names.find(node.get(key))
        if not isinstance(found, kind):
            raise RestoreError(f"{node.get(key)!r:.200} is something else now.")
        return found

    def is_left_out(self, value: JSON) -> bool:
        """Whether a value stands for something that could not be captured."""
        number = self._number(value)
        return number is not None and self._nodes[number]["kind"] == "left out"

    def is_new(self, obj: object) -> bool:
        """Whether the object was made here, and was not in the program."""
        return id(obj) in self._new

    def is_written_by(self, obj: object, codec: Codec) -> bool:
        """Whether this is how an object would have been written."""
        return self._find(obj) is codec

    def is_capturable(self, live: object) -> bool:
        """Whether a live value would be in a checkpoint."""
        return not isinstance(self._find(live), str)

    def note_removed(self, obj: object, name: str) -> None:
        """Remembers that an attribute is removed."""
        if not self.is_new(obj):
            self.removed.append(f"{type(obj).__qualname__}.{name}")

    def array(self, node: Mapping[str, Any]) -> np.ndarray:
        """The array that a node describes (not to be changed).

        Raises:
            DamagedError: if it is missing or is not as described.
        """
        if id(node) in self._decoded:
            return self._decoded[id(node)]
        array = self._arrays.get(field(node, "array", str))
        if not isinstance(array, np.ndarray) or array.dtype.hasobject:
            raise DamagedError("callback state: an array is missing.")
        if "dtype" in node:
            dtype = _dtype(node["dtype"])
            shape = field(node, "shape", list)
            if array.dtype != np.uint8 or array.ndim != 1:
                raise DamagedError("callback state: an array is not as bytes.")
            # Counted by us: the shape could be larger than any memory.
            count = 1
            for length in shape:
                if type(length) is not int or length < 0:
                    raise DamagedError("callback state: a shape is none.")
                count *= length
            if count * dtype.itemsize != array.size:
                raise DamagedError("callback state: an array has another size.")
            array = np.ndarray(shape, dtype, buffer=array.tobytes())
        if node.get("order") == "F":
            array = np.asfortranarray(array)
        self._decoded[id(node)] = array
        return array


def _never(node: object, live: object) -> bool:
    return False


def _dtype(description: object, depth: int = 5) -> np.dtype:
    if isinstance(description, str) and len(description) < 40:
        dtype = np.dtype(description)
    elif isinstance(description, dict) and depth:
        base = _dtype(description.get("of"), depth - 1)
        dtype = np.dtype((base, tuple(field(description, "shape", list))))
    elif isinstance(description, list) and description and depth:
        *parts, size = description
        names, formats, offsets = [], [], []
        for name, part, offset in parts:
            names.append(name)
            formats.append(_dtype(part, depth - 1))
            offsets.append(offset)
        dtype = np.dtype(
            {
                "names": names,
                "formats": formats,
                "offsets": offsets,
                "itemsize": size,
            }
        )
    else:
        raise DamagedError("callback state: a dtype is none.")
    if dtype.hasobject:
        raise DamagedError("callback state: an array of objects.")
    return dtype
