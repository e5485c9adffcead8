"""A callback and what the runner knows about it."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from legato import capture
from legato.callbacks.adapters import adapter_of, is_kerass_own
from legato.callbacks.base import Adapter
from legato.errors import ConfigError, DamagedError, RestoreError
from legato.types import JSON, AuditEntry, AuditStatus

# Keras's own, not part of any state.
_CALLBACK = frozenset({"_model", "model", "params"})

# What did not change and is as large is not written into checkpoints.
_LARGE_BYTES = 32 << 20

TRAIN_BATCH_HOOKS = (
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_batch_begin",
    "on_batch_end",
)
TEST_BATCH_HOOKS = ("on_test_batch_begin", "on_test_batch_end")


@dataclasses.dataclass(eq=False)
class Entry:
    """A callback and what the runner knows about it."""

    key: str
    callback: keras.callbacks.Callback
    adapter: Adapter
    own_state: bool  # it defines get_state and set_state
    captures: bool  # its attributes, as far as the adapter leaves them
    active: frozenset[str]  # the hooks to be called
    arguments: frozenset[str]  # attributes that its constructor may be given
    # What the program made of it, before anything was called or restored.
    origin: Mapping[str, capture.Look] = dataclasses.field(default_factory=dict)
    # What could not be captured, as it was when training began.
    baseline: Mapping[str, capture.Token] | None = None
    reported: set[str] = dataclasses.field(default_factory=set)

    @property
    def skip(self) -> frozenset[str]:
        """The attributes that are not captured."""
        return _CALLBACK | self.adapter.owned

    def looks(self, captured: capture.Captured) -> dict[str, capture.Look]:
        """What may be left to the program, as it is now."""
        return capture.looks(captured, self.arguments, min_bytes=_LARGE_BYTES)

    def leave_unchanged(
        self, captured: capture.Captured
    ) -> tuple[capture.Captured, JSON]:
        """Leaves to the program what is as the program made it.

        Returns:
            The snapshot without what is large, and what is unchanged:
            name -> [digest, whether it is in the snapshot all the same].
        """
        now = self.looks(captured) if self.origin else {}
        same = {
            name: now[name]
            for name in now
            if self.origin.get(name) == now[name]
        }
        large = {
            n for n, look in same.items() if look.num_bytes >= _LARGE_BYTES
        }
        unchanged: dict[str, JSON] = {
            name: [look.digest, name not in large]
            for name, look in same.items()
        }
        return capture.without(captured, frozenset(large)), unchanged


def flatten(callbacks: object, where: str) -> list[keras.callbacks.Callback]:
    """The callbacks in lists of lists, or dicts, in order.

    Raises:
        ConfigError: if one of them is no callback.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    if callbacks is None:
        return []
    if isinstance(callbacks, list | tuple):
        return [
            one
            for i, nested in enumerate(callbacks)
            for one in flatten(nested, f"{where}[{i}]")
        ]
    if isinstance(callbacks, Mapping):
        return [
            one
            for key in sorted(callbacks)  # as Keras orders them
            for one in flatten(callbacks[key], f"{where}[{key!r}]")
        ]
    if isinstance(callbacks, keras.callbacks.Callback):
        return [callbacks]
    remedy = "give a `keras.callbacks.Callback`"
    if isinstance(callbacks, type):
        remedy = f"make one of the class: `{callbacks.__name__}()`"
    raise ConfigError(
        f"{where} is {callbacks!r:.100}, which is no callback; {remedy}."
    )


def make_entry(callback: keras.callbacks.Callback, key: str) -> Entry:
    """Finds out about a callback.

    Raises:
        ConfigError: if it cannot be used.
    """
    adapter = adapter_of(callback)
    why = adapter.check(callback)
    if why is not None:
        raise ConfigError(f"callback {key} is not needed: {why}")
    names = ("get_state", "set_state")
    own = [name for name in names if callable(getattr(callback, name, None))]
    if len(own) == 1:
        raise ConfigError(
            f"callback {key} defines only `{own[0]}`: define both, `get_state` "
            "and `set_state`, or neither."
        )
    hooks = {
        name
        for name in dir(keras.callbacks.Callback)
        if name.startswith("on_") and _overrides(callback, name)
    }
    kerass_own = is_kerass_own(callback)
    if not adapter.has_batch_hooks(callback):
        # A subclass of the user's may have batch hooks of its own.
        hooks -= {
            hook
            for hook in (*TRAIN_BATCH_HOOKS, *TEST_BATCH_HOOKS)
            if _is_kerass(getattr(callback, hook))
        }
    # `on_train_batch_begin` is what calls `on_batch_begin`.
    hooks |= {
        f"on_train_{name.removeprefix('on_')}"
        for name in ("on_batch_begin", "on_batch_end")
        if name in hooks
    }
    return Entry(
        key=key,
        callback=callback,
        adapter=adapter,
        own_state=bool(own),
        captures=(adapter.whole or not kerass_own) and not own,
        active=frozenset(hooks),
        arguments=_arguments(type(callback)),
    )


