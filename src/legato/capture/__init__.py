"""The state of plain Python objects, written without pickle.

`capture` looks at an object and everything it holds and gives a tree of JSON
values and some arrays: a snapshot. `restore` puts such a snapshot into an
object of the same kind, in place: a list that the program also holds
elsewhere is refilled, not replaced.

A snapshot is data. Reading one imports nothing, calls no constructor and no
`__setstate__`; classes and functions are those that the live object has in
the same place, or are looked up in the modules that define the live object's
classes.

What cannot be captured (a file, a thread, a generator) is left out and named;
`changed` tells whether it changed meanwhile, so that somebody can be told.
"""

import dataclasses
import enum
import types
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from legato.capture.changes import Token, changed, resource
from legato.capture.containers import (
    CONTAINERS,
    MutableCodec,
    is_named_tuple,
)
from legato.capture.decoding import Decoder
from legato.capture.encoding import (
    Captured,
    Codec,
    Encoder,
    References,
    UncapturableError,
    type_name,
)
from legato.capture.leaves import (
    LEAVES,
    EnumCodec,
    ScalarCodec,
    SeedGeneratorCodec,
    StatesCodec,
    TensorCodec,
    VariableCodec,
)
from legato.capture.names import Names, is_library
from legato.capture.objects import (
    BuiltinMethodCodec,
    FunctionCodec,
    MethodCodec,
    NamedCodec,
    ObjectCodec,
    RootCodec,
    is_builtin_method,
    is_plain,
)
from legato.capture.randoms import RANDOMS
from legato.capture.unchanged import Look, looks, without
from legato.errors import DamagedError, RestoreError
from legato.types import JSON

__all__ = [
    "Captured",
    "Look",
    "References",
    "Restored",
    "Token",
    "capture",
    "changed",
    "decode",
    "fingerprint",
    "looks",
    "prepare",
    "restore",
    "without",
]

_EXACT: dict[type, Codec] = {
    **LEAVES,
    **RANDOMS,
    **CONTAINERS,
    types.FunctionType: FunctionCodec(),
    types.MethodType: MethodCodec(),
}
_ENUM = EnumCodec()
_SCALAR = ScalarCodec()
_TENSOR = TensorCodec()
_VARIABLE = VariableCodec()
_SEED_GENERATOR = SeedGeneratorCodec()
_STATES = StatesCodec()
_NAMED = NamedCodec()
_BUILTIN_METHOD = BuiltinMethodCodec()
_OBJECT = ObjectCodec()

_CODECS: dict[str, Codec] = {
    codec.kind: codec
    for codec in (
        *_EXACT.values(),
        *(_ENUM, _SCALAR, _TENSOR, _VARIABLE, _SEED_GENERATOR, _STATES),
        *(_NAMED, _BUILTIN_METHOD, _OBJECT),
    )
}

# What a broken tree can raise on its way through Python and NumPy.
_ANY_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    UncapturableError,
    ValueError,
    OSError,  # a time zone that is none
)


def _find(obj: object) -> Codec | str:
    """How an object is captured, or why it is not."""
    cls = type(obj)
    if obj is None or cls is bool or cls is float:
        return _OBJECT  # any will do: `Encoder.value` writes these itself
    codec = _EXACT.get(cls)
    if codec is not None:
        return codec
    for test, codec in _BY_BASE:
        if isinstance(obj, test):
            return codec
    if is_builtin_method(obj):
        return _BUILTIN_METHOD
    if isinstance(obj, (types.BuiltinFunctionType, np.ufunc)):
        return _NAMED
    if keras.ops.is_tensor(obj):
        return _TENSOR
    why = resource(obj)
    if why is not None:
        return why
    return _find_subclass(obj)


_BY_BASE: tuple[tuple[Any, Codec], ...] = (
    (enum.Enum, _ENUM),
    (np.generic, _SCALAR),
    (keras.Variable, _VARIABLE),
    (keras.random.SeedGenerator, _SEED_GENERATOR),
    (
        (keras.Layer, keras.metrics.Metric, keras.optimizers.Optimizer),
        _STATES,
    ),
    (type, _NAMED),
)


def _find_subclass(obj: object) -> Codec | str:
    cls = type(obj)
    if is_named_tuple(cls):
        return _EXACT[tuple]
    # The nearest base first: a subclass of `Counter` is one of `dict` too.
    for base in cls.__mro__:
        codec = _EXACT.get(base)
        if isinstance(codec, MutableCodec):
            return codec
    foreign = hasattr(cls, "__array__") and is_library(cls.__module__)
    if isinstance(obj, BaseException) or foreign or not is_plain(cls):
        return f"a `{type_name(obj)}`, whose state cannot be seen"
    return _OBJECT


