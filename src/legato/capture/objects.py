"""How instances, functions, methods and classes are captured."""

# ruff: noqa: D102 - what the methods of a codec do is said in `Codec`
import dis
import functools
import hashlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from legato.capture.decoding import ABSENT, Decoder, field
from legato.capture.encoding import Codec, Encoder, UncapturableError
from legato.capture.names import (
    is_library,
    name_of,
    public_name,
    user_classes,
)
from legato.errors import DamagedError, RestoreError


def is_plain(cls: type) -> bool:
    """Whether instances hold nothing but a `__dict__` and slots.

    A class that is written in C, or has such a base, is larger than that: it
    has state that no attribute shows.
    """
    size = object.__basicsize__
    pointer = np.dtype(np.intp).itemsize
    # Where the interpreter keeps these two apart, their offsets are negative.
    size += pointer * (cls.__dictoffset__ > 0)
    size += pointer * (cls.__weakrefoffset__ > 0)
    size += pointer * len(_slots(cls))
    has_any = cls.__dictoffset__ != 0 or bool(_slots(cls))
    return has_any and cls.__itemsize__ == 0 and cls.__basicsize__ <= size


@functools.lru_cache(maxsize=1024)
def _slots(cls: type) -> dict[str, types.MemberDescriptorType]:
    return {
        name: slot
        for base in reversed(cls.__mro__)
        if "__slots__" in vars(base)  # classes in C have members too
        for name, slot in vars(base).items()
        if isinstance(slot, types.MemberDescriptorType)
    }


def _dict_of(obj: object) -> dict[str, Any] | None:
    if type(obj).__dictoffset__ == 0:
        return None
    return object.__getattribute__(obj, "__dict__")


def attributes(obj: object) -> Iterator[tuple[str, Any]]:
    """The attributes that an instance itself holds, in slots or its dict."""
    for name, slot in _slots(type(obj)).items():
        try:
            yield name, slot.__get__(obj)
        except AttributeError:  # a slot may be empty
            continue
    yield from list((_dict_of(obj) or {}).items())


