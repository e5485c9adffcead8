"""How single values are captured: numbers, arrays, dates, variables."""

# ruff: noqa: D102 - what the methods of a codec do is said in `Codec`
import base64
import datetime
import decimal
import enum
import fractions
import functools
import itertools
import operator
import pathlib
import re
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from legato.capture.decoding import Decoder, field
from legato.capture.encoding import (
    Codec,
    Encoder,
    UncapturableError,
    type_name,
)
from legato.capture.names import name_of
from legato.errors import DamagedError, RestoreError


class TextCodec(Codec):
    """A type whose values are exactly given by a text."""

    def __init__(
        self,
        kind: str,
        write: Callable[[Any], str],
        read: Callable[[str], Any],
    ) -> None:
        self.kind = kind
        self._write = write
        self._read = read

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        return {"is": self._write(obj)}

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        return self._read(field(node, "is", str))


def _read_int(text: str) -> int:
    # Base 16 takes linear time; base 10 is quadratic, and limited for it.
    return int(text, 16)


def _read_complex(text: str) -> complex:
    real, imag = text.split(" ")
    return complex(float.fromhex(real), float.fromhex(imag))


def _read_timedelta(text: str) -> datetime.timedelta:
    return datetime.timedelta(*map(int, text.split(" ")))


def _read_fraction(text: str) -> fractions.Fraction:
    top, bottom = text.split("/")
    return fractions.Fraction(_read_int(top), _read_int(bottom))


def _write_timezone(zone: datetime.timezone) -> str:
    seconds = zone.utcoffset(None).total_seconds()
    return f"{seconds!r} {zone.tzname(None)}"


def _read_timezone(text: str) -> datetime.timezone:
    seconds, name = text.split(" ", 1)
    zone = datetime.timezone(datetime.timedelta(seconds=float(seconds)))
    if zone == datetime.UTC and name == "UTC":
        return datetime.UTC
    return (
        zone
        if str(zone) == name
        else datetime.timezone(zone.utcoffset(None), name)
    )


def _read_count(text: str) -> Any:
    match = re.fullmatch(r"count\(([^,()]+)(?:, ([^,()]+))?\)", text)
    if match is None:
        raise UncapturableError("a count of something else than numbers")
    numbers = [_number(part) for part in match.groups() if part is not None]
    return itertools.count(*numbers)


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise UncapturableError(
                "a count of something else than numbers"
            ) from None


def _write_count(count: Any) -> str:
    text = repr(count)
    _read_count(text)
    return text


TEXTS: dict[type, TextCodec] = {
    int: TextCodec("int", hex, _read_int),
    str: TextCodec(
        "str",
        lambda s: s.encode("utf-8", "surrogatepass").hex(),
        lambda s: bytes.fromhex(s).decode("utf-8", "surrogatepass"),
    ),
    complex: TextCodec(
        "complex",
        lambda z: f"{z.real.hex()} {z.imag.hex()}",
        _read_complex,
    ),
    bytes: TextCodec(
        "bytes",
        lambda b: base64.b64encode(b).decode(),
        lambda s: base64.b64decode(s, validate=True),
    ),
    datetime.date: TextCodec(
        "date", datetime.date.isoformat, datetime.date.fromisoformat
    ),
    datetime.timedelta: TextCodec(
        "timedelta",
        lambda d: f"{d.days} {d.seconds} {d.microseconds}",
        _read_timedelta,
    ),
    datetime.timezone: TextCodec("timezone", _write_timezone, _read_timezone),
    # The key is a path below the time zone folders; `ZoneInfo` checks it.
    zoneinfo.ZoneInfo: TextCodec("zoneinfo", str, zoneinfo.ZoneInfo),
    decimal.Decimal: TextCodec("decimal", str, decimal.Decimal),
    fractions.Fraction: TextCodec(
        "fraction",
        lambda f: f"{f.numerator:x}/{f.denominator:x}",
        _read_fraction,
    ),
    uuid.UUID: TextCodec("uuid", str, uuid.UUID),
    itertools.count: TextCodec("count", _write_count, _read_count),
    **{
        cls: TextCodec(cls.__name__, str, cls)
        for cls in (
            type(pathlib.Path()),
            type(pathlib.PurePath()),
            pathlib.PurePosixPath,
            pathlib.PureWindowsPath,
        )
    },
}


