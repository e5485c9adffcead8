"""Starting the processes that train, and killing them."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from legato.checkpoint.format import list_steps
from legato.checkpoint.store import CHECKPOINTS
from legato.errors import VerifyError
from legato.storage.files import TEMPORARY
from legato.verify.board import Board, Phase

_LOOK_SECS = 0.0002
_PATIENCE_SECS = 5.0  # for a phase that does not come again
_MAX_DELAY_SECS = 0.004
_HANGING = 20.0  # times as long as the run that was left alone
_HANGING_SECS = 300.0  # and so much more
_TAIL = 4000  # characters of what a process that failed had to say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What is run in each process.

    Attributes:
        config: what `legato train` calls CONFIG; None for a function.
        overrides: changes to it.
        function: module, name and file of a function of the run directory;
            None for a config.
        backend: the Keras backend; None lets each process choose.
    """

    config: str | None = None
    overrides: tuple[str, ...] = ()
    function: dict[str, str | None] | None = None
    backend: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """A process that was killed.

    Attributes:
        phase: what it was doing.
        step: the last step that it had completed.
        is_writing: whether a checkpoint was being written to disk.
    """

    phase: Phase
    step: int
    is_writing: bool


class Process(Protocol):
    """What is asked of a process; as `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None:
        """Its status; None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its status."""
        ...

    def kill(self) -> None:
        """Ends it."""
        ...


Launch = Callable[[Path, Path], Process]
"""Starts a process that does what a file says, and prints to another."""


def launch(spec: Path, output: Path) -> Process:
    """A new interpreter, as a user's own process would be."""
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "legato.verify.child", str(spec)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            # (Not of this one's group: Ctrl-C is for us to handle.)
            start_new_session=True,
            env=_environment(),
        )


