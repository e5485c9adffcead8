"""What a run writes for people to read: JSON lines and TensorBoard scalars.

`metrics.jsonl` and the TensorBoard series are part of the run's exact state
and are rewound when it is resumed; wall-clock figures are not, and live apart
in `timing.jsonl`.
"""

import contextlib
import datetime
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from legato import storage
from legato.errors import DamagedError, RestoreError, RunDirError
from legato.types import JSON

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
SUMMARIES = "summaries"

# One file for the whole run, whatever number of processes write it: files
# named by the second, as usual, can meet, and sort wrongly when a clock is
# set back.
_EVENTS = "events.out.tfevents.legato"


class ScalarEvents:
    """A TensorBoard event file of scalars, for one split.

    tensorboardX's own writer hands events to a thread, and its `flush` does
    not wait for that: what a checkpoint counts as written could be lost. Its
    parts are used, and the bytes are written here.

    Args:
        directory: made with the file, if there is none.
    """

    def __init__(self, directory: Path) -> None:
        self.file = storage.RecordFile(directory / _EVENTS)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add scalars of a step, in memory."""
        # Imported late: where torch is installed, tensorboardX imports it.
        from tensorboardX.proto.event_pb2 import (
            Event,  # type: ignore[reportAttributeAccessIssue]
        )
        from tensorboardX.proto.summary_pb2 import (
            Summary,  # type: ignore[reportAttributeAccessIssue]
        )
        from tensorboardX.summary import scalar

        now = time.time()
        if self.file.offset == 0:
            self._append(Event(wall_time=now, file_version="brain.Event:2"))
        # One event for all of them: each is framed and hashed by itself.
        summary = Summary()
        for name, value in values.items():
            summary.MergeFrom(scalar(name, value))
        self._append(Event(wall_time=now, step=step, summary=summary))

    def _append(self, event: Any) -> None:
        """In the framing of TFRecord files: length, its CRC, data, its CRC."""
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self.file.append_bytes(
            length
            + struct.pack("<I", masked_crc32c(length))
            + data
            + struct.pack("<I", masked_crc32c(data))
        )


class RunLog:
    """The logs of one run directory.

    Args:
        run_dir: an existing directory, locked by this process.

    Raises:
        OSError: the files cannot be opened.
    """

    def __init__(self, run_dir: Path) -> None:
        self._metrics = storage.JsonLines(run_dir / METRICS)
        self._timing = storage.JsonLines(run_dir / TIMING)
        self._summaries = run_dir / SUMMARIES
        self._events: dict[str, ScalarEvents] = {}
        self._is_named = False  # durably: the directory of the summaries

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write a record of a kind ("train", "validation", "epoch").

        Scalars of training and validation go to TensorBoard too.
        """
        self._metrics.append({"kind": kind, "step": step, **values})
        if kind == "epoch":
            return  # the same values, a second time
        if kind not in self._events:
            self._events[kind] = ScalarEvents(self._summaries / kind)
        scalars = {k: v for k, v in values.items() if isinstance(v, float)}
        self._events[kind].write(step, scalars)

    def write_timing(self, step: int, values: dict[str, Any]) -> None:
        """Write wall-clock figures, which are no part of the exact run."""
        now = datetime.datetime.now(datetime.UTC).isoformat()
        self._timing.append({"step": step, "time": now, **values})

    def flush(self) -> None:
        """Hand everything to the system: it survives this process."""
        for file in self._files().values():
            file.flush()
        self._timing.flush()

    def sync(self) -> None:
        """Write and make durable: it survives a power cut too.

        May be called from another thread than the one that writes.

        Raises:
            OSError: it failed; nothing is lost, and it can be repeated.
        """
        files = self._files()
        for file in files.values():
            file.sync()
        if len(files) > 1 and not self._is_named:
            # The directories were made with the files in them.
            for directory in (self._summaries, self._summaries.parent):
                storage.sync_directory(directory)
            self._is_named = True
        with contextlib.suppress(OSError):  # no part of the run
            self._timing.flush()

    def _files(self) -> dict[str, storage.RecordFile]:
        """The files that are part of the exact run, by name."""
        events = {
            f"{SUMMARIES}/{name}": each.file
            for name, each in sorted(self._events.items())
        }
        return {METRICS: self._metrics, **events}

    def get_state(self) -> JSON:
        """Where the logs end, for a checkpoint."""
        # A file that is there but empty is one of a killed process's future.
        return {
            name: file.offset
            for name, file in self._files().items()
            if file.offset
        }

    def rewind(self, state: JSON, *, lenient: bool = False) -> None:
        """Take back everything after a checkpoint (None: everything).

        Args:
            state: what `get_state` returned.
            lenient: go on with logs that are shorter than the state says.

        Raises:
            RestoreError: the logs are shorter than the state says.
            RunDirError: a directory of them is a symbolic link.
        """
        offsets = {} if state is None else state
        if not isinstance(offsets, dict) or not all(
            isinstance(offset, int) for offset in offsets.values()
        ):
            raise RestoreError(f"The saved log positions are {state!r:.80}.")
        if self._summaries.is_symlink():
            raise _link(self._summaries)
        if self._summaries.exists():
            # Those of a killed process may be of a split not yet written.
            for directory in self._summaries.iterdir():
                if directory.is_symlink():
                    raise _link(directory)
                if directory.is_dir():
                    self._events[directory.name] = ScalarEvents(directory)
        for name in offsets:
            folder, _, split = name.partition("/")
            if folder == SUMMARIES and split in ("train", "validation"):
                path = self._summaries / split
                self._events.setdefault(split, ScalarEvents(path))
        for name, file in self._files().items():
            try:
                file.truncate_to(offsets.get(name, 0))
            except DamagedError as error:
                if not lenient:
                    raise RestoreError(
                        f"The logs do not reach to the checkpoint: {error}. "
                        'Put them back, or set resume="override" to go on '
                        "without the missing lines."
                    ) from error

    def close(self) -> None:
        """Flush and close; idempotent."""
        with contextlib.ExitStack() as stack:
            for file in (*self._files().values(), self._timing):
                stack.callback(file.close)


def _link(path: Path) -> RunDirError:
    # What it leads to could be another run's, and would be cut.
    return RunDirError(
        f"{path} is a symbolic link: make the run directory itself one instead."
    )
