"""How Python's containers are captured, their subclasses included."""

# ruff: noqa: D102 - what the methods of a codec do is said in `Codec`
import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any

from legato.capture.decoding import ABSENT, Decoder, field
from legato.capture.encoding import Codec, Encoder, type_name
from legato.capture.names import name_of
from legato.capture.objects import (
    attribute_pairs,
    encode_attributes,
    prepare_attributes,
)
from legato.errors import DamagedError, RestoreError


class TupleCodec(Codec):
    """Tuples and named tuples; `frozenset` differs in how it is paired."""

    kind = "tuple"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        node: dict[str, Any] = {
            "items": [
                encoder.value(item, f"{path}[{i}]", nested=True)
                for i, item in enumerate(obj)
            ]
        }
        if type(obj) is not tuple:
            node["class"] = name_of(type(obj))
            encoder.note_class(obj, path)
        return node

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return isinstance(live, tuple) and _has_class(node, live, tuple)

    def children(self, node: dict[str, Any], live: Any) -> Any:
        yield from zip(field(node, "items", list), live, strict=False)

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        items = [decoder.value(item) for item in field(node, "items", list)]
        cls: Any = tuple
        if "class" in node:
            cls = type(live) if live is not None else decoder.find(node, type)
            if not is_named_tuple(cls) or len(cls._fields) != len(items):
                raise RestoreError(
                    f"`{cls.__qualname__}` is no named tuple of {len(items)}."
                )
        # The tuple's own `__new__`: a class could override it.
        made = tuple.__new__(cls, items)
        same = (
            live is not None
            and len(live) == len(made)
            and all(a is b for a, b in zip(live, made, strict=True))
        )
        return live if same else made


class FrozenSetCodec(Codec):
    """A `frozenset`."""

    kind = "frozenset"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        return {"items": _encode_set(obj, encoder, path, nested=True)}

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        items = [decoder.value(item) for item in field(node, "items", list)]
        for item in items:
            check_hashable(item)
        return frozenset(items)


class RangeCodec(Codec):
    """`range` and `slice`."""

    def __init__(self, cls: type) -> None:
        self.kind = cls.__name__
        self._cls = cls

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        bounds = (obj.start, obj.stop, obj.step)
        return {"items": [encoder.value(b, path, nested=True) for b in bounds]}

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        return self._cls(
            *[decoder.value(item) for item in field(node, "items", list)]
        )


class MutableCodec(Codec):
    """A container that is changed in place.

    The containers' own methods are called by their classes' names, so that
    none of a subclass that overrides them is.
    """

    def __init__(self, cls: type) -> None:
        self.kind = cls.__name__
        self.cls: Any = cls

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        node: dict[str, Any] = {"items": self.items(obj, encoder, path)}
        if type(obj) is not self.cls:
            node["class"] = name_of(type(obj))
            node.update(encode_attributes(obj, encoder, path))
            encoder.note_class(obj, path)
        return node

    def items(self, obj: Any, encoder: Encoder, path: str) -> list[Any]:
        """The contents, written."""
        return [
            encoder.value(item, f"{path}[{i}]")
            for i, item in enumerate(self.cls.__iter__(obj))
        ]

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return isinstance(live, self.cls) and _has_class(node, live, self.cls)

    def children(self, node: dict[str, Any], live: Any) -> Any:
        yield from self.pairs(field(node, "items", list), live)
        if "class" in node:
            yield from attribute_pairs(node, live)

    def pairs(self, items: list[Any], live: Any) -> Iterator[tuple[Any, Any]]:
        """Captured items with the live ones in the same places."""
        yield from zip(items, self.cls.__iter__(live), strict=False)

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        if live is not None:
            return live
        cls = decoder.find(node, type) if "class" in node else self.cls
        if not issubclass(cls, self.cls):
            raise DamagedError(f"callback state: {cls!r} is no {self.kind}.")
        return self.cls.__new__(cls)

    def prepare(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None]:
        fill = self.fill(node, obj, decoder)
        if "class" not in node:
            return fill
        attributes = prepare_attributes(node, obj, decoder, frozenset())

        def apply() -> None:
            fill()
            attributes()

        return apply

    def fill(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None]:
        """Decodes the items; the result puts them in."""
        items = [decoder.value(item) for item in field(node, "items", list)]

        def apply() -> None:
            self.cls.clear(obj)
            self.cls.extend(obj, items)

        return apply


class ListCodec(MutableCodec):
    """`list` and `bytearray`, refilled by one slice assignment."""

    def fill(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None]:
        items = [decoder.value(item) for item in field(node, "items", list)]
        return lambda: self.cls.__setitem__(obj, slice(None), items)


class ByteArrayCodec(Codec):
    """A `bytearray`."""

    kind = "bytearray"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        return {"bytes": encoder.value(bytes(obj), path, nested=True)}

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return type(live) is bytearray

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        return live if live is not None else bytearray()

    def prepare(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None]:
        data = decoder.value(node.get("bytes"))
        if not isinstance(data, bytes):
            raise DamagedError("callback state: a bytearray without bytes.")
        return lambda: obj.__setitem__(slice(None), data)


class DequeCodec(MutableCodec):
    """A `deque`; its `maxlen` is fixed, so another one needs a new deque."""

    def __init__(self) -> None:
        super().__init__(collections.deque)

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        return super().encode(obj, encoder, path) | {"maxlen": obj.maxlen}

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        maxlen = node.get("maxlen")
        if live is not None and live.maxlen == maxlen:
            return live
        made = super().make(node, None, decoder)
        collections.deque.__init__(made, maxlen=maxlen)
        return made


