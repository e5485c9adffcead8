"""What a run asks the world, beside its code, its config and its data.

While these are watched, calls from the user's code to clocks and to global
generators are noted with their place; nothing that they return is changed.
"""

import functools
import os
import random
import sys
import sysconfig
import time
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CLOCKS = {
    "time.time": (time, "time"),
    "time.time_ns": (time, "time_ns"),
    "time.perf_counter": (time, "perf_counter"),
    "time.monotonic": (time, "monotonic"),
    "os.urandom": (os, "urandom"),
    "os.getpid": (os, "getpid"),
    "uuid.uuid1": (uuid, "uuid1"),
    "uuid.uuid4": (uuid, "uuid4"),
}
_PYTHON_DRAWS = (
    "betavariate", "choice", "choices", "expovariate", "gammavariate", "gauss",
    "getrandbits", "normalvariate", "randbytes", "randint", "random",
    "randrange", "sample", "shuffle", "triangular", "uniform",
)  # fmt: skip
_NUMPY_DRAWS = (
    "beta", "binomial", "bytes", "choice", "exponential", "gamma", "integers",
    "normal", "permutation", "poisson", "rand", "randint", "randn", "random",
    "random_integers", "random_sample", "shuffle", "standard_normal",
    "triangular", "uniform",
)  # fmt: skip


UNSEEDED = "numpy.random.default_rng() without a seed"


class Calls:
    """The places from which the user's code calls one function.

    Args:
        report: is told of each new place once.
    """

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self._report = report
        self._known: set[tuple[str, str, int]] = set()

    def watch(self, name: str, function: Callable[..., Any]) -> Any:
        """The function, which notes from where it is called."""

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.note(name, sys._getframe(1))
            return function(*args, **kwargs)

        return watched

    def note(self, name: str, caller: types.FrameType) -> None:
        """Something is called from a frame."""
        code = caller.f_code
        place = (name, code.co_filename, caller.f_lineno)
        if place in self._known:
            return
        self._known.add(place)
        if is_users(code.co_filename):
            self._report(
                {
                    "kind": "call",
                    "name": name,
                    "file": code.co_filename,
                    "line": caller.f_lineno,
                    "function": code.co_qualname,
                }
            )


def watch_calls(report: Callable[[dict[str, Any]], None]) -> None:
    """From now on, in this process; before the user's code is imported.

    Args:
        report: is given each place at which the user's code calls a clock or
            a global generator, once.
    """
    calls = Calls(report)
    for name, (module, attribute) in _CLOCKS.items():
        setattr(
            module, attribute, calls.watch(name, getattr(module, attribute))
        )
    for attribute in _PYTHON_DRAWS:
        watched = calls.watch(f"random.{attribute}", getattr(random, attribute))
        setattr(random, attribute, watched)
    import numpy as np

    for attribute in _NUMPY_DRAWS:
        if hasattr(np.random, attribute):
            watched = calls.watch(
                f"numpy.random.{attribute}", getattr(np.random, attribute)
            )
            setattr(np.random, attribute, watched)
    _watch_unseeded(calls)


def _watch_unseeded(calls: Calls) -> None:
    """A generator that is made without a seed takes one from the system."""
    import numpy as np

    make = np.random.default_rng

    @functools.wraps(make)
    def default_rng(seed: Any = None) -> Any:
        if seed is None:
            calls.note(UNSEEDED, sys._getframe(1))
        return make(seed)

    np.random.default_rng = default_rng


_PACKAGE = str(Path(__file__).resolve().parents[1])
_LIBRARIES = tuple(
    str(Path(path).resolve())
    for name, path in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
)


@functools.cache
def is_users(file: str) -> bool:
    """Whether code is the user's, and no library's, by its file."""
    if file.startswith("<"):
        return False
    path = str(Path(file).resolve())
    return not path.startswith((_PACKAGE, *_LIBRARIES))


def read_globals(holders: list[object]) -> dict[str, dict[str, Any]]:
    """The global variables that the user's functions read, and their values.

    Args:
        holders: objects and functions of the user's: a task, callbacks.

    Returns:
        `module.name` -> its value as text, and the function that reads it.
        What cannot change by itself, as functions, classes and modules, is
        left out.
    """
    found: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    pending = [f for holder in holders for f in _functions(holder)]
    while pending:
        function = pending.pop()
        code = function.__code__
        if id(code) in seen or not is_users(code.co_filename):
            continue
        seen.add(id(code))
        for name in _names(code):
            value = function.__globals__.get(name, _names)
            if isinstance(value, types.FunctionType):
                pending.append(value)
            elif isinstance(value, type):
                pending += _functions(value)
            text = _as_text(value)
            if text is not None:
                module = function.__globals__.get("__name__", "")
                found[f"{module}.{name}"] = {
                    "value": text,
                    "function": code.co_qualname,
                    "file": code.co_filename,
                    "line": code.co_firstlineno,
                }
    return found


def _functions(holder: object) -> list[types.FunctionType]:
    if isinstance(holder, types.FunctionType):
        return [holder]
    if isinstance(holder, types.MethodType):
        return _functions(holder.__func__)
    cls = holder if isinstance(holder, type) else type(holder)
    return [
        value
        for base in cls.__mro__
        for value in vars(base).values()
        if isinstance(value, types.FunctionType)
    ]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _as_text(value: Any) -> str | None:
    """A value that may change, as text; None for all else."""
    if isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if isinstance(value, list | tuple | dict | set | frozenset):
        if len(value) > 1000:
            return f"{len(value)} elements"
        parts = value.items() if isinstance(value, dict) else value
        texts = [
            str(tuple(map(_as_text, part)))
            if isinstance(part, tuple)
            else str(_as_text(part))
            for part in parts
        ]
        if isinstance(value, set | frozenset):
            texts.sort()
        return f"{type(value).__name__}({', '.join(texts)})"
    return None
