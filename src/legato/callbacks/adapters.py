"""What is special about each of Keras's own callbacks.

Capturing their attributes is not enough: they build some lazily, reset others
in `on_train_begin`, and hold files. Each adapter says what its callback's
state is; what the constructor was given is not part of it, so that a longer
patience, say, holds from the next start on.

Private attributes of Keras's classes are touched here and nowhere else.
"""

# ruff: noqa: D102 - what the methods of an adapter do is said in `Adapter`
import os
from typing import Any, ClassVar

import keras

from legato.callbacks.base import Adapter
from legato.callbacks.tensorboard import TensorBoardAdapter
from legato.errors import ConfigError, RestoreError
from legato.types import JSON

_callbacks = keras.callbacks


class MonitorAdapter(Adapter):
    """A callback that compares a metric with its best.

    `monitor_op` is built at the first epoch's end, and the sign of
    `min_delta` is flipped when it is: one without the other, and the
    comparison is wrong from then on.
    """

    state: ClassVar[dict[str, type]] = {"best": object}
    derived = frozenset({"monitor", "mode", "monitor_op", "min_delta"})

    def get(self, callback: Any) -> dict[str, Any]:
        state = super().get(callback)
        if callback.monitor_op is not None:
            less = callback.monitor_op is keras.ops.less
            state["direction"] = "min" if less else "max"
        return state

    def set(self, callback: Any, state: dict[str, Any]) -> str | None:
        direction = state.get("direction")
        if direction not in (None, "min", "max"):
            raise RestoreError(f"`direction` is {direction!r:.80}.")
        if direction and callback.mode not in ("auto", direction):
            raise RestoreError(
                f"it looked for the {direction} of {callback.monitor!r}, and "
                f"now has mode={callback.mode!r}."
            )
        super().set(callback, state)
        size = abs(callback.min_delta)
        callback.monitor_op = None
        callback.min_delta = size
        if direction == "min":
            callback.monitor_op = keras.ops.less
            callback.min_delta = size * -1  # as Keras does: 0 stays 0
        elif direction == "max":
            callback.monitor_op = keras.ops.greater


class EarlyStoppingAdapter(MonitorAdapter):
    """`EarlyStopping`: `on_train_begin` resets all of it."""

    state: ClassVar[dict[str, type]] = {
        "best": object,
        "best_epoch": int,
        "best_weights": object,
        "stopped_epoch": int,
        "wait": int,
    }

    def set(self, callback: Any, state: dict[str, Any]) -> str | None:
        weights = state.get("best_weights")
        if weights is not None:
            now = [tuple(weight.shape) for weight in callback.model.weights]
            if not isinstance(weights, list) or now != [
                getattr(weight, "shape", None) for weight in weights
            ]:
                raise RestoreError("its best weights are of another model.")
        super().set(callback, state)


class ReduceLROnPlateauAdapter(MonitorAdapter):
    """`ReduceLROnPlateau`; the learning rate itself is the optimizer's."""

    state: ClassVar[dict[str, type]] = {
        "best": object,
        "cooldown_counter": int,
        "wait": int,
    }


class ModelCheckpointAdapter(MonitorAdapter):
    """`ModelCheckpoint`: its counters. The files that it wrote stay."""

    state: ClassVar[dict[str, type]] = {
        "best": object,
        "_batches_seen_since_last_saving": int,
        # Set by `on_epoch_begin`, which is not called again in mid-epoch.
        "_current_epoch": int,
        "_last_batch_seen": object,
    }

    def has_batch_hooks(self, callback: Any) -> bool:
        return callback.save_freq != "epoch"


