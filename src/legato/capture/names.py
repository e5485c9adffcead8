"""Which classes and functions a checkpoint may name.

A checkpoint is data: it may say "an object of class X", but what X is comes
from the running program. A name is looked up only in modules in which a class
of the live object is defined, never imported, and must be defined there (a
class that a module merely imports, such as `subprocess.Popen`, is not its
own).
"""

import sys
import types

import keras
import numpy as np

from legato.errors import DamagedError, RestoreError

FRAMEWORKS = frozenset(
    {"keras", "numpy", "jax", "jaxlib", "tensorflow", "torch", "ml_dtypes"}
)

# What a container may be a factory of, or a comparison be made with.
# fmt: off
_BUILTINS = (
    abs, all, any, bool, bytes, complex, dict, float, frozenset, int, len,
    list, max, min, round, set, sorted, str, sum, tuple,
)
# fmt: on


def is_library(module: object) -> bool:
    """Whether a module is Python's, Keras's or a backend's, not the user's."""
    if not isinstance(module, str):
        return True
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names or top in FRAMEWORKS


def user_classes(cls: type) -> list[type]:
    """The classes of an MRO that are the user's."""
    return [base for base in cls.__mro__ if not is_library(base.__module__)]


def name_of(thing: object) -> list[str] | None:
    """The module and the qualified name of a class or a function, if any."""
    module = getattr(thing, "__module__", None)
    qualname = getattr(thing, "__qualname__", None)
    if module is None and isinstance(thing, types.BuiltinFunctionType):
        module = "builtins"
    if isinstance(module, str) and isinstance(qualname, str):
        return [module, qualname]
    return None


def public_name(function: object) -> list[str] | None:
    """The name of a function of `keras.ops` or of a NumPy ufunc, if it is one.

    `keras.ops.less` is defined in a private module; it is named as users do.
    """
    if isinstance(function, np.ufunc):
        name = function.__name__
        return ["numpy", name] if getattr(np, name, None) is function else None
    name = getattr(function, "__name__", None)
    if isinstance(name, str) and getattr(keras.ops, name, None) is function:
        return ["keras.ops", name]
    return None


class Names:
    """The names that may be used while one object is restored."""

    def __init__(self) -> None:
        self._modules: set[str] = set()

    def trust(self, cls: type) -> None:
        """Lets the modules that define `cls` and its bases be looked in."""
        self._modules.update(base.__module__ for base in user_classes(cls))

    def knows(self, cls: type) -> bool:
        """Whether an object of this class could be made from its name."""
        return cls.__module__ in self._modules and "<" not in cls.__qualname__

    def find(self, name: object) -> object:
        """The class or function that goes by `[module, qualname]`.

        Raises:
            RestoreError: if it may not be named, or is not there.
            DamagedError: if `name` is not a name.
        """
        match name:
            case [str(module), str(qualname)]:
                pass
            case _:
                raise DamagedError(f"callback state: {name!r:.80} is no name.")
        if module == "keras.ops" or module == "numpy":
            found = vars(keras.ops if module == "keras.ops" else np)
            thing = found.get(qualname)
            if thing is not None and public_name(thing) == name:
                return thing
        elif module == "builtins":
            for thing in _BUILTINS:
                if thing.__qualname__ == qualname:
                    return thing
        elif module in self._modules and module in sys.modules:
            thing = _walk(sys.modules[module], qualname)
            if thing is not None and name_of(thing) == [module, qualname]:
                return thing
        raise RestoreError(
            f"`{module}.{qualname}` cannot be looked up: only classes and "
            "functions of the modules that define the object itself can be. "
            "Make it an attribute of the object when that is constructed, or "
            "define `get_state` and `set_state`."
        )


def _walk(module: types.ModuleType, qualname: str) -> object | None:
    # `vars`, not `getattr`: no descriptor or `__getattr__` of anybody runs.
    thing: object = module
    for part in qualname.split("."):
        if not isinstance(thing, types.ModuleType | type):
            return None
        thing = vars(thing).get(part)
        if isinstance(thing, staticmethod | classmethod):
            thing = thing.__func__
    if isinstance(thing, type | types.FunctionType):
        return thing
    return None
