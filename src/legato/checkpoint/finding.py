"""Finding a checkpoint to read, beside the process that trains.

Nothing here takes the lock of a run directory, or changes anything in it:
damaged checkpoints are skipped, not set aside. The training process removes
old checkpoints meanwhile (see `keep_last`): one that is gone when it is read
is as one that was never listed.
"""

import operator
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from legato import storage
from legato.checkpoint.format import (
    Checkpoint,
    list_steps,
    load_checkpoint,
    parse_step,
    place_identity,
    read_about,
    step_name,
)
from legato.checkpoint.store import BEST, CHECKPOINTS, FINAL
from legato.errors import (
    CheckpointError,
    ConfigError,
    DamagedError,
    LegatoWarning,
    RunDirError,
)
from legato.run_directory import RUN, find_run_id
from legato.storage.commit import MANIFEST

_LOOKS = 20  # at the list of checkpoints, if each of them goes meanwhile
_SHOWN_STEPS = 20
_SLICE_SECS = 0.1  # a request to stop is noticed this often


def find_checkpoint(
    path: str | os.PathLike[str], which: str | int | None = None
) -> Checkpoint:
    """Reads a checkpoint, beside whoever trains; changes nothing on disk.

    Args:
        path: a run directory; or a checkpoint's own, such as
            `runs/x/checkpoints/step_00000100`, `runs/x/best` or
            `runs/x/final`.
        which: of a run: "best", a step, or "latest" (also None): what the run
            ended with, if that belongs to its newest step, and else the
            newest intact checkpoint, with a warning if newer ones are not.

    Raises:
        ConfigError: if `which` is something else, or is given with a
            checkpoint's own directory.
        RunDirError: if the path is neither a run's nor a checkpoint's.
        CheckpointError: if there is no such checkpoint, it is damaged, or it
            cannot be read.
    """
    asked = check_which(which)
    path = Path(path)
    if path.name in ("", ".."):  # "." has no name to go by
        path = Path(os.path.abspath(path))
    if _is_run(path) or os.path.isdir(path / CHECKPOINTS):
        return RunReader(path).find(asked)
    run = enclosing_run(path)
    if not _is_there(path) and run is not None:
        # So that what is missing is told as for the run.
        step = parse_step(path.name)
        reader = RunReader(run)
        return reader.find(path.name if step is None else step)
    if not os.path.lexists(path):
        raise RunDirError(
            f"{path}: there is no such directory, or it may not be read. Give "
            "that of a run, or of one of its checkpoints."
        )
    named_like_one = run is not None or parse_step(path.name) is not None
    if not named_like_one and not os.path.lexists(path / MANIFEST):
        raise RunDirError(
            f"{path}: is neither a run's directory (which holds {RUN}) nor a "
            f"checkpoint's (which holds {MANIFEST}). Give one of these."
        )
    if which is not None:
        raise ConfigError(
            f"which={which!r}: {path} is a checkpoint's own directory. Give "
            "nothing with it, or give the run's directory."
        )
    return _load_own(path, run)


def check_which(which: Any, name: str = "which") -> str | int:
    """What is asked for: "latest", "best", or a step.

    Args:
        which: see `find_checkpoint`.
        name: of the argument, for the message.

    Raises:
        ConfigError: if it is none of these.
    """
    if which is None:
        return "latest"
    if isinstance(which, str) and which in ("latest", "best"):
        return which
    if not isinstance(which, bool | str):
        try:
            step = operator.index(which)
        except TypeError:
            step = -1
        if step >= 0:
            return step
    raise ConfigError(
        f'{name}={which!r}: it must be "latest", "best" or the step of a '
        "checkpoint, such as 100."
    )