class CSVLoggerAdapter(Adapter):
    """`CSVLogger`: its file is cut back to the rows that count.

    Keras empties the file in `on_train_begin`. Instead it is opened for
    appending, and cut afterwards: at no instant does it hold fewer rows than
    the checkpoint counts, so this may be killed and repeated.
    """

    derived = frozenset(
        {"append_header", "csv_file", "keys", "writer", "append", "filename"}
    )

    def __init__(self) -> None:
        self._synced: dict[tuple[int, int], int] = {}

    def note(self, callback: Any) -> JSON:
        if not callback.append:
            return None  # a run that begins empties it
        path = os.path.abspath(callback.filename)
        size = os.path.getsize(path) if os.path.exists(path) else 0
        return {"path": path, "size": size}

    def _cut(self, callback: Any, note: JSON) -> None:
        """Takes off what a process added that left no checkpoint."""
        match note:
            case {"path": str(path), "size": int(size)}:
                if (
                    path == os.path.abspath(callback.filename)
                    and os.path.exists(path)
                    and 0 <= size < os.path.getsize(path)
                ):
                    os.truncate(path, size)
                    callback.append_header = size == 0

    def before_train_begin(
        self, callback: Any, *, resuming: bool, note: JSON, token: str | None
    ) -> bool:
        append = callback.append
        if append and not resuming:
            self._cut(callback, note)
        callback.append = append or resuming
        return append

    def after_train_begin(self, callback: Any, before: bool) -> None:
        callback.append = before

    def get(self, callback: Any) -> dict[str, Any]:
        file = callback.csv_file
        path = callback.filename
        if file is not None and not file.closed:
            file.flush()
            stat = os.fstat(file.fileno())
            size, inode = stat.st_size, (stat.st_dev, stat.st_ino)
            # The rows must be on disk before a checkpoint counts them.
            if self._synced.get(inode) != size:
                os.fsync(file.fileno())
                self._synced[inode] = size
        else:
            size = os.path.getsize(path) if os.path.exists(path) else 0
        return {
            "size": size,
            "keys": callback.keys,
            # Whoever has a writer has decided about the header.
            "append_header": callback.append_header and not callback.writer,
        }

    def set(self, callback: Any, state: dict[str, Any]) -> str | None:
        size, keys = state.get("size"), state.get("keys")
        header = state.get("append_header")
        if not (
            type(size) is int
            and size >= 0
            and type(header) is bool
            and (keys is None or isinstance(keys, list))
        ):
            raise RestoreError("its state is none of a CSVLogger.")
        path = callback.filename
        there = os.path.getsize(path) if os.path.exists(path) else 0
        if there < size:
            raise RestoreError(
                f"{path!r} has {there} bytes and the checkpoint counts {size}: "
                "rows were removed from it, or it is another file. It is "
                "appended to."
            )
        if there > size:
            os.truncate(path, size)
        callback.keys = keys
        callback.append_header = header
        callback.writer = None

    def absent(self, callback: Any, note: JSON) -> None:
        if callback.append:
            self._cut(callback, note)
        elif os.path.exists(callback.filename):
            os.truncate(callback.filename, 0)  # as Keras would have
            callback.append_header = True

    def close(self, callback: Any) -> None:
        if callback.csv_file is not None and not callback.csv_file.closed:
            callback.csv_file.close()


class HistoryAdapter(Adapter):
    """`History`: `on_train_begin` empties only half of it."""

    state: ClassVar[dict[str, type]] = {"epoch": list, "history": dict}

    def set(self, callback: Any, state: dict[str, Any]) -> str | None:
        history = state.get("history", {})
        if not isinstance(history, dict) or not all(
            isinstance(values, list) for values in history.values()
        ):
            raise RestoreError("its state is none of a History.")
        super().set(callback, state | {"history": callback.history})
        # In place: it is what `fit` returns, and a user may hold it already.
        callback.history.clear()
        callback.history.update(history)


class ProgbarLoggerAdapter(Adapter):
    """`ProgbarLogger`: nothing to save."""

    derived = frozenset(
        {"seen", "progbar", "target", "verbose", "epochs", "_called_in_fit"}
    )

    def has_batch_hooks(self, callback: Any) -> bool:
        return False

    def resumed(self, callback: Any) -> None:
        # Made by `on_epoch_begin`; without it the epoch's end would fail.
        callback._maybe_init_progbar()


