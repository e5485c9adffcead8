"""Variables whose values are worked out when somebody asks for them.

A Keras variable on JAX is a plain object that holds an immutable array in an
attribute. Without that attribute, Python asks the class where to find it.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras

_ATTRIBUTE = "_value"

_WANTED: dict[int, Callable[[], None]] = {}
"""By the identity of a variable: what gives it its value."""


def can_wait(variable: keras.Variable) -> bool:
    """Whether the variable is of the kind that `let_wait` can handle."""
    return _ATTRIBUTE in vars(variable)


def let_wait(variables: list[keras.Variable], give: Callable[[], None]) -> None:
    """Take the values away until one is asked for.

    Args:
        variables: they have values.
        give: is to call `set_waiting` for all of them; it may be called from
            any thread.
    """
    cls: Any = keras.Variable
    _teach(cls)
    for variable in variables:
        _WANTED[id(variable)] = give
        delattr(variable, _ATTRIBUTE)


def are_waiting(variables: list[keras.Variable]) -> bool:
    """Whether nobody asked for the value of any, and nobody set one."""
    return not any(_ATTRIBUTE in vars(variable) for variable in variables)


def is_waiting(variable: keras.Variable) -> bool:
    """Whether it has no value at present."""
    return _ATTRIBUTE not in vars(variable)


def set_waiting(variables: list[keras.Variable], values: list[Any]) -> None:
    """Give values to those that wait; what was set meanwhile stays."""
    for variable, value in zip(variables, values, strict=True):
        attributes: Any = vars(variable)
        attributes.setdefault(_ATTRIBUTE, value)
        _WANTED.pop(id(variable), None)


@functools.cache
def _teach(cls: Any) -> None:
    """Let a class of variables ask for a value that is missing."""

    def find(variable: Any, name: str) -> Any:
        give = _WANTED.get(id(variable)) if name == _ATTRIBUTE else None
        if give is None:
            raise AttributeError(
                f"{type(variable).__name__!r} object has no attribute {name!r}"
            )
        give()
        return vars(variable)[_ATTRIBUTE]

    def state(variable: Any) -> Any:
        # What copies a variable looks into it directly.
        if id(variable) in _WANTED:
            _WANTED[id(variable)]()
        return object.__getstate__(variable)

    cls.__getattr__ = find
    cls.__getstate__ = state