class TimeCodec(Codec):
    """`datetime` and `time`, with their time zone and fold."""

    def __init__(self, cls: type) -> None:
        self.kind = cls.__name__
        self._cls = cls

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        return {
            "is": obj.replace(tzinfo=None).isoformat(),
            "fold": obj.fold,
            "zone": encoder.value(obj.tzinfo, f"{path}.tzinfo", nested=True),
        }

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        zone = decoder.value(node.get("zone"))
        if not isinstance(zone, datetime.tzinfo | None):
            raise DamagedError("callback state: a time zone is none.")
        time = self._cls.fromisoformat(field(node, "is", str))
        return time.replace(tzinfo=zone, fold=field(node, "fold", int))


class EnumCodec(Codec):
    """A member of an enumeration, by name; a flag by those of its parts."""

    kind = "enum"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        if isinstance(obj, enum.Flag):
            names = [member.name for member in obj]
            parts = [type(obj)[str(name)] for name in names]
            if obj != functools.reduce(operator.or_, parts, type(obj)(0)):
                raise UncapturableError("a flag with unnamed bits")
        else:
            names = [obj.name]
        encoder.note_class(obj, path)
        return {"class": name_of(type(obj)), "names": names}

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return isinstance(live, enum.Enum) and (
            name_of(type(live)) == node.get("class")
        )

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        cls = type(live) if live is not None else decoder.find(node, type)
        if not issubclass(cls, enum.Enum):
            raise DamagedError(f"callback state: {cls!r} is no enumeration.")
        members = cls.__members__
        names = field(node, "names", list)
        for name in names:
            if not isinstance(name, str) or name not in members:
                raise RestoreError(
                    f"{cls.__qualname__} has no member {name!r:.80}."
                )
        if issubclass(cls, enum.Flag):
            parts = [members[name] for name in names]
            return functools.reduce(operator.or_, parts, cls(0))
        if len(names) != 1:
            raise DamagedError("callback state: not one name of a member.")
        return members[names[0]]


class ArrayCodec(Codec):
    """A NumPy array, restored into the live one if that fits."""

    kind = "array"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        return encoder.array(obj, path)

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return type(live) is np.ndarray

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        array = decoder.array(node)
        if (
            live is not None
            and live.shape == array.shape
            and live.dtype == array.dtype
            and live.flags.writeable
            and not live.dtype.hasobject
        ):
            return live
        return array.copy(order="K")

    def prepare(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None]:
        array = decoder.array(node)
        return lambda: np.copyto(obj, array)


class ScalarCodec(Codec):
    """A NumPy scalar."""

    kind = "scalar"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        return encoder.array(np.asarray(obj), path)

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        array = decoder.array(node)
        if array.shape != ():
            raise DamagedError("callback state: a scalar with a shape.")
        return array[()]


class TensorCodec(Codec):
    """A tensor of the backend; one that is changed in place stays the same.

    Such are PyTorch's, and the variables of TensorFlow.
    """

    kind = "tensor"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        try:
            array = np.asarray(keras.ops.convert_to_numpy(obj))
        except Exception as error:  # a tracer, a key array, a ragged tensor
            raise UncapturableError(
                f"a `{type_name(obj)}` that is no array: {error!s:.100}"
            ) from None
        node = encoder.array(array, path)
        node["tensor"] = keras.backend.standardize_dtype(obj.dtype)
        if _is_variable(obj):
            node["class"] = type(obj).__name__
        return node

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return keras.ops.is_tensor(live)

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        dtype = field(node, "tensor", str)
        array = decoder.array(node)
        fits = (
            live is not None
            and tuple(live.shape) == array.shape
            and keras.backend.standardize_dtype(live.dtype) == dtype
        )
        if "class" in node:
            if not fits or node["class"] != type(live).__name__:
                raise RestoreError(
                    f"a {node['class']!s:.80} of {dtype}{list(array.shape)} "
                    "is not there when training begins."
                )
            return live
        if fits and _is_mutable(live) and not _is_variable(live):
            return live
        tensor: Any = keras.ops.convert_to_tensor(array, dtype=dtype)
        if keras.backend.standardize_dtype(tensor.dtype) != dtype:
            raise RestoreError(f"the backend has no tensors of dtype {dtype}.")
        return tensor

    def prepare(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None] | None:
        if not _is_mutable(obj):
            return None
        dtype = field(node, "tensor", str)
        value: Any = keras.ops.convert_to_tensor(
            decoder.array(node), dtype=dtype
        )
        if hasattr(obj, "assign"):
            return lambda: obj.assign(value)
        # (Not the tensor itself: it may require gradients.)
        return lambda: obj.detach().copy_(value)


