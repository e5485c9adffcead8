"""What the user's dataset changes in itself while it is read.

A dataset may shuffle its own indices when an epoch ends, or draw from a
generator of its own. Such attributes belong to the position in the data. The
data themselves do not: large arrays and containers that are as they were are
not saved, only recognised.
"""

import dataclasses
import math
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from legato import capture
from legato.data.source import DataState
from legato.errors import DamagedError, LegatoError, RestoreError

# Larger ones are recognised by what lies in them, not saved again and again.
_SMALL_BYTES = 2**20
_SMALL_ITEMS = 1000
# Read whole to see whether they changed; of larger ones, some rows are.
_READ_BYTES = 16 * 2**20
_SAMPLED_ROWS = 4096
# Of arrays of indices up to this size there is a copy.
_COPIED_BYTES = 64 * 2**20
# What changed is saved up to these sizes.
_SAVED_BYTES = 256 * 2**20
_SAVED_ITEMS = 100_000


@dataclasses.dataclass(frozen=True)
class Look:
    """What an object looked like at one instant.

    Attributes:
        state: what changed since it was built, to be saved; None: nothing.
        lost: the paths of what changed and cannot be saved.
        tokens: tell whether something that cannot be saved changed.
    """

    state: DataState
    lost: list[str]
    tokens: Mapping[str, capture.Token]

    def same(self, other: "Look") -> bool:
        """Whether the object looked the same then."""
        return (
            same_states(self.state, other.state)
            and self.lost == other.lost
            and not capture.changed(self.tokens, other.tokens)
        )


class Attributes:
    """The state of one object of the user's, relative to how it was built.

    Make it when the object is as a new process would find it.

    Args:
        owner: an instance of a Python class.
        skip: attributes of it that are none of its state.
        apart: objects in it whose state somebody else saves.
    """

    def __init__(
        self,
        owner: object,
        skip: frozenset[str] = frozenset(),
        apart: Sequence[object] = (),
    ) -> None:
        self.subject = owner
        self._skip = skip
        self._large = _LargeObjects(apart)
        self._shallow = dict(_vars(owner))
        self._unseen: str | None = None
        try:
            self._built = self._capture()
        except Exception as error:  # of a class that we know nothing of
            self._unseen = f"{type(error).__name__}: {error!s:.100}"
        self._large.recording = False

    def _capture(self) -> capture.Captured:
        self._large.begin()
        return capture.capture(
            self.subject, skip=self._skip, references=self._large
        )

    def look(self) -> "Look":
        """What changed since it was built."""
        if self._unseen is not None:
            return Look(None, [], {})
        orders, lost = self._large.compare()
        try:
            now = self._capture()
        except _TooLargeError as error:
            return Look(None, [str(error)], {})
        lost += capture.changed(self._built.tokens, now.tokens)
        if not orders and not lost and _same(now, self._built):
            return Look(None, [], now.tokens)
        arrays: dict[str, Any] = dict(now.arrays)
        state = {"tree": now.tree, "arrays": arrays, "orders": orders}
        return Look(state, lost, now.tokens)

    def set(self, state: DataState) -> None:
        """Put a state back, on the object as it was built: see `reset`.

        Raises:
            DamagedError: it is not one.
            RestoreError: it does not fit the object.
        """
        if self._unseen is not None or state is None:
            return
        match state:
            case {
                "tree": tree,
                "arrays": dict(arrays),
                "orders": dict(orders),
            }:
                pass
            case _:
                raise DamagedError("data state: not that of attributes.")
        self._large.reorder(orders)
        self._restore(tree, arrays)

    def reset(self) -> None:
        """Back to how it was built.

        Raises:
            RestoreError: something changed of which there is no copy.
        """
        look = self.look()
        if look.state is None:
            return
        lost = self._large.unreturnable()
        if lost:
            raise RestoreError(
                f"{type(self.subject).__name__}: {', '.join(lost[:3])} changed "
                "in this process, and there is no copy of what was there. "
                "Resume in a new process."
            )
        self._large.reset()
        here = _vars(self.subject)
        for name in [n for n in here if n not in self._shallow]:
            del here[name]
        here.update(self._shallow)
        self._restore(self._built.tree, self._built.arrays)

    def _restore(self, tree: Any, arrays: Mapping[str, Any]) -> None:
        try:
            capture.restore(
                self.subject,
                tree,
                arrays,
                skip=self._skip,
                references=self._large,
            )
        except LegatoError as error:
            raise type(error)(
                f"The state of {type(self.subject).__name__} does not fit: "
                f"{error}"
            ) from error

    @property
    def unseen(self) -> str | None:
        """Why nothing can be said about the object; None if it can."""
        return self._unseen


def _vars(owner: object) -> dict[str, Any]:
    return getattr(owner, "__dict__", {})


def _same(one: capture.Captured, other: capture.Captured) -> bool:
    return same_states(one.tree, other.tree) and same_states(
        one.arrays, other.arrays
    )


