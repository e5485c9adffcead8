"""Plain attributes of layers and optimizers, which callbacks may set.

`optimizer.clipnorm`, the `rate` of a Dropout, a regularizer's `l2`: a compiled
step holds them as constants, and they are no variables that a checkpoint would
hold. So who sets one in the midst of a run is found out: the step is traced
again, and the value is saved.
"""

import dis
import functools
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from legato.errors import DamagedError
from legato.state import layer_paths
from legato.types import JSON, AuditEntry, AuditStatus

_HELD = (
    keras.losses.Loss,
    keras.metrics.Metric,
    keras.optimizers.Optimizer,
    keras.optimizers.schedules.LearningRateSchedule,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
)
_WITH_SETTINGS = (keras.Layer, *_HELD)
_SMALL = 100
_ATOMS = {bool, int, float, str, type(None)}

# What these classes look at is the books that Keras and the backends keep.
_BOOKKEEPING = (
    "builtins", "abc", "typing", "torch", "tensorflow", "jax",
    "keras.src.layers.layer", "keras.src.models", "keras.src.trainers",
    "keras.src.backend", "keras.src.ops", "keras.src.saving",
    "keras.src.utils",
)  # fmt: skip
_NOT_IN_STEPS = {
    "__init__", "__repr__", "build", "get_config", "from_config",
    "get_build_config", "build_from_config",
}  # fmt: skip
_NO_SETTING = "built"

Values = dict[str, dict[str, Any]]
"""Of attributes, by the path of their object and by name."""


class Settings:
    """The plain attributes that a step's Python may look at, as they are.

    Numbers, strings, flags and None, in layers and optimizers and in the
    losses, metrics, schedules, regularizers and constraints that these hold:
    those that are mentioned in the code of their classes.

    Args:
        roots: what holds them, by name.
        before: how they were before a step was traced. What the trace itself
            changed, such as a count of calls, is no setting.
    """

    def __init__(
        self, roots: Mapping[str, Any], before: "Settings | None" = None
    ) -> None:
        moved = before._changed() if before else set()
        self._objects = dict(_objects(roots))
        self._watched: dict[str, list[str]] = {}
        # To be asked often: an object's dict, what gets its values, these.
        self._seen: list[tuple[dict[str, Any], Callable[..., Any], tuple]] = []
        for path, each in self._objects.items():
            space = vars(each)
            mentioned = _mentioned(type(each))
            names = [
                name
                for name, value in space.items()
                if name in mentioned
                and _is_atom(value)
                and (path, name) not in moved
            ]
            if names:
                self._watched[path] = names
                # (Of one name it would return no tuple.)
                get = operator.itemgetter(*names, names[0])
                self._seen.append((space, get, get(space)))
        self._first = self.read()

    @property
    def have_changed(self) -> bool:
        """Whether one is another now than when this was made."""
        try:
            return not all(get(now) == seen for now, get, seen in self._seen)
        except Exception:  # it is gone, or a tensor, perhaps of a trace
            return True

    def _changed(self) -> dict[tuple[str, str], tuple[Any, Any]]:
        """What is another than it was: before, and now."""
        return {
            (path, name): (self._first[path][name], value)
            for path, values in self.read().items()
            for name, value in values.items()
            if not _is_same(value, self._first[path][name])
        }

    def differences(self) -> str:
        """What changed, for people: `model/0_dropout.rate is 0.3 (0.1)`."""
        return ", ".join(
            f"{path}.{name} is {now!r:.40} ({before!r:.40})"
            for (path, name), (before, now) in self._changed().items()
        )

    def read(self) -> Values:
        """The values of now."""
        return {
            path: {name: vars(self._objects[path]).get(name) for name in names}
            for path, names in self._watched.items()
        }

    def write(self, values: Values) -> list[str]:
        """Set attributes; returns those of which there is none here."""
        missing = []
        for path, attributes in values.items():
            for name, value in attributes.items():
                if name not in self._watched.get(path, ()):
                    missing.append(f"{path}.{name}")
                elif vars(self._objects[path]).get(name) is not value:
                    setattr(self._objects[path], name, value)
        return missing


