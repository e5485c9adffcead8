"""Variables whose values are worked out when somebody asks for them.

A Keras variable on JAX is a plain object that holds an immutable array in an
attribute. Without that attribute, Python asks the class where to find it.
"""

import functools
import itertools
import operator
from typing import Any, Protocol

import keras

_ATTRIBUTE = "_value"

_OWNERS: dict[int, "Owner"] = {}
"""By the identity of a variable that waits: who knows its value."""


class Owner(Protocol):
    """Knows the values of variables that wait."""

    def settle(self) -> None:
        """Call `set_waiting` for all of them; from any thread."""
        ...


def can_wait(variable: keras.Variable) -> bool:
    """Whether the variable is of the kind that `let_wait` can handle."""
    return _ATTRIBUTE in vars(variable)


def let_wait(variables: list[keras.Variable], owner: Owner) -> None:
    """Take the values away until one is asked for.

    Args:
        variables: they have values.
        owner: gives them back.
    """
    cls: Any = keras.Variable
    _teach(cls)
    for variable in variables:
        _OWNERS[id(variable)] = owner
        delattr(variable, _ATTRIBUTE)


def are_waiting(variables: list[keras.Variable]) -> bool:
    """Whether nobody asked for the value of any, and nobody set one."""
    # (Asked at each step; there may be a thousand.)
    return not any(
        map(
            operator.contains,
            map(vars, variables),
            itertools.repeat(_ATTRIBUTE),
        )
    )


def owner_of(variable: keras.Variable) -> Any:
    """Who knows its value, if it waits; None if it has one."""
    if _ATTRIBUTE in vars(variable):
        return None
    return _OWNERS.get(id(variable))


def set_waiting(variables: list[keras.Variable], values: list[Any]) -> None:
    """Give values to those that wait; what was set meanwhile stays."""
    for variable, value in zip(variables, values, strict=True):
        attributes: Any = vars(variable)
        attributes.setdefault(_ATTRIBUTE, value)
        _OWNERS.pop(id(variable), None)


@functools.cache
def _teach(cls: Any) -> None:
    """Let a class of variables ask for a value that is missing."""

    def find(variable: Any, name: str) -> Any:
        owner = _OWNERS.get(id(variable)) if name == _ATTRIBUTE else None
        if owner is None:
            raise AttributeError(
                f"{type(variable).__name__!r} object has no attribute {name!r}"
            )
        owner.settle()
        return vars(variable)[_ATTRIBUTE]

    def state(variable: Any) -> Any:
        # What copies a variable looks into it directly.
        if id(variable) in _OWNERS:
            _OWNERS[id(variable)].settle()
        return object.__getstate__(variable)

    cls.__getattr__ = find
    cls.__getstate__ = state