def same_states(one: Any, other: Any) -> bool:
    """Whether two states, or lists of them, are the same bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.tobytes() == other.tobytes()
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            same_states(value, other[key]) for key, value in one.items()
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_states, one, other))
    if isinstance(one, float):
        return one.hex() == other.hex()
    return one == other


class _TooLargeError(Exception):
    """More than may be saved at each checkpoint."""


class _LargeObjects(capture.References):
    """Large objects, by the order in which they were met at the beginning.

    While one is as it was, or was only put into another order, a snapshot
    refers to it by name.
    """

    def __init__(self, apart: Sequence[object]) -> None:
        super().__init__()
        self.recording = True
        self._known: dict[int, _Large] = {}
        self._named: dict[str, _Large] = {}
        for thing in apart:
            self._add(_Large(thing, f"apart {len(self._known)}"))
        self._changed: set[int] = set()
        self.begin()

    def begin(self) -> None:
        """A snapshot begins."""
        self._bytes = 0
        self._objects = 0

    def name_of(self, thing: object, *, in_more: bool = False) -> str | None:
        name = self._find(thing, in_more)
        if name is None:
            self._objects += 1
            if isinstance(thing, np.ndarray):
                self._bytes += thing.nbytes
            if self._bytes > _SAVED_BYTES or self._objects > _SAVED_ITEMS:
                raise _TooLargeError(
                    f"{self._bytes} bytes in {self._objects} objects"
                )
        return name

    def _find(self, thing: object, in_more: bool) -> str | None:
        known = self._known.get(id(thing))
        if known is None and self.recording and not in_more:
            known = _large(thing, f"large {len(self._known)}")
            if known is not None:
                self._add(known)
        if known is None or id(thing) in self._changed:
            return None
        return known.name

    def _add(self, known: "_Large") -> None:
        self._known[id(known.held)] = known
        self._named[known.name] = known

    def get(self, name: str) -> object | None:
        known = self._named.get(name)
        return None if known is None else known.held

    def unreturnable(self) -> list[str]:
        """Those that changed, and of which there is no copy."""
        return [
            known.what
            for known in self._known.values()
            if not known.can_be_reset() and not known.is_same()
        ]

    def compare(self) -> tuple[dict[str, np.ndarray], list[str]]:
        """The new orders of those with one, and those that are lost."""
        orders: dict[str, np.ndarray] = {}
        lost = []
        self._changed.clear()
        for key, known in self._known.items():
            if known.is_same():
                continue
            order = known.order()
            if order is not None:
                orders[known.name] = order
            elif known.can_be_saved():
                self._changed.add(key)
            else:
                lost.append(f"{known.what} ({known.name})")
        return orders, lost

    def reset(self) -> None:
        """As it was at the beginning, where a copy was kept."""
        for known in self._known.values():
            known.reset()
        self._changed.clear()

    def reorder(self, orders: Mapping[str, Any]) -> None:
        """Apply what `compare` gave.

        Raises:
            DamagedError: it did not.
            RestoreError: there is no such object.
        """
        for name, order in orders.items():
            known = self._named.get(name)
            if known is None:
                raise RestoreError(
                    f"the data hold no {name!r:.80}, which the checkpoint has "
                    "an order of. Resume with the data of the run."
                )
            known.reorder(order)


def _large(thing: Any, name: str) -> "_Large | None":
    if isinstance(thing, np.ndarray):
        if isinstance(thing, np.memmap):
            return _Large(thing, name)  # not to be read whole
        if thing.dtype == object and thing.ndim == 1:
            return _Sequence(thing, name)
        if thing.nbytes > _SMALL_BYTES and not thing.dtype.hasobject:
            return _Array(thing, name)
    elif type(thing) is list and len(thing) > _SMALL_ITEMS:
        return _Sequence(thing, name)
    elif type(thing) in (dict, set) and len(thing) > _SMALL_ITEMS:
        return _Keyed(thing, name)
    elif isinstance(thing, keras.optimizers.Optimizer):
        return _Large(thing, name)
    elif isinstance(thing, keras.Layer):
        # What is trained is no state of the data; what augments them is.
        bytes_held = sum(_bytes(v) for v in thing.variables)
        if thing.trainable_variables or bytes_held > _SMALL_BYTES:
            return _Large(thing, name)
    elif isinstance(thing, _pandas()):
        return _Frame(thing, name)
    elif _bytes(thing) > _SMALL_BYTES:
        if type(thing).__module__.startswith("torch"):
            return _Tensor(thing, name)
        return _Large(thing, name)  # other tensors are values
    return None


def _bytes(thing: Any) -> int:
    """Of an array or a tensor of any library; 0 of anything else."""
    if not hasattr(type(thing), "__array__"):
        return 0
    try:
        return math.prod(thing.shape) * 4
    except (AttributeError, TypeError):  # of an unknown shape
        return 0


def _pandas() -> tuple[Any, ...]:
    pandas: Any = sys.modules.get("pandas")
    if pandas is None or not hasattr(pandas, "Series"):
        return ()
    return pandas.DataFrame, pandas.Series, pandas.Index


class _Large:
    """One that is known by its identity alone."""

    def __init__(self, held: Any, name: str) -> None:
        self.held = held
        self.name = name
        self.what = f"a {type(held).__name__}"

    def is_same(self) -> bool:
        return True

    def order(self) -> np.ndarray | None:
        """Where its items were at the beginning, if only that changed."""
        return None

    def can_be_saved(self) -> bool:
        return False

    def can_be_reset(self) -> bool:
        return False

    def reset(self) -> None:
        """Put back the copy, if there is one."""

    def reorder(self, order: Any) -> None:
        raise DamagedError(f"data state: an order of {self.what}.")


class _Array(_Large):
    """An array of numbers."""

    def __init__(self, held: np.ndarray, name: str) -> None:
        super().__init__(held, name)
        self.what = f"an array of {held.nbytes} bytes"
        self._digest = self._compute()
        # Indices are shuffled in place; of data there need be no copy.
        is_index = held.ndim == 1 and held.nbytes <= _COPIED_BYTES
        self._copy = held.copy() if is_index else None

    def _compute(self) -> int:
        array = self.held
        if array.nbytes > _READ_BYTES:
            rows = np.linspace(0, len(array) - 1, _SAMPLED_ROWS)
            array = array[np.unique(rows.astype(np.int64))]
        contiguous: Any = np.ascontiguousarray(array)
        return zlib.crc32(memoryview(contiguous).cast("B"))

    def is_same(self) -> bool:
        return self._compute() == self._digest

    def can_be_saved(self) -> bool:
        return self.held.nbytes <= _SAVED_BYTES

    def can_be_reset(self) -> bool:
        return self._copy is not None

    def reset(self) -> None:
        if self._copy is not None:
            self.held[...] = self._copy


class _Tensor(_Large):
    """A tensor of PyTorch's, which can be changed in place."""

    def __init__(self, held: Any, name: str) -> None:
        super().__init__(held, name)
        self._digest = self._compute()

    def _compute(self) -> object:
        if _bytes(self.held) > _READ_BYTES:
            return None
        return zlib.crc32(self.held.detach().cpu().contiguous().numpy())

    def is_same(self) -> bool:
        return self._compute() == self._digest