def _arguments(cls: type) -> frozenset[str]:
    """The attributes in which constructors, by custom, put arguments."""
    names: set[str] = set()
    for base in cls.__mro__[:-1]:
        if "__init__" in vars(base):
            try:
                names.update(
                    inspect.signature(vars(base)["__init__"]).parameters
                )
            except (TypeError, ValueError):  # one that is written in C
                continue
    return frozenset(names | {f"_{name}" for name in names})


def _overrides(callback: keras.callbacks.Callback, hook: str) -> bool:
    method = getattr(callback, hook)
    function = getattr(method, "__func__", method)
    return function is not getattr(keras.callbacks.Callback, hook)


def _is_kerass(method: Any) -> bool:
    module = getattr(method, "__module__", None)
    return isinstance(module, str) and module.partition(".")[0] == "keras"


def audit_entry(key: str, status: AuditStatus, detail: str = "") -> AuditEntry:
    """One line of the audit, about a callback."""
    return AuditEntry("callbacks", key, status, detail)


def restore_entry(
    entry: Entry,
    parts: object,
    arrays: Mapping[str, np.ndarray],
    references: capture.References,
) -> tuple[list[AuditEntry], list[str]]:
    """Restores one callback: all is decoded before anything is changed.

    Returns:
        What became of it, and what has to be said about that.

    Raises:
        RestoreError: if it does not fit; nothing was changed.
        DamagedError: if it is no state; nothing was changed.
    """
    if not isinstance(parts, dict):
        raise DamagedError("callback state: not one of a callback.")
    callback: Any = entry.callback

    def read(part: str) -> Any:
        value = capture.decode(
            parts[part],
            _arrays(arrays, entry, part),
            like=type(callback),
            references=references,
        )
        if not isinstance(value, dict):
            raise DamagedError("callback state: not one of a callback.")
        return value

    expected = {
        "adapter": None,
        "own": entry.own_state,
        "attributes": entry.captures,
    }
    for part, wanted in expected.items():
        if wanted is not None and (part in parts) != wanted:
            raise RestoreError(
                "its state was saved in another way: it has begun, or ceased, "
                "to define `get_state` and `set_state`."
            )
    lost = parts.get("lost", {})
    if not isinstance(lost, dict):
        raise DamagedError("callback state: not one of a callback.")
    state = read("adapter") if "adapter" in parts else {}
    audit, remarks, detail = [], [], ""
    if "own" in parts:
        own = read("own")
        remarks.append(entry.adapter.set(callback, state))
        callback.set_state(own)
    elif "attributes" in parts:
        kept, remarks = _left_to_the_program(entry, parts)
        restored = capture.prepare(
            callback,
            parts["attributes"],
            _arrays(arrays, entry, "attributes"),
            skip=entry.skip | kept,
            references=references,
        )
        remarks.append(entry.adapter.set(callback, state))
        restored.apply()
        if restored.removed:
            detail = f"removed, as at the checkpoint: {restored.removed}"
        audit = [
            audit_entry(
                f"{entry.key}.{path}", AuditStatus.NOT_RESUMABLE, str(why)
            )
            for path, why in lost.items()
        ]
    else:
        remarks.append(entry.adapter.set(callback, state))
    remarks = [remark for remark in remarks if remark]
    detail = "; ".join([*remarks, *[detail] * bool(detail)])
    return [
        audit_entry(entry.key, AuditStatus.RESTORED, detail),
        *audit,
    ], remarks


def _left_to_the_program(
    entry: Entry, parts: Mapping[str, Any]
) -> tuple[frozenset[str], list[str | None]]:
    """What is not restored, for it was no state, and where that shows."""
    unchanged = parts.get("unchanged", {})
    saved: dict[str, Any] = {}
    match parts["attributes"]:
        case {"value": {"ref": int(root)}, "objects": list(nodes)} if (
            0 <= root < len(nodes) and isinstance(nodes[root], dict)
        ):
            saved = nodes[root].get("attributes", {})
    if not isinstance(unchanged, dict) or not isinstance(saved, dict):
        raise DamagedError("callback state: not one of a callback.")
    kept, remarks = set(), []
    for name, look in unchanged.items():
        match look:
            case [str(digest), bool(is_saved)]:
                pass
            case _:
                raise DamagedError("callback state: not one of a callback.")
        origin = entry.origin.get(name)
        if is_saved and origin is None:
            continue  # no argument any more: the checkpoint has it
        kept.add(name)
        if origin is None or origin.digest != digest:
            here = vars(entry.callback).get(name)
            values = ""
            if is_saved and _is_short(saved.get(name)) and _is_short(here):
                values = f" ({saved.get(name)!r} -> {here!r})"
            remarks.append(
                f"`{name}` is another than when the run began{values}, and it "
                "did not change while it ran: this program's is used"
            )
    return frozenset(kept), remarks


def _is_short(value: object) -> bool:
    return isinstance(value, bool | int | float | str | None) and (
        len(repr(value)) <= 60
    )


def _arrays(
    arrays: Mapping[str, np.ndarray], entry: Entry, part: str
) -> dict[str, np.ndarray]:
    prefix = f"{entry.key}.{part}."
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
