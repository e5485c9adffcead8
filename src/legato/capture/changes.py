"""Whether something that a checkpoint leaves out has changed."""

import array
import dataclasses
import hashlib
import io
import operator
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from legato.capture.names import is_library

# Modules whose objects stand for something outside of the program's values.
# fmt: off
_RESOURCES = frozenset({
    "_csv", "_io", "_queue", "_socket", "_thread", "_weakref", "asyncio",
    "concurrent", "contextvars", "csv", "h5py", "io", "logging", "mmap",
    "multiprocessing", "queue", "rich", "select", "selectors", "socket",
    "sqlite3", "ssl", "subprocess", "tempfile", "tensorboardX", "threading",
    "tqdm", "weakref",
})
# fmt: on

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))


def resource(obj: object) -> str | None:
    """Says what an object stands for if that is not a value: a file, ..."""
    if isinstance(obj, types.ModuleType):
        return "a module"
    if isinstance(obj, io.IOBase):
        return "a file"
    for base in type(obj).__mro__:
        if str(base.__module__).partition(".")[0] in _RESOURCES:
            return f"a `{base.__module__}.{base.__qualname__}`"
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Token:
    """What an object looked like at one instant; kept in memory only."""

    held: object  # kept alive, or its id could be another's
    view: tuple[Any, ...] | None  # None: a change of it does not count

    @classmethod
    def of(cls, obj: object) -> "Token":
        """Looks at an object without running any code of the user's."""
        contents = _contents(obj)
        if contents is not None:
            return cls(None, contents)
        if resource(obj) is not None:
            return cls(None, None)
        if isinstance(obj, types.GeneratorType):
            frame = obj.gi_frame
            if frame is None:
                return cls(obj, ("finished",))
            values = frame.f_locals
            return cls(obj, (frame.f_lasti, *_simple(values.items())))
        if isinstance(obj, Iterator) and is_library(type(obj).__module__):
            return cls(obj, tuple(_iterator(obj, 3)))
        return cls(obj, ())

    @classmethod
    def of_class(cls, name: str) -> "Token":
        """For an object that is captured, but must be there to be restored."""
        return cls(None, (name,))

    def same(self, other: "Token") -> bool:
        """Whether it is the same object, looking the same."""
        return self.held is other.held and self.view == other.view


class _Identity:
    """Equal to itself only; holds its object, whose id so stays its own."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


def _simple(items: Any) -> list[Any]:
    return [
        (name, value if isinstance(value, _SIMPLE) else _Identity(value))
        for name, value in items
    ]


def _contents(obj: Any) -> tuple[Any, ...] | None:
    """What is in an object that a library lets one change in place."""
    if not is_library(type(obj).__module__):
        return None
    try:
        return _look_into(obj)
    except Exception:  # on a device that is gone, of a dtype that is not
        return None


def _look_into(obj: Any) -> tuple[Any, ...] | None:
    if isinstance(obj, io.StringIO | io.BytesIO):
        return (obj.getvalue(), obj.tell())
    if isinstance(obj, np.random.SeedSequence):
        return (obj.n_children_spawned, repr(obj.entropy))
    if isinstance(obj, np.ma.MaskedArray):
        mask = np.ma.getmaskarray(obj)
        return (*_array(obj.data), *_array(mask), repr(obj.fill_value))
    if type(obj).__module__.startswith("torch"):
        if type(obj).__name__ == "Generator":
            return _array(obj.get_state().numpy())
        if hasattr(obj, "detach"):
            obj = obj.detach().cpu()
    if hasattr(type(obj), "__array__") or isinstance(obj, array.array):
        return _array(np.asarray(obj))
    if isinstance(obj, memoryview):
        return _array(np.frombuffer(obj, np.uint8))
    return None


def _array(values: np.ndarray) -> tuple[Any, ...]:
    values = np.asarray(values)
    about = (str(values.dtype), values.shape)
    if values.dtype.hasobject:
        return (*about, *_simple(enumerate(values.flat)))
    return (*about, hashlib.sha256(values.tobytes()).hexdigest())


def _iterator(obj: Any, depth: int) -> Iterator[Any]:
    """The position of one of Python's own iterators."""
    try:
        yield operator.length_hint(obj, -1)
        reduced = obj.__reduce__()
    except Exception:  # not every iterator has either
        return
    parts = [reduced] if isinstance(reduced, str) else list(reduced)
    while parts:
        part = parts.pop()
        if isinstance(part, _SIMPLE):
            yield part
        elif isinstance(part, tuple) and len(part) < 10:
            parts.extend(part)
        elif isinstance(part, Iterator) and depth:
            yield from _iterator(part, depth - 1)  # `zip` of iterators


def changed(
    before: Mapping[str, Token], after: Mapping[str, Token]
) -> list[str]:
    """The paths of what was left out and is not what it was.

    Args:
        before: the tokens of a `Captured` when training began.
        after: those of a later one of the same object.
    """
    return [
        path
        for path, token in after.items()
        if token.view is not None
        and (path not in before or not before[path].same(token))
    ]