def encode_attributes(
    obj: object,
    encoder: Encoder,
    path: str,
    skip: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The attributes, as fields of a node."""
    prefix = f"{path}." if path else ""
    return {
        "attributes": {
            name: encoder.value(value, f"{prefix}{name}")
            for name, value in attributes(obj)
            if name not in skip and isinstance(name, str)
        }
    }


def attribute_pairs(
    node: dict[str, Any], live: Any
) -> Iterator[tuple[Any, Any]]:
    """Captured attributes with the live ones."""
    here = dict(attributes(live))
    for name, value in field(node, "attributes", dict).items():
        yield value, here.get(name, ABSENT)


def prepare_attributes(
    node: dict[str, Any], obj: Any, decoder: Decoder, skip: frozenset[str]
) -> Callable[[], None]:
    """Decodes the attributes; the result sets them on `obj`.

    Attributes that the checkpoint does not have are removed, as the callback
    had removed them; those that could not be captured are left as they are.
    """
    slots = _slots(type(obj))
    inside = _dict_of(obj)
    new: dict[str, Any] = {}
    kept: set[str] = set(skip)
    for name, value in field(node, "attributes", dict).items():
        if name in skip:
            continue
        if decoder.is_left_out(value):
            if decoder.is_new(obj):
                raise RestoreError(
                    f"a `{type(obj).__qualname__}` is not there when training "
                    f"begins, and its `{name}` could not be saved."
                )
            kept.add(name)
            continue
        if name not in slots and inside is None:
            raise RestoreError(
                f"`{type(obj).__qualname__}` has no attribute `{name:.80}`."
            )
        new[name] = decoder.value(value)
    gone = []
    for name, value in attributes(obj):
        # What was not there and could not have been saved says nothing.
        if name not in {*new, *kept} and decoder.is_capturable(value):
            gone.append(name)
            decoder.note_removed(obj, name)

    def apply() -> None:
        for name in gone:
            if name in slots:
                slots[name].__delete__(obj)
            else:
                inside.pop(name)  # type: ignore[union-attr]
        for name, value in new.items():
            # Past `__setattr__` and properties, which could do anything.
            if name in slots:
                slots[name].__set__(obj, value)
            else:
                inside[name] = value  # type: ignore[index]

    return apply


class ObjectCodec(Codec):
    """An instance of a Python class: its attributes."""

    kind = "object"
    order = 0

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        encoder.note_class(obj, path)
        return {
            "class": name_of(type(obj)),
            **encode_attributes(obj, encoder, path),
        }

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return name_of(type(live)) == node.get("class") and is_plain(type(live))

    def children(self, node: dict[str, Any], live: Any) -> Any:
        yield from attribute_pairs(node, live)

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        if live is not None:
            return live
        cls = decoder.find(node, type)
        if not is_plain(cls) or issubclass(cls, type):
            raise RestoreError(f"a `{cls.__qualname__}` cannot be made.")
        # No constructor runs, nor a `__new__` or `__setstate__` of the class.
        made = object.__new__(cls)
        if not decoder.is_written_by(made, self):  # a member of an enum, ...
            raise RestoreError(f"a `{cls.__qualname__}` cannot be made.")
        return made

    def prepare(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None]:
        return prepare_attributes(node, obj, decoder, frozenset())


class RootCodec(ObjectCodec):
    """The object that is captured: also what its classes hold for it.

    A counter may be an attribute of a class, or be in a cell or a global
    variable that a method changes.
    """

    kind = "root"

    def __init__(self, skip: frozenset[str]) -> None:
        self._skip = skip

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        node = {
            "class": name_of(type(obj)),
            **encode_attributes(obj, encoder, path, self._skip),
        }
        classes = {
            cls.__qualname__: {
                name: encoder.value(value, f"{cls.__name__}.{name}")
                for name, value in _class_state(cls)
            }
            for cls in user_classes(type(obj))
        }
        classes = {name: state for name, state in classes.items() if state}
        if classes:
            node["classes"] = classes
        return node

    def children(self, node: dict[str, Any], live: Any) -> Any:
        for name, value in field(node, "attributes", dict).items():
            if name not in self._skip:
                yield value, dict(attributes(live)).get(name, ABSENT)
        for cls, state in self._classes(node, live):
            here = dict(_class_state(cls))
            for name, value in state.items():
                yield value, here.get(name, ABSENT)

    def _classes(
        self, node: dict[str, Any], live: Any
    ) -> Iterator[tuple[type, dict[str, Any]]]:
        classes = node.get("classes", {})
        if not isinstance(classes, dict):
            raise DamagedError("callback state: `classes` is no dict.")
        for cls in user_classes(type(live)):
            state = classes.get(cls.__qualname__, {})
            if not isinstance(state, dict):
                raise DamagedError("callback state: `classes` is no dict.")
            yield cls, state

    def prepare(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None]:
        own = prepare_attributes(node, obj, decoder, self._skip)
        new: list[tuple[type, str, Any]] = []
        for cls, state in self._classes(node, obj):
            here = dict(_class_state(cls))
            for name, captured in state.items():
                if decoder.is_left_out(captured):
                    continue
                if name not in here and not name.isidentifier():
                    raise DamagedError(f"callback state: {name!r:.80}.")
                value = decoder.value(captured)
                # A function's state is restored in it; the class keeps it.
                if not isinstance(value, types.FunctionType):
                    if name in vars(cls) and name not in here:
                        raise RestoreError(
                            f"`{cls.__qualname__}.{name}` is now no value."
                        )
                    new.append((cls, name, value))

        def apply() -> None:
            own()
            for cls, name, value in new:
                if vars(cls).get(name, ABSENT) is not value:
                    type.__setattr__(cls, name, value)

        return apply


def _class_state(cls: type) -> list[tuple[str, Any]]:
    """What of the attributes of a class can be state."""
    state = []
    for name, value in list(vars(cls).items()):
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if isinstance(value, types.FunctionType):
            if _has_state(value):
                state.append((name, value))
        elif not (
            name.startswith("__")
            or name == "_abc_impl"
            or hasattr(type(value), "__get__")
        ):
            state.append((name, value))
    return state


def _has_state(function: types.FunctionType) -> bool:
    return bool(
        function.__dict__
        or _cells(function)
        or function.__defaults__
        or function.__kwdefaults__
        or _stored_globals(function.__code__)
    )


def _cells(function: types.FunctionType) -> dict[str, types.CellType]:
    return {
        name: cell
        for name, cell in zip(
            function.__code__.co_freevars,
            function.__closure__ or (),
            strict=True,
        )
        if name != "__class__"  # the compiler's, for `super()`
    }


@functools.lru_cache(maxsize=1024)
def _stored_globals(code: types.CodeType) -> tuple[str, ...]:
    """The global variables that a function assigns."""
    names = {
        str(instruction.argval)
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_stored_globals(constant))
    return tuple(sorted(names))


@functools.lru_cache(maxsize=1024)
def _digest(code: types.CodeType) -> str:
    """Tells two lambdas apart, which have the same name."""
    constants = [
        _digest(c) if isinstance(c, types.CodeType) else repr(c)
        for c in code.co_consts
        if not isinstance(c, frozenset)  # its order is the process's
    ]
    parts = (code.co_code.hex(), code.co_names, code.co_varnames, constants)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class FunctionCodec(Codec):
    """A Python function: its name, and its state.

    State is what its cells hold (`nonlocal`), the global variables that it
    assigns, its own attributes and its defaults. A function that is local, or
    a lambda, can only be restored where it is in the program too.
    """

    kind = "function"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        name = public_name(obj) or name_of(obj)
        node: dict[str, Any] = {"name": name, "code": _digest(obj.__code__)}
        if is_library(obj.__module__):
            return node
        cells = {}
        for cell_name, cell in _cells(obj).items():
            try:
                contents = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            where = f"{path}.<{cell_name}>"
            cells[cell_name] = encoder.value(contents, where)
        node["cells"] = cells
        node["globals"] = {
            stored: encoder.value(
                obj.__globals__[stored], f"{path}.<global {stored}>"
            )
            for stored in _stored_globals(obj.__code__)
            if stored in obj.__globals__
        }
        for part in ("__dict__", "__defaults__", "__kwdefaults__"):
            value = getattr(obj, part)
            if value:
                node[part] = encoder.value(value, f"{path}.{part}")
        return node

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return self.resembles(node, live) and (
            _digest(live.__code__) == node.get("code")
        )

    def resembles(self, node: dict[str, Any], live: Any) -> bool:
        """Whether `live` may be a newer version of the captured function."""
        return isinstance(live, types.FunctionType) and node.get("name") in (
            name_of(live),
            public_name(live),
        )

    def children(self, node: dict[str, Any], live: Any) -> Any:
        cells = _cells(live)
        for name, value in field(node, "cells", dict, {}).items():
            try:
                yield value, cells[name].cell_contents
            except (KeyError, ValueError):
                continue
        for name, value in field(node, "globals", dict, {}).items():
            if name in _stored_globals(live.__code__):
                yield value, live.__globals__.get(name, ABSENT)
        for part in ("__dict__", "__defaults__", "__kwdefaults__"):
            if part in node:
                yield node[part], getattr(live, part)

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        if live is not None:
            return live
        name = node.get("name")
        if isinstance(name, list) and "<" in str(name[-1:]):
            raise RestoreError(
                f"the function `{name[-1]!s:.80}` is not found in its place: "
                "only functions of a module can be found by name."
            )
        return decoder.find(node, types.FunctionType, key="name")

    def prepare(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None] | None:
        if is_library(obj.__module__) or "cells" not in node:
            return None
        cells = _cells(obj)
        new_cells: list[tuple[types.CellType, Any]] = []
        for name, value in field(node, "cells", dict).items():
            if name not in cells:
                raise RestoreError(
                    f"`{obj.__qualname__}` has no variable `{name:.80}` now."
                )
            if not decoder.is_left_out(value):
                new_cells.append((cells[name], decoder.value(value)))
        stored = _stored_globals(obj.__code__)
        new_globals = {
            name: decoder.value(value)
            for name, value in field(node, "globals", dict).items()
            # By the function's own code only: a file may not set others.
            if name in stored and not decoder.is_left_out(value)
        }
        parts = {
            part: decoder.value(node[part])
            for part in ("__dict__", "__defaults__", "__kwdefaults__")
            if part in node and not decoder.is_left_out(node[part])
        }
        for part, value in parts.items():
            if not isinstance(
                value, tuple if part == "__defaults__" else dict
            ) or (part != "__dict__" and not getattr(obj, part)):
                raise DamagedError(f"callback state: `{part}` of a function.")

        def apply() -> None:
            for cell, value in new_cells:
                cell.cell_contents = value
            obj.__globals__.update(new_globals)
            for part, value in parts.items():
                if getattr(obj, part) is not value:
                    setattr(obj, part, value)

        return apply


class NamedCodec(Codec):
    """A class, a ufunc or a function of Python's own: by name."""

    kind = "named"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        name = public_name(obj) or name_of(obj)
        if name is None:
            raise UncapturableError("a function without a name")
        return {"name": name}

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return callable(live) and node.get("name") in (
            public_name(live),
            name_of(live),
        )

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        if live is not None:
            return live
        return decoder.find(node, object, key="name")


class MethodCodec(Codec):
    """A bound method: its object, and its function or, a library's, its name.

    Methods of one's own are functions that may have state.
    """

    kind = "method"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        function = obj.__func__
        where = f"{path}.__self__"
        node = {"self": encoder.value(obj.__self__, where, nested=True)}
        if is_library(getattr(function, "__module__", None)):
            node["name"] = function.__name__
        else:
            where = f"{path}.__func__"
            node["function"] = encoder.value(function, where, nested=True)
        return node

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return isinstance(live, types.MethodType)

    def children(self, node: dict[str, Any], live: Any) -> Any:
        yield node.get("self"), live.__self__
        yield node.get("function"), live.__func__

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        owner = decoder.value(node.get("self"))
        if "name" in node:
            method = _library_method(owner, field(node, "name", str))
        else:
            function = decoder.value(node.get("function"))
            if not isinstance(function, types.FunctionType) or owner is None:
                raise DamagedError("callback state: a method is none.")
            method = types.MethodType(function, owner)
        return live if live == method else method


def _library_method(owner: object, name: str) -> types.MethodType:
    for base in type(owner).__mro__:
        function = vars(base).get(name)
        if function is None:
            continue
        # NumPy's are no Python functions, but bind like them; what else
        # binds (a property) would run.
        if (
            isinstance(function, types.FunctionType)
            or type(function).__name__ == "cython_function_or_method"
        ) and is_library(function.__module__):
            return types.MethodType(function, owner)
        break
    raise RestoreError(f"`{name:.80}` is no method of a captured object.")


class BuiltinMethodCodec(Codec):
    """A bound method of a captured list, generator, ...: `items.append`."""

    kind = "builtin method"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        return {
            "self": encoder.value(
                obj.__self__, f"{path}.__self__", nested=True
            ),
            "name": obj.__name__,
        }

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return is_builtin_method(live) and live.__name__ == node.get("name")

    def children(self, node: dict[str, Any], live: Any) -> Any:
        yield node.get("self"), live.__self__

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        owner = decoder.value(node.get("self"))
        name = field(node, "name", str)
        if not name.startswith("_") and is_library(type(owner).__module__):
            method = getattr(owner, name, None)
            if (
                is_builtin_method(method)
                and getattr(method, "__self__", None) is owner
            ):
                return method
        raise RestoreError(f"`{name:.80}` is no method of a captured object.")


def is_builtin_method(obj: object) -> bool:
    """Whether it is a method, written in C, of an object (not a module)."""
    if not isinstance(obj, types.BuiltinMethodType):
        return False
    owner = getattr(obj, "__self__", None)
    return owner is not None and not isinstance(owner, types.ModuleType | type)