class TerminateOnNaNAdapter(Adapter):
    """`TerminateOnNaN`: sees each batch, so that it stops at the first NaN.

    Steps that a longer device loop would still have run after it would make
    the end depend on where loops are cut.
    """


class SwapEMAWeightsAdapter(Adapter):
    """`SwapEMAWeights`: whether it is the averages that the model holds."""

    state: ClassVar[dict[str, type]] = {"_ema_weights_in_model": bool}


class FunctionsAdapter(Adapter):
    """`LambdaCallback`, `LearningRateScheduler`: what their functions hold."""

    derived = frozenset({"verbose"})
    whole = True


class RemoteMonitorAdapter(Adapter):
    """`RemoteMonitor`: nothing to save."""


class UserAdapter(Adapter):
    """A class of the user's that is derived from `Callback` directly."""

    whole = True


class RefusedAdapter(Adapter):
    """A callback that saves or restores the run by itself."""

    def __init__(self, why: str) -> None:
        self._why = why

    def check(self, callback: Any) -> str | None:
        return self._why


_REFUSED = (
    "legato saves and restores the whole run itself, in `run_dir`, and two "
    "that do would overwrite each other's weights. Leave it out; use "
    "`checkpoint_interval` to say how often."
)

# The first that fits counts.
_ADAPTERS: tuple[tuple[type, Adapter], ...] = (
    (_callbacks.EarlyStopping, EarlyStoppingAdapter()),
    (_callbacks.ReduceLROnPlateau, ReduceLROnPlateauAdapter()),
    (_callbacks.ModelCheckpoint, ModelCheckpointAdapter()),
    (_callbacks.CSVLogger, CSVLoggerAdapter()),
    (_callbacks.TensorBoard, TensorBoardAdapter()),
    (_callbacks.History, HistoryAdapter()),
    (_callbacks.ProgbarLogger, ProgbarLoggerAdapter()),
    (_callbacks.TerminateOnNaN, TerminateOnNaNAdapter()),
    (_callbacks.SwapEMAWeights, SwapEMAWeightsAdapter()),
    (_callbacks.RemoteMonitor, RemoteMonitorAdapter()),
    (_callbacks.LambdaCallback, FunctionsAdapter()),
    (_callbacks.LearningRateScheduler, FunctionsAdapter()),
    (_callbacks.BackupAndRestore, RefusedAdapter(_REFUSED)),
    (_callbacks.OrbaxCheckpoint, RefusedAdapter(_REFUSED)),
)
_USER = UserAdapter()


def adapter_of(callback: keras.callbacks.Callback) -> Adapter:
    """The adapter for a callback: that of the class of Keras's it extends."""
    for cls, adapter in _ADAPTERS:
        if isinstance(callback, cls):
            return adapter
    return _USER


def is_kerass_own(callback: keras.callbacks.Callback) -> bool:
    """Whether the class is one of Keras's, and not a subclass of one."""
    return any(type(callback) is cls for cls, _ in _ADAPTERS)


def set_directions(
    callback: keras.callbacks.Callback, directions: dict[str, str]
) -> None:
    """Tells a callback in which direction its metric is better.

    Keras finds that in the compiled metrics of the model; the model of a task
    is not compiled.

    Args:
        callback: any callback; one with `mode="auto"` is changed.
        directions: metric -> "min" or "max".

    Raises:
        ConfigError: if a direction is neither.
    """
    for name, direction in directions.items():
        if direction not in ("min", "max"):
            raise ConfigError(
                f"metric_directions[{name!r}] is {direction!r}; it must be "
                "'min' or 'max'."
            )
    if isinstance(adapter_of(callback), MonitorAdapter):
        monitor: Any = callback
        direction = directions.get(monitor.monitor.removeprefix("val_"))
        if monitor.mode == "auto" and direction is not None:
            monitor.mode = direction