class ChangedSettings:
    """Those that are others than when the run began, for checkpoints.

    Attributes:
        inexact: why resuming is not exact, if it is not.
    """

    def __init__(self) -> None:
        self._settings = Settings({})
        self._first: Values = {}
        self._restored: Values = {}
        self.inexact: str | None = None

    def begin(
        self, roots: Mapping[str, Any], metrics: Sequence[Any] = ()
    ) -> None:
        """Note how they are before a callback has its turn; once.

        Args:
            roots: what holds them, by name.
            metrics: of training, and of validation.
        """
        if not self._first:
            self._settings = Settings({**roots, "metrics": list(metrics)})
            self._first = self._settings.read()

    def get_state(self) -> JSON:
        """The changed ones, as JSON."""
        found: dict[str, JSON] = {}
        for path, values in self._settings.read().items():
            first, restored = self._first[path], self._restored.get(path, {})
            changed: dict[str, JSON] = {}
            for name, value in values.items():
                if _is_same(value, first[name]) and name not in restored:
                    continue
                if _is_atom(value):
                    changed[name] = _encode(value)
                elif first[name] is not None:  # else filled by the step itself
                    self.inexact = (
                        f"{path}.{name} was set to {value!r:.80} while the "
                        "run went on, and only numbers, strings and flags can "
                        "be saved with a checkpoint: a run that is resumed "
                        "goes on with the value that the program gives it"
                    )
            if changed:
                found[path] = changed
        return found

    def set_state(self, state: JSON) -> list[AuditEntry]:
        """Put back what `get_state` returned; tells what became of it.

        Raises:
            DamagedError: it is not that.
        """
        if state is None:
            return [AuditEntry("settings", "", AuditStatus.NEW)]
        self._restored = _decode_all(state)
        self._settings.write(self._first)
        missing = self._settings.write(self._restored)
        return [
            AuditEntry("settings", "", AuditStatus.RESTORED),
            *(AuditEntry("settings", m, AuditStatus.MISSING) for m in missing),
        ]


def _is_atom(value: Any) -> bool:
    """Whether it can be saved, exactly: no enumeration's member, say."""
    if isinstance(value, np.generic):
        return value.dtype.kind in "biuf"
    return type(value) in _ATOMS


def _is_same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and repr(one) == repr(other)


def _objects(roots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What has settings, by path."""
    seen: set[int] = set()
    waiting = [*layer_paths(roots).items(), *roots.items()]
    while waiting:
        path, value = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _WITH_SETTINGS):
            yield path, value
            held = vars(value).items()
        elif isinstance(value, Mapping):
            held = value.items()
        else:
            held = enumerate(value)
        waiting += [
            (f"{path}/{name}", each)
            for name, each in held
            if isinstance(each, _HELD)
            or (path in roots and _is_small_container(each))
        ]


def _is_small_container(value: Any) -> bool:
    """Not of examples, for instance: a Task may hold anything."""
    return isinstance(value, dict | list | tuple) and len(value) <= _SMALL


@functools.cache
def _mentioned(cls: type) -> frozenset[str]:
    """The attributes that are read in the code of a class."""
    found: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.startswith(_BOOKKEEPING):
            continue
        names = {
            name
            for method, value in vars(base).items()
            if method not in _NOT_IN_STEPS
            for code in _codes(value)
            for name in _names(code)
        }
        if base.__module__.startswith("keras."):
            names = {name for name in names if not name.startswith("_")}
        found |= names
    return frozenset(found - {_NO_SETTING})


def _codes(value: Any) -> Iterator[types.CodeType]:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    parts = (
        (value.fget, value.fset) if isinstance(value, property) else (value,)
    )
    for each in parts:
        each = getattr(each, "__wrapped__", each)
        if isinstance(each, types.FunctionType):
            yield each.__code__


def _names(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # of a function within
            yield from _names(constant)


def _encode(value: Any) -> JSON:
    if isinstance(value, np.generic):
        return {"dtype": value.dtype.name, "value": value.item()}
    return value


def _decode_all(state: Any) -> Values:
    try:
        return {
            path: {name: _decode(value) for name, value in values.items()}
            for path, values in state.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(
            f"The saved settings of layers and optimizers are damaged: {error}"
        ) from None


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return np.dtype(value["dtype"]).type(value["value"])
    if not _is_atom(value):
        raise TypeError(f"{value!r:.80} is none")
    return value
