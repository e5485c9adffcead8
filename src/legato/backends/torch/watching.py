"""What a step asks of Python: a replay of it is right while that stays so."""

import functools
import gc
import operator
import random
import sys
import types
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from legato.rng import get_host_state

# Whose functions look at nothing that may change, but for the attributes of
# the objects below.
_LIBRARIES = sys.stdlib_module_names | {
    *("keras", "torch", "numpy", "legato", "optree", "ml_dtypes", "scipy"),
    *("jax", "tensorflow", "sympy", "pytest", "_pytest"),
}

_OF_KERAS = (
    keras.Layer,
    keras.losses.Loss,
    keras.metrics.Metric,
    keras.optimizers.Optimizer,
    keras.optimizers.schedules.LearningRateSchedule,
    keras.regularizers.Regularizer,
)
_ATOMS = (bool, int, float, complex, str, bytes, type(None))
_SMALL_BYTES = 64 * 1024
_ABSENT = object()


class Watcher:
    """Notes whose Python runs, from `begin` to `end`."""

    def __init__(self) -> None:
        self._owners: dict[int, Any] = {}
        self._codes: dict[types.CodeType, dict[str, Any]] = {}
        self._before: Any = None

    def begin(self) -> None:
        """The step begins."""
        self._before = sys.getprofile()
        sys.setprofile(self._note)

    def end(self) -> None:
        """It ended."""
        sys.setprofile(self._before)

    def _note(self, frame: types.FrameType, event: str, arg: object) -> None:
        del arg
        if event != "call":
            return
        code = frame.f_code
        if code.co_argcount:
            owner = frame.f_locals.get(code.co_varnames[0])
            if isinstance(owner, _OF_KERAS) or _is_users(owner):
                self._owners[id(owner)] = owner
        if not _is_librarys(frame.f_globals.get("__name__")):
            self._codes[code] = frame.f_globals

    def state(self) -> "PythonState":
        """Every plain value that what ran could look at, as it is now.

        Attributes of each object a method of which ran, and of what these
        hold; globals and closure cells of each function that is not a
        library's. Plain are numbers, strings, small arrays, generators of
        random numbers, and containers of these.
        """
        spaces: list[tuple[Mapping[str, Any], Iterable[str]]] = []
        held: list[Any] = []
        for code, space in self._codes.items():
            spaces.append((space, code.co_names))
            for name in code.co_names:
                value = space.get(name)
                if isinstance(value, types.ModuleType):
                    if not _is_librarys(value.__name__):
                        spaces.append((vars(value), code.co_names))
                else:
                    held.append(value)
        cells = [
            cell
            for function in _functions(self._codes)
            for cell in function.__closure__ or ()
        ]
        held += map(_contents, cells)
        owners = [
            weakref.ref(owner)
            for owner in self._owners.values()
            if hasattr(owner, "__weakref__")
        ]
        self._owners.clear()
        self._codes.clear()
        # What the step made and left behind is nobody's state. (It is young.)
        gc.collect(1)
        held += [owner for each in owners if (owner := each()) is not None]
        return PythonState(_reached(held), spaces, cells)


class PythonState:
    """Plain values that a step's Python can see; see `Watcher.state`.

    Args:
        owners: whose attributes count.
        spaces: mappings, and names that count where they are in them.
        cells: of closures.
    """

    def __init__(
        self,
        owners: Iterable[Any],
        spaces: Iterable[tuple[Mapping[str, Any], Iterable[str]]],
        cells: Iterable[types.CellType],
    ) -> None:
        self._atoms: list[tuple[Mapping[str, Any], Any, tuple]] = []
        self._containers: list[tuple[Mapping[str, Any], str, Any]] = []
        classes: dict[type, None] = {}
        self._sizes = []
        for owner in owners:
            self._sizes.append((vars(owner), len(vars(owner))))
            self._add(vars(owner), _names(owner))
            for cls in filter(_is_users_class, type(owner).__mro__):
                classes[cls] = None
        for cls in classes:
            self._add(vars(cls), [n for n in vars(cls) if n[:2] != "__"])
        for space, names in spaces:
            self._add(space, [name for name in names if name in space])
        self._cells = [(cell, _frozen(_contents(cell))) for cell in cells]

    def _add(self, space: Mapping[str, Any], names: list[str]) -> None:
        atoms = [name for name in names if _is_atom(space[name])]
        if atoms:
            # (Of one name it would return no tuple.)
            get = operator.itemgetter(*atoms, atoms[0])
            self._atoms.append((space, get, get(space)))
        for name in names:
            frozen = None if name in atoms else _frozen(space[name])
            if frozen is not None:
                self._containers.append((space, name, frozen))

    def is_same(self) -> bool:
        """Whether all of it is as it was."""
        try:
            # Before each call: tuples compare their elements quickest.
            return (
                all(get(space) == seen for space, get, seen in self._atoms)
                and all(len(space) == size for space, size in self._sizes)
                and all(
                    _frozen(space[name]) == seen
                    for space, name, seen in self._containers
                )
                and all(
                    _frozen(_contents(cell)) == seen
                    for cell, seen in self._cells
                )
            )
        except KeyError:
            return False