class RunReader:
    """The checkpoints of one run, read beside its writer.

    Args:
        run_dir: the directory of a run.

    Attributes:
        run_dir: as given.
        run_id: what the checkpoints must carry.

    Raises:
        RunDirError: if it is not a run's.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.run_id = find_run_id(run_dir)
        # What it leads to could be another run's.
        if (run_dir / CHECKPOINTS).is_symlink():
            raise RunDirError(
                f"{run_dir / CHECKPOINTS} is a symbolic link: make the run "
                "directory itself one instead"
            )

    def steps(self) -> list[int]:
        """The steps of the checkpoints that there are now, ascending.

        Raises:
            RunDirError: if they cannot be listed.
        """
        try:
            return list_steps(self.run_dir / CHECKPOINTS)
        except FileNotFoundError:
            return []
        except OSError as e:
            raise RunDirError(
                f"{self.run_dir}: its checkpoints cannot be listed: "
                f"{e.strerror}. Give the directory of a run that you may read."
            ) from e

    def find(self, which: str | int) -> Checkpoint:
        """The checkpoint that `check_which` returned.

        Raises:
            CheckpointError: if there is none, or it cannot be read.
        """
        if isinstance(which, int):
            return self._at(which)
        if which == "best":
            return self._find_best()
        if which == FINAL:
            found = self.load(self.run_dir / FINAL)
        else:
            found = self.latest()
        if found is None:
            raise CheckpointError(
                f"{self.run_dir}: there is no {which} checkpoint. "
                f"{self._there_are()}"
            )
        return found

    def latest(self) -> Checkpoint | None:
        """What "latest" is (see `find_checkpoint`); None if there is none.

        Raises:
            CheckpointError: if there are some, and none can be read.
        """
        steps: list[int] = []
        damaged: list[DamagedError] = []
        for _ in range(_LOOKS):
            steps, damaged = self.steps(), []
            found = self.final(steps)
            for step in reversed(steps):
                if found is not None:
                    break
                try:
                    found = self.load(self.path(step))
                except DamagedError as e:
                    damaged.append(e)
            if found is not None:
                for error in damaged:
                    _warn(f"{error}. The one of step {found.step} is used.")
                return found
            if self.steps() == steps:
                break
        if not steps:
            return None
        if not damaged:
            raise CheckpointError(
                f"{self.run_dir}: each checkpoint was removed while it was "
                "read: train with a larger keep_last."
            )
        raise CheckpointError(
            f"{self.run_dir}: none of its checkpoints is intact:"
            + "".join(f"\n  {error}" for error in damaged)
        )

    def final(self, steps: list[int]) -> Checkpoint | None:
        """What the run ended with, unless it went on since.

        Args:
            steps: what `steps` returned.

        Raises:
            CheckpointError: if it cannot be read for a passing reason.
        """
        path = self.run_dir / FINAL
        if not _is_there(path):
            return None
        try:
            about = read_about(path, run_id=self.run_id)
            if steps and about.step != steps[-1]:
                return None
            return self.load(path)
        except DamagedError as e:
            _warn(
                f"{e}. It is left out; run the training again to write it anew."
            )
            return None

    def load(self, path: Path) -> Checkpoint | None:
        """Reads a checkpoint of the run; None if it is gone.

        Raises:
            DamagedError: if it is not what was written.
            CheckpointError: if it cannot be read for another reason.
        """
        try:
            return load_checkpoint(path, run_id=self.run_id)
        except CheckpointError:
            # Of whatever kind: on NFS files that are removed turn "stale".
            if _is_there(path):
                raise
            return None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.run_dir / CHECKPOINTS / step_name(step)

    def _at(self, step: int) -> Checkpoint:
        found = problem = None
        if step in self.steps():
            try:
                found = self.load(self.path(step))
            except DamagedError as e:
                problem = e
        if found is None and self._best_step() == step:
            found = self.load(self.run_dir / BEST)
        if found is not None and found.step == step:
            return found
        if problem is not None:
            raise CheckpointError(f"{problem}. {self._there_are()}")
        raise CheckpointError(
            f"{self.run_dir}: there is no checkpoint of step {step}. "
            f"{self._there_are()}"
        )

    def _find_best(self) -> Checkpoint:
        best = self.run_dir / BEST
        try:
            published = -1
            if _is_there(best):
                published = read_about(best, run_id=self.run_id).step
            return self._unpublished_best(published) or load_checkpoint(
                best, run_id=self.run_id
            )
        except DamagedError as e:
            if _is_there(best):
                raise CheckpointError(f"{e}. {self._there_are()}") from e
        raise CheckpointError(
            f"{self.run_dir}: there is no best checkpoint: one is kept where "
            "the trainer's best_metric is set, once it has been measured. "
            f"{self._there_are()}"
        )

    def _unpublished_best(self, published: int) -> Checkpoint | None:
        """One that was best and that a kill kept from `best/`."""
        for step in reversed(self.steps()):
            if step <= published:
                return None
            try:
                about = read_about(self.path(step), run_id=self.run_id)
                if about.best and (found := self.load(self.path(step))):
                    return found
            except DamagedError:
                continue
        return None

    def _best_step(self) -> int | None:
        best = self.run_dir / BEST
        try:
            found = _is_there(best) and read_about(best, run_id=self.run_id)
            return found.step if found else None
        except CheckpointError:
            return None

    def _there_are(self) -> str:
        """What there is, as the end of a message."""
        steps = self.steps()
        best = self._best_step()
        if not steps and best is None:
            return "It has no checkpoint yet: train it first."
        shown = ", ".join(map(str, steps[-_SHOWN_STEPS:])) or "none"
        if len(steps) > _SHOWN_STEPS:
            shown = f"{len(steps)} of them, the newest {shown}"
        also = "" if best is None else f"; the best is of step {best}"
        return f"There are checkpoints of the steps: {shown}{also}."


def watch_checkpoints(
    run_dir: Path,
    *,
    timeout_secs: float | None = None,
    poll_secs: float = 1.0,
    stop_requested: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Checkpoint]:
    """Reads each checkpoint of a run, those to come too, in their order.

    One that is removed before it could be read is left out, and a damaged one
    too, with a warning. The last is `final/`, when the run has ended.

    Args:
        run_dir: the directory, which need not be there yet.
        timeout_secs: end when none came for so long; None waits for ever.
        poll_secs: how often to look.
        stop_requested: whether to end.
        clock: seconds, monotonic.
        sleep: waits.

    Raises:
        RunDirError: if the directory cannot be read, or is no run's.
        CheckpointError: if a checkpoint cannot be read for a passing reason.
    """
    pending = _Pending(run_dir)
    last = clock()
    while not stop_requested():
        found = pending.take()
        if found is not None:
            yield found
            if found.path.name == FINAL:
                return
            last = clock()
            continue
        until = clock() + poll_secs
        if timeout_secs is not None:
            until = min(until, last + timeout_secs)
            if clock() >= last + timeout_secs:
                return
        while clock() < until and not stop_requested():
            sleep(min(_SLICE_SECS, until - clock()))


class _Pending:
    """The checkpoints of a run that have not been taken yet."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._run_id = ""
        self._seen: dict[int, Any] = {}  # step -> None; of damaged ones: which

    def take(self) -> Checkpoint | None:
        """The next one; None if there is none now."""
        if not _is_run(self._run_dir):
            return None
        reader = RunReader(self._run_dir)
        if reader.run_id != self._run_id:
            # It was begun anew, in the same place.
            self._run_id, self._seen = reader.run_id, {}
        steps = reader.steps()
        for step in steps:
            path = reader.path(step)
            identity = place_identity(path)
            if step in self._seen and self._seen[step] in (None, identity):
                continue
            try:
                found = reader.load(path)
            except DamagedError as e:
                # The run may write it once more.
                self._seen[step] = identity
                _warn(f"{e}. It is left out.")
                continue
            if found is not None:
                self._seen[step] = None
                return found
        # Another may have come meanwhile, which then goes first.
        return reader.final(steps) if reader.steps() == steps else None


def _is_there(path: Path) -> bool:
    """Whether a directory is there, or just being replaced."""
    return os.path.lexists(storage.locate(path))


def _is_run(path: Path) -> bool:
    return os.path.lexists(path / RUN)  # never raises


def enclosing_run(path: Path) -> Path | None:
    """The run that a checkpoint's directory is named to be in; None: none."""
    if parse_step(path.name) is not None and path.parent.name == CHECKPOINTS:
        run = path.parent.parent
    elif path.name in (BEST, FINAL):
        run = path.parent
    else:
        return None
    return run if _is_run(run) else None


def _load_own(path: Path, run: Path | None) -> Checkpoint:
    if path.is_symlink():
        raise CheckpointError(
            f"{path}: is a symbolic link: give the directory that it leads to."
        )
    try:
        return load_checkpoint(path)
    except DamagedError as e:
        others = f" {RunReader(run)._there_are()}" if run is not None else ""
        raise CheckpointError(f"{e}.{others}") from e


def _warn(message: str) -> None:
    warnings.warn(message, LegatoWarning, stacklevel=4)
