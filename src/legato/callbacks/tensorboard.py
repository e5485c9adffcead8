"""`keras.callbacks.TensorBoard`: event files that are cut back on resume.

A process cannot go on with the event file of another: `tf.summary` begins a
new one, named by the second. So a run's curve is spread over several files,
which TensorBoard reads in the order of their names. To know the files of this
run from all others, each of them ends with the run's token.

At a checkpoint the sizes of the files are noted. On resume they are cut to
these, and those that were begun later are removed.
"""

# ruff: noqa: D102 - what the methods of an adapter do is said in `Adapter`
import importlib.util
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import keras

from legato.callbacks.base import Adapter
from legato.errors import RestoreError
from legato.types import JSON

# How long to wait at most, so that a new file is named after the last one.
_MAX_WAIT_SECS = 2.0


class TensorBoardAdapter(Adapter):
    """`TensorBoard`: its step counters, and how far its files count."""

    state: ClassVar[dict[str, type]] = {
        "_global_test_batch": int,
        "_global_train_batch": int,
        "_previous_epoch_iterations": object,
        "_should_write_train_graph": bool,
    }
    # Writers, contexts, clocks: of this process.
    derived = frozenset(
        {
            "_batch_start_time",
            "_batch_trace_context",
            "_epoch_start_time",
            "_is_tracing",
            "_prev_summary_state",
            "_profiler_started",
            "_summary_module",
            "_train_accumulated_time",
            "_writers",
        }
    )

    def check(self, callback: Any) -> str | None:
        if (
            type(callback) is keras.callbacks.TensorBoard
            and callback._summary_module is None
            and importlib.util.find_spec("tensorflow") is None
        ):
            return (
                "Keras's TensorBoard writes through tensorflow, which is not "
                "installed. legato writes TensorBoard summaries itself: leave "
                "it out."
            )
        return None

    def has_batch_hooks(self, callback: Any) -> bool:
        return (
            callback.update_freq != "epoch"
            or callback._should_trace
            or callback.write_steps_per_second
        )

    def attach(self, callback: Any, model: Any) -> None:
        # `set_model` writes the graph, and takes entries out of the metadata
        # that the user gave: both would be wrong the second time.
        graph, callback.write_graph = callback.write_graph, False
        metadata = callback.embeddings_metadata
        entries = dict(metadata) if isinstance(metadata, dict) else {}
        try:
            super().attach(callback, model)
        finally:
            callback.write_graph = graph
            if isinstance(metadata, dict):
                metadata.update(entries)

    def note(self, callback: Any) -> JSON:
        return "token"  # is all that is needed

    def before_train_begin(
        self, callback: Any, *, resuming: bool, note: JSON, token: str | None
    ) -> Any:
        if token is None:
            if not resuming:
                self._write_graph(callback)
            return None
        module = callback.summary
        if isinstance(module, _Summary):
            module = module.module
        summary = _Summary(module, f".legato-{token}.v2")
        callback._summary_module = summary
        # Those of this run, before this process adds its own.
        summary.found = {
            _name(callback, path): path
            for path in _event_files(callback.log_dir, summary.ending)
        }
        if resuming:
            _wait_for_later_names(list(summary.found))
        else:
            _remove(summary)
            self._write_graph(callback)
        return None

    def _write_graph(self, callback: Any) -> None:
        if callback.write_graph:  # as `set_model` does
            callback._write_keras_model_summary()
            callback._should_write_train_graph = True

    def get(self, callback: Any) -> dict[str, Any]:
        state = super().get(callback)
        summary = callback._summary_module
        if not isinstance(summary, _Summary):
            return state
        for writer in callback._writers.values():
            writer.flush()
        state["log_dir"] = os.path.abspath(callback.log_dir)
        state["files"] = files = {}
        for path in _event_files(callback.log_dir, summary.ending):
            files[_name(callback, path)] = summary.sync(path)
        return state

    def set(self, callback: Any, state: dict[str, Any]) -> str | None:
        files, log_dir = state.get("files", {}), state.get("log_dir", "")
        if not (
            isinstance(files, dict)
            and isinstance(log_dir, str)
            and all(type(size) is int and size >= 0 for size in files.values())
        ):
            raise RestoreError("its state is none of a TensorBoard.")
        super().set(callback, state)
        summary = callback._summary_module
        if not isinstance(summary, _Summary):
            return None
        # Only files that were found here are touched, whatever is named.
        short = [name for name in files if name not in summary.found]
        for name, path in summary.found.items():
            size, there = files.get(name), os.path.getsize(path)
            if size is None:
                path.unlink()
            elif there > size:
                os.truncate(path, size)
            elif there < size:
                short.append(name)
        if not short:
            return None
        now = os.path.abspath(callback.log_dir)
        if log_dir != now:
            return (
                f"log_dir is {now!r} and was {log_dir!r}; what was written "
                "there stays there, and the curves go on here."
            )
        return f"event files in {now!r} are missing or were cut: {short}"

    def absent(self, callback: Any, note: JSON) -> None:
        summary = callback._summary_module
        if isinstance(summary, _Summary):
            _remove(summary)
        self._write_graph(callback)

    def resumed(self, callback: Any) -> None:
        # Set by `on_epoch_begin`, and used at the epoch's end.
        callback._epoch_start_time = time.time()

    def close(self, callback: Any) -> None:
        # Left on, a writer would be the default one of the user's program.
        while callback._prev_summary_state:
            callback._pop_writer()
        for writer in callback._writers.values():
            writer.close()
        callback._writers = {}


class _Summary:
    """`tf.summary`, but that its files are known by how their names end.

    Attributes:
        found: the files of the run when this process began, by name.
    """

    def __init__(self, module: Any, ending: str) -> None:
        self.module = module
        self.ending = ending
        self.found: dict[str, Path] = {}
        self._synced: dict[Path, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def create_file_writer(
        self, logdir: Any, *args: Any, filename_suffix: str = "", **kwargs: Any
    ) -> Any:
        suffix = filename_suffix + self.ending
        return self.module.create_file_writer(
            logdir, *args, filename_suffix=suffix, **kwargs
        )

    def sync(self, path: Path) -> int:
        """Has a file on disk before a checkpoint counts it; its size."""
        size = path.stat().st_size
        if self._synced.get(path) != size:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            self._synced[path] = size
        return size


def _event_files(log_dir: str, ending: str) -> Iterator[Path]:
    """The files with that ending, in a log_dir and the folders in it."""
    for pattern in ("*", "*/*"):
        for path in sorted(Path(log_dir).glob(f"{pattern}{ending}")):
            if "tfevents" in path.name and not path.is_symlink():
                yield path


def _name(callback: Any, path: Path) -> str:
    return path.relative_to(callback.log_dir).as_posix()


def _remove(summary: _Summary) -> None:
    for path in summary.found.values():
        path.unlink()
    summary.found = {}


def _wait_for_later_names(names: list[str]) -> None:
    """Lets the second pass in which the newest file was begun.

    Two of one second would be read in the order of their processes' ids.
    """
    seconds = [
        int(found[1])
        for name in names
        if (found := re.search(r"tfevents\.(\d{1,12})\.", name))
    ]
    wait = max(seconds, default=0) + 1 - time.time()
    if 0 < wait <= _MAX_WAIT_SECS:  # not: a clock that was set back
        time.sleep(wait)
