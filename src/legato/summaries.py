"""What a run writes for people to read: JSON lines and TensorBoard scalars.

`metrics.jsonl` and the TensorBoard series are part of the run's exact state
and are rewound when it is resumed; wall-clock figures are not, and live apart
in `timing.jsonl`.
"""

import datetime
from pathlib import Path
from typing import Any

from legato import storage
from legato.errors import RestoreError
from legato.types import JSON

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
SUMMARIES = "summaries"


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
        self._writers: dict[str, Any] = {}
        self._purge_step = 0

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write a record of a kind ("train", "validation", "epoch").

        Scalars of training and validation go to TensorBoard too.
        """
        self._metrics.append({"kind": kind, "step": step, **values})
        if kind == "epoch":
            return  # the same values, a second time
        writer = self._writer(kind)
        for name, value in values.items():
            if isinstance(value, float):
                writer.add_scalar(name, value, step)

    def write_timing(self, step: int, values: dict[str, Any]) -> None:
        """Write wall-clock figures, which are no part of the exact run."""
        now = datetime.datetime.now(datetime.UTC).isoformat()
        self._timing.append({"step": step, "time": now, **values})

    def flush(self) -> None:
        """Hand everything to the system: it survives this process."""
        self._metrics.flush()
        self._timing.flush()
        for writer in self._writers.values():
            writer.flush()

    def sync(self) -> None:
        """Make `metrics.jsonl` durable: it survives a power cut too."""
        self._metrics.fsync()

    def get_state(self) -> JSON:
        """Where the logs end, for a checkpoint."""
        return {METRICS: self._metrics.offset}

    def rewind(self, state: JSON, step: int) -> None:
        """Take back everything after a checkpoint (None: everything).

        Raises:
            RestoreError: the logs are shorter than the checkpoint says.
        """
        offset = 0
        if state is not None:
            if not isinstance(state, dict) or not isinstance(
                state.get(METRICS), int
            ):
                raise RestoreError(f"The saved log positions {state!r} are bad")
            offset = state[METRICS]
        self._metrics.truncate_to(offset)
        # TensorBoard drops what it read of this step and later ones.
        self._purge_step = step + 1 if step else 0
        if self._summaries.exists():
            for directory in sorted(self._summaries.iterdir()):
                self._writer(directory.name)

    def close(self) -> None:
        """Flush and close; idempotent."""
        self._metrics.close()
        self._timing.close()
        for writer in self._writers.values():
            writer.close()

    def _writer(self, name: str) -> Any:
        if name not in self._writers:
            # Imported late: where torch is installed, this imports it.
            from tensorboardX import SummaryWriter

            path = self._summaries / name
            self._writers[name] = SummaryWriter(
                str(path),
                purge_step=self._purge_step if path.exists() else None,
                # Flushed with every checkpoint, not by a timer.
                flush_secs=10**6,
            )
        return self._writers[name]