class Runs:
    """Runs one experiment in many processes, each in a directory of `work`.

    Args:
        target: what is run.
        work: where; it exists.
        start: starts a process.
    """

    def __init__(
        self, target: Target, work: Path, start: Launch = launch
    ) -> None:
        self._launch = start
        self._target = target
        self._work = work
        self._number = 0
        self._usual_secs: float | None = None

    def path(self, name: str) -> Path:
        """The directory of a run."""
        return self._work / name

    def evidence(self, name: str) -> list[dict[str, Any]]:
        """What the processes of a run met."""
        records = []
        with contextlib.suppress(FileNotFoundError):
            for line in self._evidence(name).read_text().splitlines():
                # The last one of a process that was killed may be torn.
                with contextlib.suppress(ValueError):
                    records.append(json.loads(line))
        return records

    def _evidence(self, name: str) -> Path:
        return self._work / f"{name}.evidence.jsonl"

    def train(
        self, name: str, *, every: int | None = None, batches: bool = False
    ) -> None:
        """Trains to the end, or goes on to it.

        Args:
            name: of the run.
            every: steps between checkpoints; None for some dozens in the run.
            batches: whether to note what the batches are.

        Raises:
            VerifyError: the process failed.
        """
        began = time.monotonic()
        with self._start(name, every=every, batches=batches) as child:
            child.finish(self._limit())
        if self._usual_secs is None:
            self._usual_secs = time.monotonic() - began

    def train_with_kills(
        self,
        name: str,
        *,
        kills: int,
        last_step: int,
        validates: bool,
        seed: int,
        on_kill: Callable[[Kill], None],
    ) -> list[Kill]:
        """Trains to the end through SIGKILLs at random instants.

        Args:
            name: of the run.
            kills: how many.
            last_step: of the run.
            validates: whether it ever validates.
            seed: of the instants.
            on_kill: is told of each.

        Raises:
            VerifyError: a process failed, or does not end.
        """
        instants = random.Random(seed)
        aims = ["steps", "writing", "anywhere", "starting"]
        if validates:
            aims.insert(2, "validation")
        order = [aims[k % len(aims)] for k in range(kills)]
        instants.shuffle(order)
        done = []
        for k, aim in enumerate(order):
            # One in each stretch of the run: each process gets further.
            begin, end = (last_step * i // kills for i in (k, k + 1))
            at = instants.randint(begin, max(begin, end - 1))
            with self._start(name) as child:
                kill = child.kill_at(at, end, aim, instants, self._limit())
            if kill is not None:
                done.append(kill)
                on_kill(kill)
        self.train(name)
        return done

    def _limit(self) -> float | None:
        if self._usual_secs is None:
            return None
        return _HANGING * self._usual_secs + _HANGING_SECS

    def _start(
        self, name: str, *, every: int | None = None, batches: bool = False
    ) -> "Child":
        self._number += 1
        stem = self._work / f"process-{self._number}"
        target = self._target
        spec = {
            "config": target.config,
            "overrides": list(target.overrides),
            "function": target.function,
            "backend": target.backend,
            "run_dir": str(self.path(name)),
            "evidence": str(self._evidence(name)),
            "board": f"{stem}.board",
            "checkpoint_interval": every,
            "batches": batches,
            # What is kept of it for others would be the same bits for sure.
            "keeps_programs": self._number > 1,
            "path": sys.path,
        }
        stem.with_suffix(".json").write_text(json.dumps(spec))
        return Child(
            stem, self.path(name), lambda: self.evidence(name), self._launch
        )


class Child:
    """A process that trains."""

    def __init__(
        self,
        stem: Path,
        run_dir: Path,
        evidence: Callable[[], list[dict[str, Any]]],
        start: Launch,
    ) -> None:
        self._checkpoints = run_dir / CHECKPOINTS
        self._evidence = evidence
        self._output = stem.with_suffix(".log")
        self.board = Board(stem.with_suffix(".board"))
        self._process = start(stem.with_suffix(".json"), self._output)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self.board.__exit__()

    def finish(self, limit: float | None) -> None:
        """Waits for the end.

        Raises:
            VerifyError: it failed, or did not end.
        """
        try:
            status = self._process.wait(limit)
        except subprocess.TimeoutExpired:
            raise VerifyError(
                f"A process that resumed at step {self.board.read().began_at} "
                f"has not ended after {limit:.0f} seconds, "
                f"{_HANGING:.0f} times as long as the run without a kill "
                f"took. What it printed is in {self._output}."
            ) from None
        if status:
            self._raise_failed(status)

    def _raise_failed(self, status: int) -> None:
        began = self.board.read().began_at
        when = (
            f"The process that resumed at step {began}"
            if began > 0
            else "A process that trained"
        )
        errors = [each for each in self._evidence() if each["kind"] == "error"]
        if errors:
            error = errors[-1]
            raise VerifyError(
                f"{when} failed: {error['type']}: {error['message']}"
            )
        output = self._output.read_text("utf-8", "replace")[-_TAIL:].strip()
        raise VerifyError(
            f"{when} ended with status {status}. It printed:\n{output}"
        )

    def kill_at(
        self,
        step: int,
        end: int,
        aim: str,
        instants: random.Random,
        limit: float | None,
    ) -> Kill | None:
        """Kills it at a step or soon after, while it does what is aimed at.

        Returns:
            Where it was; None if it came to its end before.

        Raises:
            VerifyError: it failed.
        """
        until = None if limit is None else time.monotonic() + limit
        if aim == "starting":
            self._wait_until_begun(instants)
        else:
            self._wait_for(lambda: self.board.read().step >= step, until)
            patience = time.monotonic() + _PATIENCE_SECS
            before = self._unfinished()

            def met() -> bool:
                reading = self.board.read()
                if reading.step >= end or time.monotonic() > patience:
                    return True
                match aim:
                    case "steps":
                        return reading.phase is Phase.STEPS
                    case "validation":
                        return reading.phase is Phase.VALIDATION
                    case "writing":
                        return bool(self._unfinished() - before)
                    case _:
                        return True

            self._wait_for(met, until, quick=aim == "writing")
            if aim != "writing":
                time.sleep(instants.uniform(0, _MAX_DELAY_SECS))
        reading = self.board.read()
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        if status == 0:
            return None
        if status != -signal.SIGKILL:
            self._raise_failed(status)
        return Kill(
            phase=reading.phase,
            step=reading.step,
            is_writing=bool(self._unfinished()),
        )

    def _wait_until_begun(self, instants: random.Random) -> None:
        """A random moment before the first step."""
        time.sleep(instants.uniform(0, 1))
        share = instants.random()
        while self._process.poll() is None and share > 0:
            if self.board.read().began_at >= 0:
                return
            share -= 0.02
            time.sleep(0.05)

    def _wait_for(
        self,
        condition: Callable[[], bool],
        until: float | None,
        *,
        quick: bool = False,
    ) -> None:
        while self._process.poll() is None and not condition():
            if until is not None and time.monotonic() > until:
                raise VerifyError(
                    f"A process that trained does not get on: it is at step "
                    f"{self.board.read().step}. What it printed is in "
                    f"{self._output}."
                )
            if not quick:
                time.sleep(_LOOK_SECS)

    def _unfinished(self) -> set[str]:
        """Checkpoints that are being written, or were when one was killed."""
        with contextlib.suppress(OSError):
            return {
                name
                for name in os.listdir(self._checkpoints)
                if name.startswith(TEMPORARY)
            }
        return set()


def _environment() -> dict[str, str]:
    """Each process hashes strings in its own way, as a user's would."""
    environment = dict(os.environ)
    environment.pop("PYTHONHASHSEED", None)
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    return environment


def last_step(run_dir: Path) -> int:
    """The last step of which a run has a checkpoint; 0 if it has none."""
    with contextlib.suppress(OSError):
        return max(list_steps(run_dir / CHECKPOINTS), default=0)
    return 0