def _is_mutable(tensor: Any) -> bool:
    return hasattr(tensor, "assign") or hasattr(tensor, "copy_")


def _is_variable(tensor: Any) -> bool:
    """Whether it is more than its value: something may be built on it."""
    return hasattr(tensor, "assign") or type(tensor).__name__ == "Parameter"


class VariableCodec(Codec):
    """A `keras.Variable`: its value, assigned to the live one."""

    kind = "variable"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        value = np.asarray(keras.ops.convert_to_numpy(obj.value))
        return {
            "variable": encoder.array(value, path),
            "dtype": obj.dtype,
            "trainable": bool(obj.trainable),
        }

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return isinstance(live, keras.Variable)

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        array = decoder.array(field(node, "variable", dict))
        dtype = field(node, "dtype", str)
        if live is None:
            trainable = field(node, "trainable", bool)
            return keras.Variable(array, dtype=dtype, trainable=trainable)
        if tuple(live.shape) != array.shape or live.dtype != dtype:
            raise RestoreError(
                f"variable {live.path!r} is {live.dtype}{list(live.shape)} "
                f"in the program and {dtype}{list(array.shape)} in the "
                "checkpoint."
            )
        return live

    def prepare(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None]:
        array = decoder.array(field(node, "variable", dict))
        return lambda: obj.assign(array)


class SeedGeneratorCodec(Codec):
    """A `keras.random.SeedGenerator`: its state."""

    kind = "seed generator"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        return {"state": encoder.value(obj.state, f"{path}.state", nested=True)}

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return isinstance(live, keras.random.SeedGenerator)

    def children(self, node: dict[str, Any], live: Any) -> Any:
        yield node.get("state"), live.state

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        if live is None:
            live = keras.random.SeedGenerator(seed=0)
            decoder.pair(node.get("state"), live.state)
        decoder.value(node.get("state"))
        return live


class StatesCodec(Codec):
    """A layer, a metric or an optimizer that the callback has for itself.

    Its variables are captured (those of the trained model are references, as
    the engine saves them); its configuration is the program's.
    """

    kind = "keras"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        return {
            "class": name_of(type(obj)),
            "variables": [
                encoder.value(v, f"{path}.variables[{i}]", nested=True)
                for i, v in enumerate(obj.variables)
            ],
        }

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return isinstance(
            live,
            keras.Layer | keras.metrics.Metric | keras.optimizers.Optimizer,
        ) and name_of(type(live)) == node.get("class")

    def children(self, node: dict[str, Any], live: Any) -> Any:
        variables = field(node, "variables", list)
        yield from zip(variables, live.variables, strict=False)

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        variables = field(node, "variables", list)
        if live is None or len(live.variables) != len(variables):
            raise RestoreError(
                f"a {node.get('class')!r:.200} with {len(variables)} "
                "variables is not there, built, when training begins."
            )
        for captured, variable in zip(variables, live.variables, strict=True):
            if decoder.value(captured) is not variable:
                raise RestoreError(
                    f"{variable.path!r} is another variable than the "
                    "checkpoint's."
                )
        return live


LEAVES: dict[type, Codec] = {
    **TEXTS,
    datetime.datetime: TimeCodec(datetime.datetime),
    datetime.time: TimeCodec(datetime.time),
    np.ndarray: ArrayCodec(),
}