def capture(
    obj: object,
    *,
    skip: frozenset[str] = frozenset(),
    references: References | None = None,
) -> Captured:
    """Takes a snapshot of the state of an object.

    Arrays are copied, so that the object may change while the snapshot is
    being written to disk.

    Args:
        obj: an instance of a Python class (its attributes are captured), or
            a value, such as a dict.
        skip: attributes of `obj` itself that are none of the state.
        references: objects that are referred to and not captured.

    Returns:
        The snapshot, with what had to be left out.
    """
    references = References() if references is None else references
    names = Names()
    names.trust(type(obj))
    encoder = Encoder(_find, references, names)
    codec = _find(obj)
    if codec is _OBJECT:
        value = encoder.root(obj, RootCodec(skip))
    else:
        value = encoder.value(obj, "")
    encoder.run()
    return Captured(
        {"format": 1, "value": value, "objects": encoder.nodes},
        encoder.arrays,
        encoder.left_out,
        encoder.tokens,
    )


def fingerprint(
    obj: object,
    *,
    skip: frozenset[str] = frozenset(),
    references: References | None = None,
) -> dict[str, Token]:
    """What to compare, with `changed`, to tell whether something was lost."""
    return capture(obj, skip=skip, references=references).tokens


@dataclasses.dataclass(frozen=True)
class Restored:
    """A snapshot that was decoded and checked for one object.

    Attributes:
        left: path -> why: what could not be captured, and is left as it is.
        removed: attributes that the snapshot does not have.
        apply: puts the snapshot into the object.
    """

    left: dict[str, str]
    removed: list[str]
    apply: Callable[[], None] = dataclasses.field(repr=False)


def restore(
    obj: object,
    tree: JSON,
    arrays: Mapping[str, np.ndarray],
    *,
    skip: frozenset[str] = frozenset(),
    references: References | None = None,
) -> Restored:
    """Puts a snapshot into an object of the same class, in place.

    Like `prepare`, whose arguments and errors it has, and then `apply`.
    """
    prepared = prepare(obj, tree, arrays, skip=skip, references=references)
    prepared.apply()
    return prepared


def prepare(
    obj: object,
    tree: JSON,
    arrays: Mapping[str, np.ndarray],
    *,
    skip: frozenset[str] = frozenset(),
    references: References | None = None,
) -> Restored:
    """Gets ready to put a snapshot into an object of the same class.

    The object is restored whole or not at all: everything is decoded and
    checked here, and nothing is changed before `apply` is called.

    Args:
        obj: the live object.
        tree: `Captured.tree`, as it was read.
        arrays: `Captured.arrays`, as they were read.
        skip: as for `capture`.
        references: the objects, in this program, that the snapshot refers to.

    Returns:
        What is to be done, and what has to be left as it is.

    Raises:
        DamagedError: if the tree is not one that `capture` made.
        RestoreError: if it does not fit the object.
    """
    codec = RootCodec(skip)
    decoder, value = _decoder(type(obj), tree, arrays, references, codec)
    try:
        decoder.pair(value, obj)
        live, apply = decoder.decode(value)
    except _ANY_DAMAGE as error:
        raise _damaged(error) from error
    if live is not obj:
        raise RestoreError(
            f"what was captured is no `{type(obj).__qualname__}`."
        )
    return Restored(decoder.left, decoder.removed, lambda: _apply(apply))


def decode(
    tree: JSON,
    arrays: Mapping[str, np.ndarray],
    *,
    like: type = object,
    references: References | None = None,
) -> Any:
    """Makes a value from a snapshot of one.

    Args:
        tree: `Captured.tree`, as it was read.
        arrays: `Captured.arrays`, as they were read.
        like: a class; others may be named if they are of its modules.
        references: the objects, in this program, that the snapshot refers to.

    Returns:
        A new value.

    Raises:
        DamagedError: if the tree is not one that `capture` made.
        RestoreError: if it cannot be made in this program.
    """
    decoder, value = _decoder(like, tree, arrays, references, _OBJECT)
    try:
        made, apply = decoder.decode(value)
    except _ANY_DAMAGE as error:
        raise _damaged(error) from error
    _apply(apply)
    return made


def _decoder(
    cls: type,
    tree: JSON,
    arrays: Mapping[str, np.ndarray],
    references: References | None,
    root: Codec,
) -> tuple[Decoder, JSON]:
    match tree:
        case {"format": 1, "value": value, "objects": list(nodes)}:
            pass
        case _:
            raise DamagedError("callback state: not a snapshot.")
    references = References() if references is None else references
    names = Names()
    names.trust(cls)
    codecs = {**_CODECS, root.kind: root}
    return Decoder(nodes, arrays, codecs, _find, references, names), value


def _apply(apply: Callable[[], None]) -> None:
    try:
        apply()
    except Exception as error:  # a `__hash__` or `__eq__` of the user's
        raise RestoreError(
            f"putting the state back failed: {type(error).__name__}: {error}"
        ) from error


def _damaged(error: Exception) -> DamagedError:
    return DamagedError(
        f"callback state: {type(error).__name__}: {error!s:.200}"
    )
