"""A session that tells what it is doing, and saves more often."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from legato.errors import ConfigError
from legato.session import Session
from legato.verify.board import Board, Phase
from legato.verify.watching import read_globals

MAX_CHECKPOINTS = 40
"""About so many are kept, and compared."""

MAX_KEPT_BYTES = 4 << 30
"""About so much room they may take."""


class ObservedSession(Session):
    """See the module.

    Args:
        spec: what the verifier asked for.
        evidence: takes what is met.
        board: takes what is being done.
        *arguments: of a `Session`.
        **more: likewise.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        evidence: Callable[[dict[str, Any]], None],
        board: Board,
        *arguments: Any,
        **more: Any,
    ) -> None:
        parts, config, run_dir, *others = arguments
        if run_dir.resolve() != Path(spec["run_dir"]).resolve():
            raise ConfigError(
                f"The function was given run_dir={spec['run_dir']!r} and "
                f"trains in {str(run_dir)!r}: it must train where it is told."
            )
        self._spec = spec
        self._evidence = evidence
        self._board = board
        self._own_interval = config.checkpoint_interval
        config = config.replace(keep_last=None, progress="none")
        super().__init__(parts, config, run_dir, *others, **more)
        self._watched = [parts.task, *self._callbacks.callbacks]
        self._globals = read_globals(self._watched)

    def begin(self) -> None:
        """See `Session`."""
        super().begin()
        step = self.clock.step
        self._evidence({"kind": "began", "step": step})
        # More checkpoints than the user's: they change no bits.
        self._schedule = dataclasses.replace(
            self._schedule, checkpoint_interval=self._choose_interval()
        )
        self._board.write(Phase.BETWEEN, step, step)

    def _choose_interval(self) -> int:
        every = self._spec["checkpoint_interval"]
        if every is not None:
            return every
        size = sum(array.nbytes for array in self._read_arrays().values())
        number = min(MAX_CHECKPOINTS, max(4, MAX_KEPT_BYTES // max(size, 1)))
        every = max(1, -(-self._schedule.train_steps // number))
        own = self._own_interval
        return min(every, own) if isinstance(own, int) else every

    def for_loop(self) -> dict[str, Any]:
        """See `Session`."""
        arguments = super().for_loop()
        began = self.clock.step

        def during(phase: Phase, function: Callable[..., Any]) -> Any:
            def observed(*args: Any) -> Any:
                self._board.write(phase, self.clock.step, began)
                try:
                    return function(*args)
                finally:
                    self._board.write(Phase.BETWEEN, self.clock.step, began)

            return observed

        arguments["validate"] = during(Phase.VALIDATION, arguments["validate"])
        arguments["save"] = during(Phase.SAVING, arguments["save"])
        arguments["steps"] = _ObservedSteps(
            arguments["steps"], during, self._note_batches
        )
        return arguments

    def _note_batches(self, step: int, chunk: Any) -> None:
        if not self._spec["batches"]:
            return
        arrays = [
            np.asarray(keras.ops.convert_to_numpy(each))
            for each in keras.tree.flatten(chunk.operands)
        ]
        for k in range(chunk.num_batches):
            digest = hashlib.sha256()
            for array in arrays:
                digest.update(np.ascontiguousarray(array[k]).tobytes())
            self._evidence(
                {
                    "kind": "batch",
                    "step": step + k + 1,
                    "sha256": digest.hexdigest()[:16],
                }
            )

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """See `Session`."""
        try:
            with super().training():
                yield
                step = self.clock.step
                self._board.write(Phase.ENDING, step, step)
        finally:
            self._note_globals()

    def _note_globals(self) -> None:
        for name, now in read_globals(self._watched).items():
            before = self._globals.get(name)
            if before is not None and before["value"] != now["value"]:
                self._evidence(
                    {
                        "kind": "global",
                        "name": name,
                        **now,
                        "before": before["value"],
                    }
                )


class _ObservedSteps:
    """Compiled steps that tell when they run."""

    def __init__(self, steps: Any, during: Any, note_batches: Any) -> None:
        self.capacity = steps.capacity
        self.begin = steps.begin
        self.rows = during(Phase.STEPS, steps.rows)
        self._run = during(Phase.STEPS, steps.run)
        self._steps = steps
        self._note_batches = note_batches

    @property
    def keeps(self) -> bool:
        """See `TrainSteps.keeps`."""
        return self._steps.keeps

    @property
    def overlap(self) -> bool:
        """See `TrainSteps.overlap`."""
        return self._steps.overlap

    def run(self, step: int, chunk: Any) -> Any:
        self._note_batches(step, chunk)
        return self._run(step, chunk)
