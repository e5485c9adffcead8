"""Calls Keras callbacks, and saves and restores their state."""

import collections
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from legato import capture
from legato.callbacks.adapters import set_directions
from legato.callbacks.entries import (
    TEST_BATCH_HOOKS,
    TRAIN_BATCH_HOOKS,
    Entry,
    audit_entry,
    flatten,
    make_entry,
    restore_entry,
)
from legato.callbacks.notes import Notes, read_notes
from legato.errors import (
    ConfigError,
    DamagedError,
    ExactnessError,
    ExactnessWarning,
    RestoreError,
)
from legato.types import JSON, AuditEntry, AuditStatus, Logs

Exact = Literal["strict", "warn", "off"]

_MAX_REPORTED = 8
"""Of one callback; some hold thousands of objects."""


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
        notes: a file of the run's, which must be there as long as the run is:
            what a process must know if the one before left no checkpoint.
        add_history: add a `History`, unless there is one.

    Attributes:
        callbacks: the callbacks, in order.
        history: the last `History` among them, if any.
        batch_hooks_active: whether some callback acts at each training batch.
        wants_batch_logs: whether one of them looks at the batch's logs.
        test_batch_hooks_active: the same for validation batches.
        wants_test_batch_logs: the same for the logs of these.
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
        notes: Path | None = None,
        add_history: bool = False,
        as_made: Mapping[str, capture.Captured] | None = None,
    ) -> None:
        if exact not in ("strict", "warn", "off"):
            raise ConfigError(
                f"exact={exact!r}: it must be 'strict', 'warn' or 'off'."
            )
        self.callbacks = flatten(callbacks, "callbacks")
        histories = [
            callback
            for callback in self.callbacks
            if isinstance(callback, keras.callbacks.History)
        ]
        if add_history and not histories:
            histories = [keras.callbacks.History()]
            self.callbacks += histories
        self.history = histories[-1] if histories else None
        self._model: Any = model
        self._params = params
        self._exact = exact
        self._outside = dict(references or {})
        self._notes_path = notes
        self._notes = Notes()
        self.as_made = dict(as_made or {})
        self._entries: list[Entry] = []
        ordinals: collections.Counter[str] = collections.Counter()
        for callback in self.callbacks:
            name = type(callback).__name__
            self._entries.append(
                make_entry(callback, f"{name}.{ordinals[name]}")
            )
            ordinals[name] += 1
            set_directions(callback, dict(metric_directions or {}))
        if self.history is not None:
            self._model.history = self.history
        for entry in self._entries:
            entry.adapter.attach(entry.callback, model)
            if params:  # as Keras does: `evaluate` has none
                entry.callback.set_params(params)
        self.batch_hooks_active = self._acts(TRAIN_BATCH_HOOKS)
        self.test_batch_hooks_active = self._acts(TEST_BATCH_HOOKS)
        self.wants_batch_logs = self._acts(
            ("on_train_batch_end", "on_batch_end")
        )
        self.wants_test_batch_logs = self._acts(("on_test_batch_end",))
        self.test_hooks_active = self._acts(
            (*TEST_BATCH_HOOKS, "on_test_begin", "on_test_end")
        )

    @property
    def end_on_nan(self) -> bool:
        """Whether one of them ends training when the loss is not finite."""
        return any(
            isinstance(callback, keras.callbacks.TerminateOnNaN)
            for callback in self.callbacks
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
        left = self._take_notes(resuming=resuming)
        self.make_anew()
        self._take_origins()
        for entry in self._entries:
            adapter, callback = entry.adapter, entry.callback
            token = None
            if self._notes_path is not None:
                token = f"{self._notes.token}-{entry.key}"
            before = adapter.before_train_begin(
                callback,
                resuming=resuming,
                note=left.get(entry.key),
                token=token,
            )
            try:
                if "on_train_begin" in entry.active:
                    callback.on_train_begin(logs)
            finally:
                adapter.after_train_begin(callback, before)
        if not resuming:
            self._take_baselines()

    def _take_notes(self, *, resuming: bool) -> dict[str, JSON]:
        """Writes down what is not yet; gives what a dead process did."""
        if self._notes_path is None:
            return {}
        known = read_notes(self._notes_path)
        if known is not None:
            self._notes = known
        left = dict(self._notes.by_key)
        new = {e.key: e.adapter.note(e.callback) for e in self._entries}
        new = {k: v for k, v in new.items() if v is not None and k not in left}
        if not resuming:  # else `set_state` tells which are needed
            self._notes.by_key |= new
        if new and (known is None or not resuming):
            self._notes.write(self._notes_path)
        return left

    def _settle_notes(self, saved: Mapping[str, object]) -> None:
        """A checkpoint that knows a callback is better than a note of it."""
        if self._notes_path is None:
            return
        kept = {k: v for k, v in self._notes.by_key.items() if k not in saved}
        for entry in self._entries:
            if entry.key not in saved and entry.key not in kept:
                note = entry.adapter.note(entry.callback)
                if note is not None:
                    kept[entry.key] = note
        if kept != self._notes.by_key:
            self._notes.by_key = kept
            self._notes.write(self._notes_path)

    def close(self) -> None:
        """Lets go of files and writers, however training ended; idempotent."""
        for entry in self._entries:
            entry.adapter.close(entry.callback)

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

    @property
    def stop_evaluating(self) -> bool:
        """Whether a hook asked to end the validation, as Keras names it."""
        return bool(self._model.stop_evaluating)

    def on_test_begin(self) -> None:
        """Calls `on_test_begin`."""
        self._model.stop_evaluating = False
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
                if part == "attributes":
                    parts["lost"] = self._check_exact(entry, captured)
                    captured, parts["unchanged"] = entry.leave_unchanged(
                        captured
                    )
                # Names of their own: two parts may use the same ones.
                prefix = f"{entry.key}.{part}."
                parts[part] = captured.tree
                for name, array in captured.arrays.items():
                    arrays[prefix + name] = array
            tree[entry.key] = parts
        return {"format": 1, "callbacks": tree}, arrays

    def _capture(
        self, entry: Entry, references: capture.References
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

    def remember(self) -> None:
        """Keep a copy of the callbacks as the program made them.

        Before `on_train_begin`: for a run that may go back in this process.
        """
        references = self._references()
        for entry in self._entries:
            if entry.captures:
                made = capture.capture(
                    entry.callback, skip=entry.skip, references=references
                )
                arrays = {k: a.copy() for k, a in made.arrays.items()}
                self.as_made[entry.key] = dataclasses.replace(
                    made, arrays=arrays
                )

    def make_anew(self) -> None:
        """Put back what `remember` kept: a new process would have that."""
        references = self._references()
        for entry in self._entries:
            made = self.as_made.get(entry.key)
            if made is not None:
                capture.prepare(
                    entry.callback,
                    made.tree,
                    made.arrays,
                    skip=entry.skip,
                    references=references,
                ).apply()

    def _take_origins(self) -> None:
        references = self._references()
        for entry in self._entries:
            if entry.captures:
                entry.origin = entry.looks(
                    capture.capture(
                        entry.callback, skip=entry.skip, references=references
                    )
                )

    def _check_exact(self, entry: Entry, captured: capture.Captured) -> JSON:
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

    def _report(self, entry: Entry, path: str, message: str) -> None:
        if self._exact == "strict":
            raise ExactnessError(message)
        if self._exact != "warn" or path in entry.reported:
            return
        entry.reported.add(path)
        if len(entry.reported) == _MAX_REPORTED:
            message += f" (More of callback {entry.key} is not named.)"
        if len(entry.reported) <= _MAX_REPORTED:
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
                entry.adapter.absent(
                    entry.callback, self._notes.by_key.get(entry.key)
                )
                audit.append(audit_entry(entry.key, AuditStatus.NEW))
                continue
            try:
                restored, remarks = restore_entry(
                    entry, saved[entry.key], arrays, references
                )
                audit += restored
            except (RestoreError, DamagedError) as error:
                message = f"callback {entry.key} is not restored: {error}"
                audit.append(
                    audit_entry(
                        entry.key, AuditStatus.NOT_RESUMABLE, str(error)
                    )
                )
                self._report(entry, "", message)
            else:
                for remark in remarks:
                    self._report(
                        entry, remark, f"callback {entry.key}: {remark}"
                    )
        known = {entry.key for entry in self._entries}
        missing = [key for key in saved if key not in known]
        audit += [audit_entry(key, AuditStatus.MISSING) for key in missing]
        self._settle_notes(saved)
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
