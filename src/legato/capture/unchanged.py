"""Which attributes are as the program made them, and so are no state."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import numpy as np

from legato.capture.encoding import Captured
from legato.types import JSON

# Fields of a node whose keys are the user's: names of attributes and
# variables, which may be "ref" or "array".
_NAMESPACES = frozenset({"attributes", "cells", "classes", "globals"})

# Kinds of nodes that a program may make anew with other contents.
_DRAWN = frozenset(
    {
        *("Generator", "RandomState", "array", "bit generator", "keras"),
        *("random", "scalar", "seed generator", "tensor", "uuid", "variable"),
    }
)

_SCALARS = (bool, int, float, str, type(None))


@dataclasses.dataclass(frozen=True)
class Look:
    """What an attribute looks like, the same in every process.

    Attributes:
        digest: of everything that it holds.
        num_bytes: of its arrays.
    """

    digest: str
    num_bytes: int


def looks(
    captured: Captured, arguments: Container[str], *, min_bytes: int
) -> dict[str, Look]:
    """What those attributes look like that may be left to the program.

    Left out are attributes that share an object with others (one alone is
    not what the two were) and those of which something is not captured.

    Args:
        captured: of an instance of a class.
        arguments: attributes that the constructor was given. They count if
            they are plain values: a layer, a generator or an array that a
            program makes anew may be another each time.
        min_bytes: others count if their arrays are as large.
    """
    graph = _Graph(captured)
    found = {}
    for name, value in graph.attributes.items():
        given = name in arguments
        if isinstance(value, _SCALARS):
            if given:
                found[name] = Look(_hash(json.dumps(value)), 0)
            continue
        inside = graph.reached(name)
        num_bytes = graph.num_bytes(inside)
        counts = num_bytes >= min_bytes or (given and graph.is_plain(inside))
        if counts and graph.is_alone(inside) and not graph.has_gaps(inside):
            found[name] = Look(graph.digest(value), num_bytes)
    return found


def without(captured: Captured, names: frozenset[str]) -> Captured:
    """A snapshot without attributes of which there is a `Look`."""
    if not names:
        return captured
    graph = _Graph(captured)
    gone = {n for name in names for n in graph.reached(name)}
    arrays = {a for n in gone for a in graph.arrays(n)}
    tree: Any = captured.tree
    nodes: list[Any] = [
        # In their places, for others are referred to by number.
        {"kind": "left out", "path": "", "why": "unchanged"}
        if number in gone
        else node
        for number, node in enumerate(tree["objects"])
    ]
    nodes[graph.root] = nodes[graph.root] | {
        "attributes": {
            name: value
            for name, value in graph.attributes.items()
            if name not in names
        }
    }
    kept = {k: v for k, v in captured.arrays.items() if k not in arrays}
    return Captured(
        tree | {"objects": nodes}, kept, captured.left_out, captured.tokens
    )


class _Graph:
    """What refers to what in a snapshot of an instance."""

    def __init__(self, captured: Captured) -> None:
        tree: Any = captured.tree
        self._nodes: list[dict[str, Any]] = tree["objects"]
        self._arrays: Mapping[str, np.ndarray] = captured.arrays
        self.root: int = tree["value"]["ref"]
        self.attributes: dict[str, JSON] = self._nodes[self.root]["attributes"]
        self._holders: dict[int, int] | None = None
        self._reached: dict[str, set[int]] = {}

    def reached(self, name: str) -> set[int]:
        """The numbers of the nodes that an attribute holds."""
        if name not in self._reached:
            self._reached[name] = self._reach(self.attributes[name])
        return self._reached[name]

    def _reach(self, value: JSON) -> set[int]:
        found: set[int] = set()
        numbers = list(_refs(value))
        while numbers:
            number = numbers.pop()
            if number not in found:
                found.add(number)
                if number == self.root:
                    break  # then it is not alone, whatever else there is
                numbers += _refs_of_node(self._nodes[number])
        return found

    def is_alone(self, inside: set[int]) -> bool:
        """Whether no other attribute holds any of these."""
        if self._holders is None:
            self._holders = {}
            root = self._nodes[self.root]
            values = [
                value
                for state in root.get("classes", {}).values()
                for value in state.values()
            ]
            sets = [self._reach(value) for value in values]
            sets += [self.reached(name) for name in self.attributes]
            for each in sets:
                for number in each:
                    self._holders[number] = self._holders.get(number, 0) + 1
        return self.root not in inside and all(
            self._holders[number] == 1 for number in inside
        )

    def is_plain(self, inside: set[int]) -> bool:
        """Whether it is what somebody wrote down: no arrays, no generators."""
        return not any(self._nodes[n]["kind"] in _DRAWN for n in inside)

    def has_gaps(self, inside: set[int]) -> bool:
        """Whether something in it is not captured."""
        return any(self._nodes[n]["kind"] == "left out" for n in inside)

    def arrays(self, number: int) -> Iterator[str]:
        """The names of the arrays of a node."""
        for value in _values(self._nodes[number]):
            if isinstance(value, dict) and isinstance(value.get("array"), str):
                yield value["array"]

    def num_bytes(self, inside: set[int]) -> int:
        """The size of the arrays of these nodes."""
        return sum(
            self._arrays[name].nbytes
            for number in inside
            for name in self.arrays(number)
        )

    def digest(self, value: JSON) -> str:
        """Of everything that a value holds, wherever in the table it is."""
        order: dict[int, int] = {}
        waiting: list[int] = []

        def local(ref: int) -> int:
            if ref not in order:
                order[ref] = len(order)
                waiting.append(ref)
            return order[ref]

        parts: list[Any] = [_rewritten(value, local, self._of_array)]
        while waiting:
            node = self._nodes[waiting.pop(0)]
            parts.append(_rewritten_node(node, local, self._of_array))
        return _hash(json.dumps(parts, sort_keys=True))

    def _of_array(self, name: str) -> str:
        array = self._arrays[name]
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        about = f"{array.dtype.str} {array.shape} "
        return about + hashlib.sha256(data.data).hexdigest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _values(node: dict[str, Any]) -> Iterator[Any]:
    """The values in a node, down to references and arrays."""
    queue: list[Any] = []
    for key, value in node.items():
        # A node that is an array's has its name as a field.
        if key == "array" and isinstance(value, str):
            yield {"array": value}
        elif key in _NAMESPACES and isinstance(value, dict):
            queue += value.values()
        else:
            queue.append(value)
    while queue:
        value = queue.pop()
        if isinstance(value, list):
            queue += [v for v in value if isinstance(v, list | dict)]
        elif isinstance(value, dict):
            yield value
            if not ("ref" in value or "array" in value):
                queue += value.values()


def _refs(value: Any) -> Iterator[int]:
    if isinstance(value, dict) and type(value.get("ref")) is int:
        yield value["ref"]


def _refs_of_node(node: dict[str, Any]) -> Iterator[int]:
    for value in _values(node):
        yield from _refs(value)


def _rewritten(
    value: Any, local: Callable[[int], int], of_array: Callable[[str], str]
) -> Any:
    if isinstance(value, list):
        return [_rewritten(each, local, of_array) for each in value]
    if isinstance(value, dict):
        if type(value.get("ref")) is int:
            return {"ref": local(value["ref"])}
        if isinstance(value.get("array"), str):
            return value | {"array": of_array(value["array"])}
        return {k: _rewritten(v, local, of_array) for k, v in value.items()}
    return value


def _rewritten_node(
    node: dict[str, Any],
    local: Callable[[int], int],
    of_array: Callable[[str], str],
) -> Any:
    written = {}
    for key, value in node.items():
        if key in _NAMESPACES and isinstance(value, dict):
            written[key] = [
                [name, _rewritten(each, local, of_array)]
                for name, each in value.items()
            ]
        elif key == "array" and isinstance(value, str):
            written[key] = of_array(value)
        else:
            written[key] = _rewritten(value, local, of_array)
    return written