class _Sequence(_Large):
    """A list, or an array of objects: names of files, say."""

    def __init__(self, held: Any, name: str) -> None:
        super().__init__(held, name)
        self.what = f"a {type(held).__name__} of {len(held)} items"
        self._items = list(held)

    def is_same(self) -> bool:
        items = self._items
        return len(self.held) == len(items) and all(map(_is, self.held, items))

    def order(self) -> np.ndarray | None:
        if len(self.held) != len(self._items):
            return None
        here, built = _ids(self.held), _ids(self._items)
        to, by = np.argsort(here), np.argsort(built)
        if not np.array_equal(here[to], built[by]):
            return None
        found = np.empty(len(by), np.int64)
        found[to] = by
        return found

    def can_be_saved(self) -> bool:
        return type(self.held) is list and len(self.held) <= _SAVED_ITEMS

    def can_be_reset(self) -> bool:
        return True

    def reset(self) -> None:
        self.held[:] = self._items

    def reorder(self, order: Any) -> None:
        if (
            not isinstance(order, np.ndarray)
            or order.dtype != np.int64
            or not np.array_equal(np.sort(order), np.arange(len(order)))
        ):
            raise DamagedError("data state: an order is none.")
        if len(order) != len(self._items):
            raise RestoreError(
                f"the checkpoint has an order of {len(order)} items, and the "
                f"data hold {self.what}. Resume with the data of the run."
            )
        self.held[:] = [self._items[i] for i in order]


def _ids(items: Any) -> np.ndarray:
    return np.fromiter(map(id, items), np.int64, len(items))


def _is(one: object, other: object) -> bool:
    return one is other


class _Keyed(_Large):
    """A dict or a set."""

    def __init__(self, held: Any, name: str) -> None:
        super().__init__(held, name)
        self.what = f"a {type(held).__name__} of {len(held)} items"
        self._items = held.copy()

    def _all(self, held: Any) -> Iterator[Any]:
        if isinstance(held, dict):
            for key, value in held.items():
                yield key
                yield value
        else:
            yield from held

    def is_same(self) -> bool:
        return len(self.held) == len(self._items) and all(
            map(_is, self._all(self.held), self._all(self._items))
        )

    def can_be_saved(self) -> bool:
        return len(self.held) <= _SAVED_ITEMS

    def can_be_reset(self) -> bool:
        return True

    def reset(self) -> None:
        if not self.is_same():
            self.held.clear()
            self.held.update(self._items)


class _Frame(_Large):
    """A pandas object: what is in it, if it is not too large to look."""

    def __init__(self, held: Any, name: str) -> None:
        super().__init__(held, name)
        self._digest = self._compute()

    def _compute(self) -> object:
        pandas: Any = sys.modules["pandas"]
        usage: Any = self.held.memory_usage()
        if np.sum(usage) > _READ_BYTES:
            return None
        try:
            hashes = pandas.util.hash_pandas_object(self.held)
        except TypeError:  # lists in its cells, say
            return None
        return np.asarray(hashes).tobytes()

    def is_same(self) -> bool:
        return self._compute() == self._digest
