"""Numbers and texts in the user's objects, which callbacks may change."""

from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

from legato.errors import RestoreError

_PLAIN = (bool, int, float, str, type(None))
_CLOSED = (type, ModuleType, FunctionType)
_MAX_DEPTH = 4
_MAX_ITEMS = 32
_MAX_OBJECTS = 200


class PlainAttributes:
    """Those of some objects, of what these hold, and so on a little further.

    A dataset that gives examples by their numbers has no other state that
    counts; what is large in it is data.

    Args:
        owners: the objects, by names that begin the paths of attributes.
    """

    def __init__(self, owners: Mapping[str, object]) -> None:
        self._owners = owners
        self._built = self._read()

    def leave_out_changed(self) -> None:
        """Those that changed by now change while data are read: counters."""
        for path in self.changed():
            del self._built[path]

    def changed(self) -> dict[str, Any]:
        """What others have changed since, by path."""
        now = self._read()
        return {
            path: now[path]
            for path, value in self._built.items()
            if path in now and repr(now[path]) != repr(value)
        }

    def set(self, changed: Any) -> None:
        """Put back what `changed` gave, and all else as it was built.

        Raises:
            RestoreError: it is none of these objects'.
        """
        if not isinstance(changed, dict) or not all(
            path in self._built and type(value) in _PLAIN
            for path, value in changed.items()
        ):
            raise RestoreError(
                f"the checkpoint has other attributes ({str(changed)!s:.80}) "
                "than the data and their transform have. Resume with the data "
                "of the run."
            )
        undone = {path: self._built[path] for path in self.changed()}
        holders = {path: holder for path, holder, _ in self._walk()}
        for path, value in {**undone, **changed}.items():
            setattr(holders[path], path.rpartition(".")[2], value)

    def _read(self) -> dict[str, Any]:
        return {path: value for path, _, value in self._walk()}

    def _walk(self) -> Iterator[tuple[str, object, Any]]:
        """Paths, what has the attributes, and their values."""
        seen: set[int] = set()
        waiting = [(name, each, 0) for name, each in self._owners.items()]
        while waiting and len(seen) < _MAX_OBJECTS:
            path, owner, depth = waiting.pop(0)
            if id(owner) in seen:
                continue
            seen.add(id(owner))
            if type(owner) in (list, tuple):
                held = {str(i): each for i, each in enumerate(owner)}
            else:
                held = dict(getattr(owner, "__dict__", {}))
            for name, value in held.items():
                if type(value) in _PLAIN:
                    if type(owner) not in (list, tuple):
                        yield f"{path}.{name}", owner, value
                elif depth < _MAX_DEPTH and _is_open(value):
                    waiting.append((f"{path}.{name}", value, depth + 1))


def _is_open(value: Any) -> bool:
    """Whether to look into it."""
    if type(value) in (list, tuple):
        return len(value) <= _MAX_ITEMS
    return hasattr(value, "__dict__") and not isinstance(value, _CLOSED)