class SetCodec(MutableCodec):
    """A `set`."""

    order = 2

    def __init__(self) -> None:
        super().__init__(set)

    def items(self, obj: Any, encoder: Encoder, path: str) -> list[Any]:
        return _encode_set(obj, encoder, path, nested=False)

    def pairs(self, items: list[Any], live: Any) -> Iterator[tuple[Any, Any]]:
        return iter(())  # the items of a set have no places

    def fill(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None]:
        items = [decoder.value(item) for item in field(node, "items", list)]
        for item in items:
            check_hashable(item)

        def apply() -> None:
            set.clear(obj)
            set.update(obj, items)

        return apply


class DictCodec(MutableCodec):
    """`dict`, `OrderedDict`, `Counter` and `defaultdict`."""

    order = 2

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        node = super().encode(obj, encoder, path)
        if self.cls is collections.defaultdict:
            node["factory"] = encoder.value(
                obj.default_factory, f"{path}.default_factory"
            )
        return node

    def items(self, obj: Any, encoder: Encoder, path: str) -> list[Any]:
        return [
            [
                encoder.value(key, f"{path}.keys()"),
                encoder.value(value, f"{path}[{key!r:.40}]"),
            ]
            for key, value in self.cls.items(obj)
        ]

    def children(self, node: dict[str, Any], live: Any) -> Any:
        yield from super().children(node, live)
        if "factory" in node:
            yield node["factory"], live.default_factory

    def pairs(self, items: list[Any], live: Any) -> Iterator[tuple[Any, Any]]:
        for item in items:
            match item:
                case [None | bool() | int() | float() | str() as key, value]:
                    # Not by `[]`: a defaultdict would make an entry.
                    yield value, dict.get(live, key, ABSENT)
                case [_, _]:
                    pass
                case _:
                    raise DamagedError("callback state: no item of a dict.")

    def fill(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None]:
        pairs = []
        for key, value in field(node, "items", list):
            pairs.append((decoder.value(key), decoder.value(value)))
            check_hashable(pairs[-1][0])
        factory = None
        if self.cls is collections.defaultdict:
            factory = decoder.value(node.get("factory"))
            if factory is not None and not callable(factory):
                raise DamagedError("callback state: no factory of values.")

        def apply() -> None:
            # `Counter.clear` is dict's; an OrderedDict keeps its own order.
            ordered = isinstance(obj, collections.OrderedDict)
            base: Any = collections.OrderedDict if ordered else dict
            base.clear(obj)
            for key, value in pairs:
                base.__setitem__(obj, key, value)
            if self.cls is collections.defaultdict:
                obj.default_factory = factory

        return apply


class PartialCodec(Codec):
    """A `functools.partial`."""

    kind = "partial"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        return {
            "func": encoder.value(obj.func, f"{path}.func"),
            "args": encoder.value(obj.args, f"{path}.args"),
            "keywords": encoder.value(obj.keywords, f"{path}.keywords"),
        }

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return type(live) is functools.partial

    def children(self, node: dict[str, Any], live: Any) -> Any:
        yield node.get("func"), live.func
        yield node.get("args"), live.args
        yield node.get("keywords"), live.keywords

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        return live if live is not None else functools.partial(_nothing)

    def prepare(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None]:
        func, args, keywords = (
            decoder.value(node.get(name))
            for name in ("func", "args", "keywords")
        )
        if not (
            callable(func)
            and isinstance(args, tuple)
            and isinstance(keywords, dict)
        ):
            raise DamagedError("callback state: no partial function.")
        attributes = vars(obj) or None
        return lambda: obj.__setstate__((func, args, keywords, attributes))


def _nothing() -> None:
    """What a partial function is made of until it is filled."""


def is_named_tuple(cls: type) -> bool:
    """Whether a class is one that `collections.namedtuple` makes."""
    return issubclass(cls, tuple) and isinstance(
        getattr(cls, "_fields", None), tuple
    )


def check_hashable(key: object) -> None:
    """Refuses a key that cannot be one, before anything is changed.

    It is not hashed: an object may not have its attributes yet.

    Raises:
        DamagedError: if it can be no key.
    """
    if type(key).__hash__ is None:
        raise DamagedError(f"callback state: a {type_name(key)} is no key.")
    if isinstance(key, tuple):
        for item in key:
            check_hashable(item)


def _encode_set(
    obj: Any, encoder: Encoder, path: str, *, nested: bool
) -> list[Any]:
    # Iteration order depends on the process's hash seed: sorted, so that two
    # equal states are equal byte for byte.
    try:
        items = sorted(obj)
    except TypeError:
        items = sorted(obj, key=repr)
    return [encoder.value(item, f"{path}{{}}", nested=nested) for item in items]


def _has_class(node: dict[str, Any], live: Any, base: type) -> bool:
    if "class" in node:
        return name_of(type(live)) == node["class"]
    return type(live) is base


CONTAINERS: dict[type, Codec] = {
    tuple: TupleCodec(),
    frozenset: FrozenSetCodec(),
    range: RangeCodec(range),
    slice: RangeCodec(slice),
    list: ListCodec(list),
    bytearray: ByteArrayCodec(),
    collections.deque: DequeCodec(),
    set: SetCodec(),
    dict: DictCodec(dict),
    collections.OrderedDict: DictCodec(collections.OrderedDict),
    collections.Counter: DictCodec(collections.Counter),
    collections.defaultdict: DictCodec(collections.defaultdict),
    functools.partial: PartialCodec(),
}
