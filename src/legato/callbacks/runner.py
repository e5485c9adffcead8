"""Calls Keras callbacks, and saves and restores their state."""

import collections
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from legato import capture
from legato.callbacks.adapters import (
    Adapter,
    adapter_of,
    is_kerass_own,
    set_directions,
)
from legato.errors import (
    ConfigError,
    DamagedError,
    ExactnessError,
    ExactnessWarning,
    RestoreError,
)
from legato.types import JSON, AuditEntry, AuditStatus, Logs

Exact = Literal["strict", "warn", "off"]

# Keras's own, not part of any state.
_CALLBACK = frozenset({"_model", "model", "params"})

_TRAIN_BATCH_HOOKS = (
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_batch_begin",
    "on_batch_end",
)
_TEST_BATCH_HOOKS = ("on_test_batch_begin", "on_test_batch_end")


@dataclasses.dataclass(eq=False)
class _Entry:
    """A callback and what the runner knows about it."""

    key: str
    callback: keras.callbacks.Callback
    adapter: Adapter
    own_state: bool  # it defines get_state and set_state
    captures: bool  # its attributes, as far as the adapter leaves them
    active: frozenset[str]  # the hooks to be called
    # What could not be captured, as it was when training began.
    baseline: Mapping[str, capture.Token] | None = None
    reported: set[str] = dataclasses.field(default_factory=set)

    @property
    def skip(self) -> frozenset[str]:
        return _CALLBACK | self.adapter.owned