def _names(owner: Any) -> list[str]:
    """The attributes of an object that count.

    Keras's and PyTorch's own code keeps books in containers, which would be
    compared at each call: of its attributes, numbers and strings are enough.
    """
    books = _mentioned(type(owner))
    return [
        name
        for name, value in vars(owner).items()
        if name not in books or _is_atom(value)
    ]


@functools.cache
def _mentioned(cls: type) -> frozenset[str]:
    """The names in what a class inherits from libraries."""
    return frozenset(
        name
        for base in cls.__mro__
        if not _is_users_class(base)
        for method in vars(base).values()
        if isinstance(method, types.FunctionType)
        for name in method.__code__.co_names
    )


def _reached(held: list[Any]) -> list[Any]:
    """The objects among these, and those of users that they hold."""
    found: dict[int, Any] = {}
    while held:
        value = held.pop()
        if isinstance(value, list | tuple):
            held += [v for v in value if not isinstance(v, _ATOMS)]
        elif isinstance(value, dict):
            held += [v for v in value.values() if not isinstance(v, _ATOMS)]
        elif id(value) not in found and hasattr(value, "__dict__"):
            if _is_users(value) or isinstance(value, types.SimpleNamespace):
                found[id(value)] = value
                held += vars(value).values()
            elif isinstance(value, _OF_KERAS):
                found[id(value)] = value
    return list(found.values())


def _is_librarys(module: Any) -> bool:
    return str(module).partition(".")[0] in _LIBRARIES


def _is_users(value: Any) -> bool:
    """Whether it is an instance of a class that is no library's."""
    callables = (type, types.ModuleType, types.FunctionType)
    return _is_users_class(type(value)) and not isinstance(value, callables)


def _is_users_class(cls: type) -> bool:
    return not _is_librarys(cls.__module__)


def _functions(
    codes: Mapping[types.CodeType, Any],
) -> list[types.FunctionType]:
    """The functions of these codes, for a frame does not tell its own."""
    holders = gc.get_referrers(*codes) if codes else []
    return [h for h in holders if isinstance(h, types.FunctionType)]


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return _ABSENT


def drawn() -> tuple[Any, ...]:
    """Where Python's and NumPy's global generators are."""
    values, arrays = get_host_state()
    return values, {name: array.tobytes() for name, array in arrays.items()}


def _is_atom(value: Any) -> bool:
    return type(value) in _ATOMS or (
        type(value) is tuple and all(map(_is_atom, value))
    )


def _frozen(value: Any) -> Any:
    """A copy of a plain value, to compare with `==`; None for another."""
    match value:
        case None | bool() | int() | str() | bytes() | float() | complex():
            return type(value), repr(value)
        case np.ndarray() | np.generic() if value.dtype != object:
            if value.nbytes > _SMALL_BYTES:
                return None  # compared at every call: too dear
            return "array", value.dtype, value.shape, value.tobytes()
        case np.random.Generator():
            return "generator", repr(value.bit_generator.state)
        case np.random.RandomState():
            return "generator", repr(value.get_state(legacy=False))
        case random.Random():
            return "generator", value.getstate()
        case list() | tuple():
            contents = [_frozen(each) for each in value]
        case set() | frozenset():
            contents = sorted(repr(_frozen(v)) for v in value if _frozen(v))
        case dict():
            contents = [
                _frozen(v) and (repr(k), _frozen(v)) for k, v in value.items()
            ]
        case _:
            return None
    if any(contents) or not value:
        return type(value), contents
    return None
