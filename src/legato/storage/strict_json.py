"""JSON that round-trips exactly and that cannot hurt its reader.

Floats are written as `{"~f": "0x1.8000000000000p+0"}`, so that every bit
returns (infinities and NaN too; the sign and the payload of a NaN are the only
things that do not). A dict with the key `"~f"` is therefore refused.

`loads` takes bytes that may be hostile: whatever is wrong with them, the only
exception is `DamagedError`, and what costs time or memory without bound (size,
depth, digits) is checked before the parser sees it. `dumps` keeps the same
limits, because a file that can be written but not read would lose a run.
"""

import json
import re
from typing import Any, NoReturn

from legato.errors import DamagedError
from legato.types import JSON

MAX_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 64
MAX_DIGITS = 4000  # CPython itself refuses more than 4300

_FLOAT_KEY = "~f"
_MAX_BITS = int(MAX_DIGITS * 3.32)  # of an integer of MAX_DIGITS digits

# An unterminated string matches up to the end: otherwise each of its quotes
# would be tried as a beginning, in quadratic time.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_LONG_INTEGER = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SQUARE = bytes.maketrans(b"{}", b"[]")


def dumps(value: JSON) -> bytes:
    """Encodes a value; equal values give equal bytes.

    Args:
        value: None, bool, int, float, str, list, or dict with str keys, of
            exactly these types. Subclasses (a NumPy scalar, an enum, a named
            tuple) are refused: they would come back as something else.

    Raises:
        TypeError: if there is something else in it; the message says where.
        ValueError: if it holds the reserved key, is too deep or too large, or
            a string in it is not Unicode text.
    """
    plain = _encode(value, "$", 1)
    text = json.dumps(
        plain,
        ensure_ascii=False,
        allow_nan=False,
        sort_keys=True,
        separators=(",", ":"),
    )
    try:
        data = text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"a string is not Unicode text: {e}") from e
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes are more than {MAX_BYTES}")
    return data


def loads(
    data: bytes | bytearray | memoryview,
    *,
    name: str = "JSON",
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
) -> JSON:
    """Decodes what `dumps` wrote.

    Args:
        data: the bytes, which may be anything.
        name: what they are, for the message.
        max_bytes: more bytes than this are refused unread.
        max_depth: brackets nested deeper than this are refused unparsed.

    Raises:
        DamagedError: whatever is wrong with them.
    """
    if len(data) > max_bytes:
        raise DamagedError(
            f"{name}: {len(data)} bytes are more than the {max_bytes} allowed"
        )
    data = bytes(data)
    try:
        text = data.decode()
        outside = _STRING.sub(b"", data)
        _check_depth(outside, name, max_depth)
        if _LONG_INTEGER.search(outside):
            raise DamagedError(f"{name}: a number has over {MAX_DIGITS} digits")
        value = json.loads(
            text,
            object_pairs_hook=_decode_object,
            parse_float=_refuse,
            parse_constant=_refuse,
        )
        # Escapes can spell what UTF-8 cannot; printing it would then fail.
        if b"\\u" in data and _SURROGATE.search(_texts(value)):
            raise ValueError("a string is not Unicode text")
    except DamagedError:
        raise
    except (ValueError, RecursionError, MemoryError) as e:
        raise DamagedError(f"{name}: not valid: {e}") from e
    return value


def _encode(value: Any, where: str, depth: int) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        if value.bit_length() > _MAX_BITS:
            raise ValueError(f"{where}: over {MAX_DIGITS} digits")
        return value
    if kind not in (float, list, dict):
        raise TypeError(
            f"{where}: {kind.__module__}.{kind.__qualname__} is not one of "
            "None, bool, int, float, str, list, dict"
        )
    if depth > MAX_DEPTH:
        raise ValueError(f"{where}: nested deeper than {MAX_DEPTH}")
    if kind is float:
        return {_FLOAT_KEY: value.hex()}
    if kind is list:
        return [
            _encode(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)
        ]
    for key in value:
        if type(key) is not str:
            raise TypeError(f"{where}: the key {key!r} is not a str")
        if key == _FLOAT_KEY:
            raise ValueError(f"{where}: the key {key!r} is reserved")
    return {k: _encode(v, f"{where}.{k}", depth + 1) for k, v in value.items()}


def _check_depth(outside: bytes, name: str, max_depth: int) -> None:
    """Takes the innermost pairs away, as often as there may be levels."""
    brackets = outside.translate(_SQUARE, _NOT_BRACKETS)
    for _ in range(max_depth):
        fewer = brackets.replace(b"[]", b"")
        if len(fewer) == len(brackets):
            break
        brackets = fewer
    if brackets:
        raise DamagedError(
            f"{name}: unbalanced, or nested deeper than {max_depth}"
        )


def _decode_object(pairs: list[tuple[str, Any]]) -> Any:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    if _FLOAT_KEY not in value:
        return value
    text = value[_FLOAT_KEY]
    if len(value) != 1 or type(text) is not str:
        raise ValueError("a malformed float")
    try:
        number = float.fromhex(text)
    except (ValueError, OverflowError):
        raise ValueError(f"a malformed float: {text[:40]!r}") from None
    if number.hex() != text:  # one spelling only
        raise ValueError(f"a malformed float: {text[:40]!r}")
    return number


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"a number that is not tagged: {text[:40]}")


def _texts(value: Any) -> str:
    """All strings in a value, joined."""
    texts, todo = [], [value]
    while todo:
        item = todo.pop()
        if type(item) is str:
            # Joined with a break, so that two halves do not make a whole.
            texts.append(item)
        elif type(item) is list:
            todo.extend(item)
        elif type(item) is dict:
            texts.extend(item)
            todo.extend(item.values())
    return "\n".join(texts)