class CallbackRunner:
    """The callbacks of one run.

    Args:
        callbacks: Keras callbacks; lists of them may be nested.
        model: the model being trained.
        params: what Keras's `set_params` gets (`epochs`, `steps`, `verbose`).
        exact: what happens if an attribute changed and cannot be saved.
        metric_directions: metric -> "min" or "max", for callbacks with
            `mode="auto"` (the model need not be compiled).
        references: objects by name that callbacks may hold and whose state is
            not theirs, such as the trainer.

    Attributes:
        callbacks: the callbacks, in order.
        batch_hooks_active: whether some callback acts at each training batch.
        test_batch_hooks_active: the same for validation batches.
        test_hooks_active: whether some callback acts in validation at all.

    Raises:
        ConfigError: if one of them is no callback, or cannot be used.
    """

    def __init__(
        self,
        callbacks: Sequence[Any],
        *,
        model: keras.Model,
        params: dict[str, Any],
        exact: Exact = "warn",
        metric_directions: Mapping[str, str] | None = None,
        references: Mapping[str, object] | None = None,
    ) -> None:
        if exact not in ("strict", "warn", "off"):
            raise ConfigError(
                f"exact={exact!r}: it must be 'strict', 'warn' or 'off'."
            )
        self.callbacks = _flatten(callbacks, "callbacks")
        self._model = model
        self._params = params
        self._exact = exact
        self._outside = dict(references or {})
        self._entries: list[_Entry] = []
        ordinals: collections.Counter[str] = collections.Counter()
        for callback in self.callbacks:
            name = type(callback).__name__
            self._entries.append(_entry(callback, f"{name}.{ordinals[name]}"))
            ordinals[name] += 1
            set_directions(callback, dict(metric_directions or {}))
        for entry in self._entries:
            entry.callback.set_model(model)
            entry.callback.set_params(params)
        self.batch_hooks_active = self._acts(_TRAIN_BATCH_HOOKS)
        self.test_batch_hooks_active = self._acts(_TEST_BATCH_HOOKS)
        self.test_hooks_active = self._acts(
            (*_TEST_BATCH_HOOKS, "on_test_begin", "on_test_end")
        )

    def _acts(self, hooks: tuple[str, ...]) -> bool:
        return any(e.active.intersection(hooks) for e in self._entries)

    # -- hooks --------------------------------------------------------------

    def _call(self, hook: str, *args: Any, **kwargs: Any) -> None:
        for entry in self._entries:
            if hook in entry.active:
                getattr(entry.callback, hook)(*args, **kwargs)

    def on_train_begin(self, *, resuming: bool) -> None:
        """Calls `on_train_begin`.

        Args:
            resuming: whether `set_state` will follow. Files that a checkpoint
                counts are then not emptied.
        """
        logs: Logs = {}
        for entry in self._entries:
            adapter, callback = entry.adapter, entry.callback
            before = adapter.before_train_begin(callback, resuming=resuming)
            try:
                if "on_train_begin" in entry.active:
                    callback.on_train_begin(logs)
            finally:
                adapter.after_train_begin(callback, before)
        if not resuming:
            self._take_baselines()

    def on_train_end(self, logs: Logs | None = None) -> None:
        """Calls `on_train_end`."""
        self._call("on_train_end", {} if logs is None else logs)

    def on_epoch_begin(self, epoch: int) -> None:
        """Calls `on_epoch_begin`."""
        self._call("on_epoch_begin", epoch, {})

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Calls `on_epoch_end`; callbacks may add to `logs`."""
        self._call("on_epoch_end", epoch, logs)

    def on_train_batch_begin(self, batch: int) -> None:
        """Calls `on_train_batch_begin` where it does something."""
        # By name, as Keras does: a user's hook may take it by name only.
        self._call("on_train_batch_begin", batch, logs={})

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        """Calls `on_train_batch_end` where it does something."""
        self._call("on_train_batch_end", batch, logs=logs)

    def on_test_begin(self) -> None:
        """Calls `on_test_begin`."""
        self._call("on_test_begin", {})

    def on_test_end(self, logs: Logs) -> None:
        """Calls `on_test_end`."""
        self._call("on_test_end", logs)

    def on_test_batch_begin(self, batch: int) -> None:
        """Calls `on_test_batch_begin` where it does something."""
        self._call("on_test_batch_begin", batch, logs={})

    def on_test_batch_end(self, batch: int, logs: Logs) -> None:
        """Calls `on_test_batch_end` where it does something."""
        self._call("on_test_batch_end", batch, logs=logs)

    # -- state --------------------------------------------------------------

    def get_state(self) -> tuple[JSON, dict[str, np.ndarray]]:
        """The state of all callbacks: a snapshot that shares nothing.

        Arrays are copies, so that training may go on while they are written.

        Returns:
            JSON values, and the arrays that they name.

        Raises:
            ExactnessError: if `exact="strict"` and an attribute changed that
                cannot be saved.
            ConfigError: if a `get_state` gives something that cannot be
                saved.
        """
        references = self._references()
        tree: dict[str, JSON] = {}
        arrays: dict[str, np.ndarray] = {}
        for entry in self._entries:
            parts: dict[str, JSON] = {}
            for part, captured in self._capture(entry, references).items():
                # Names of their own: two parts may use the same ones.
                prefix = f"{entry.key}.{part}."
                parts[part] = captured.tree
                for name, array in captured.arrays.items():
                    arrays[prefix + name] = array
                if part == "attributes":
                    parts["lost"] = self._check_exact(entry, captured)
            tree[entry.key] = parts
        return {"format": 1, "callbacks": tree}, arrays

    def _capture(
        self, entry: _Entry, references: capture.References
    ) -> dict[str, capture.Captured]:
        callback, parts = entry.callback, {}
        state = entry.adapter.get(callback)
        if state:
            parts["adapter"] = capture.capture(state, references=references)
        if entry.own_state:
            own: Any = callback
            state = own.get_state()
            name = f"{type(callback).__qualname__}.get_state()"
            if not isinstance(state, dict):
                raise ConfigError(
                    f"{name} returned {state!r:.80}; it must return a dict."
                )
            captured = capture.capture(state, references=references)
            for path, why in captured.left_out.items():
                raise ConfigError(
                    f"{name}{path} is {why}, which cannot be saved."
                )
            parts["own"] = captured
        elif entry.captures:
            parts["attributes"] = capture.capture(
                callback, skip=entry.skip, references=references
            )
        return parts

    def _check_exact(self, entry: _Entry, captured: capture.Captured) -> JSON:
        """Names what changed and could not be captured."""
        if entry.baseline is None:
            entry.baseline = captured.tokens
        lost: dict[str, JSON] = {}
        for path in capture.changed(entry.baseline, captured.tokens):
            lost[path] = captured.left_out.get(
                path, "an object whose class cannot be looked up by name"
            )
            message = (
                f"callback {entry.key}: `{path}` is {lost[path]}; it changed "
                "during training and cannot be saved, so that a resumed run "
                "would differ. Define `get_state` and `set_state`, or keep it "
                "in an attribute that can be saved."
            )
            self._report(entry, path, message)
        return lost

    def _report(self, entry: _Entry, path: str, message: str) -> None:
        if self._exact == "strict":
            raise ExactnessError(message)
        if self._exact == "warn" and path not in entry.reported:
            entry.reported.add(path)
            warnings.warn(message, ExactnessWarning, stacklevel=4)

    def set_state(
        self, tree: JSON, arrays: Mapping[str, np.ndarray]
    ) -> list[AuditEntry]:
        """Puts a state back, after `on_train_begin(resuming=True)`.

        Each callback is restored whole or left as it is.

        Args:
            tree: the first of what `get_state` gave.
            arrays: the second.

        Returns:
            What became of each callback.

        Raises:
            DamagedError: if it is no state of callbacks.
            ExactnessError: if `exact="strict"` and a callback could not be
                restored.
        """
        match tree:
            case {"format": 1, "callbacks": dict(saved)}:
                pass
            case _:
                raise DamagedError("callback state: not one of callbacks.")
        references = self._references()
        audit: list[AuditEntry] = []
        for entry in self._entries:
            if entry.key not in saved:
                entry.adapter.absent(entry.callback)
                audit.append(_audit(entry.key, AuditStatus.NEW))
                continue
            try:
                audit += _restore(entry, saved[entry.key], arrays, references)
            except (RestoreError, DamagedError) as error:
                message = f"callback {entry.key} is not restored: {error}"
                audit.append(
                    _audit(entry.key, AuditStatus.NOT_RESUMABLE, str(error))
                )
                self._report(entry, "", message)
        known = {entry.key for entry in self._entries}
        missing = [key for key in saved if key not in known]
        audit += [_audit(key, AuditStatus.MISSING) for key in missing]
        for entry in self._entries:
            entry.adapter.resumed(entry.callback)
        self._take_baselines()
        return audit

    def _take_baselines(self) -> None:
        references = self._references()
        for entry in self._entries:
            if entry.captures:
                entry.baseline = capture.fingerprint(
                    entry.callback, skip=entry.skip, references=references
                )

    def _references(self) -> capture.References:
        """What a callback may refer to and must not save a copy of."""
        model: Any = self._model
        optimizer = getattr(model, "optimizer", None)
        objects = {
            **self._outside,
            "model": model,
            "params": self._params,
        }
        if optimizer is not None:
            objects["optimizer"] = optimizer
        for entry in self._entries:
            objects[f"callback {entry.key}"] = entry.callback

        def more() -> dict[str, object]:
            variables = [*model.variables, *getattr(optimizer, "variables", ())]
            return {
                **{f"layer {i}": v for i, v in enumerate(model.layers)},
                **{f"variable {i}": v for i, v in enumerate(variables)},
            }

        return capture.References(objects, more)


def _flatten(callbacks: object, where: str) -> list[keras.callbacks.Callback]:
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    if callbacks is None:
        return []
    if isinstance(callbacks, list | tuple):
        return [
            one
            for i, nested in enumerate(callbacks)
            for one in _flatten(nested, f"{where}[{i}]")
        ]
    if isinstance(callbacks, keras.callbacks.Callback):
        return [callbacks]
    remedy = "give a `keras.callbacks.Callback`"
    if isinstance(callbacks, type):
        remedy = f"make one of the class: `{callbacks.__name__}()`"
    raise ConfigError(
        f"{where} is {callbacks!r:.100}, which is no callback; {remedy}."
    )


def _entry(callback: keras.callbacks.Callback, key: str) -> _Entry:
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
    batch_hooks = {*_TRAIN_BATCH_HOOKS, *_TEST_BATCH_HOOKS}
    # A subclass of the user's may have batch hooks of its own.
    kerass_own = is_kerass_own(callback)
    if kerass_own and not adapter.has_batch_hooks(callback):
        hooks -= batch_hooks
    # `on_train_batch_begin` is what calls `on_batch_begin`.
    hooks |= {
        f"on_train_{name.removeprefix('on_')}"
        for name in ("on_batch_begin", "on_batch_end")
        if name in hooks
    }
    return _Entry(
        key=key,
        callback=callback,
        adapter=adapter,
        own_state=bool(own),
        captures=(adapter.whole or not kerass_own) and not own,
        active=frozenset(hooks),
    )


def _overrides(callback: keras.callbacks.Callback, hook: str) -> bool:
    method = getattr(callback, hook)
    function = getattr(method, "__func__", method)
    return function is not getattr(keras.callbacks.Callback, hook)


def _audit(key: str, status: AuditStatus, detail: str = "") -> AuditEntry:
    return AuditEntry("callbacks", key, status, detail)


def _restore(
    entry: _Entry,
    parts: object,
    arrays: Mapping[str, np.ndarray],
    references: capture.References,
) -> list[AuditEntry]:
    """Restores one callback: all is decoded before anything is changed."""
    if not isinstance(parts, dict):
        raise DamagedError("callback state: not one of a callback.")
    callback: Any = entry.callback

    def read(part: str) -> Any:
        return capture.decode(
            parts[part],
            _arrays(arrays, entry, part),
            like=type(callback),
            references=references,
        )

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
    if not isinstance(state, dict):
        raise DamagedError("callback state: not one of a callback.")
    audit = []
    detail = ""
    if "own" in parts:
        own = read("own")
        if not isinstance(own, dict):
            raise DamagedError("callback state: not one of a callback.")
        entry.adapter.set(callback, state)
        callback.set_state(own)
    elif "attributes" in parts:
        restored = capture.prepare(
            callback,
            parts["attributes"],
            _arrays(arrays, entry, "attributes"),
            skip=entry.skip,
            references=references,
        )
        entry.adapter.set(callback, state)
        restored.apply()
        if restored.removed:
            detail = f"removed, as at the checkpoint: {restored.removed}"
        audit = [
            _audit(f"{entry.key}.{path}", AuditStatus.NOT_RESUMABLE, str(why))
            for path, why in lost.items()
        ]
    else:
        entry.adapter.set(callback, state)
    return [_audit(entry.key, AuditStatus.RESTORED, detail), *audit]


def _arrays(
    arrays: Mapping[str, np.ndarray], entry: _Entry, part: str
) -> dict[str, np.ndarray]:
    prefix = f"{entry.key}.{part}."
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
