"""All checkpoints of one run: saving, retention, the best, restoring."""

import operator
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from legato import storage
from legato.checkpoint.format import (
    DATA,
    HOST,
    STATE,
    About,
    Checkpoint,
    list_steps,
    load_checkpoint,
    read_about,
    step_name,
)
from legato.checkpoint.journal import Journal
from legato.checkpoint.writer import Job, Writer
from legato.errors import (
    CheckpointError,
    ConfigError,
    DamagedError,
    LegatoWarning,
    RunDirError,
)
from legato.storage import strict_json
from legato.types import JSON

CHECKPOINTS = "checkpoints"
BEST = "best"
FINAL = "final"
JOURNAL = "commits.jsonl"


class CheckpointStore:
    """Saves, keeps and restores the checkpoints of a run.

    Make one only while holding the lock of the run directory: it finishes what
    a dead writer left. To read only, use `load_checkpoint`.

    For each save, in this order: the checkpoint is committed, the journal says
    so, `best/` is published if it is the best, old checkpoints are removed. A
    kill between any two is repaired by `restore`.

    Args:
        run_dir: an existing directory.
        run_id: names the run; checkpoints of another are not restored.
        keep_last: how many of the newest to keep; None keeps all.
        keep_every: those whose step is a multiple of it are kept for ever.
        timeout_secs: when nothing could be written for so long, it is an error.
        fs: how to write.
        clock: seconds, monotonic.

    Raises:
        ConfigError: if `keep_last` or `keep_every` is below 1.
        RunDirError: if the directory cannot be used.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        run_id: str,
        keep_last: int | None = 3,
        keep_every: int | None = None,
        timeout_secs: float = 600.0,
        fs: storage.FileSystem = storage.OS,
        clock: Callable[[], float] = time.monotonic,
    ):
        for name, value in (
            ("keep_last", keep_last),
            ("keep_every", keep_every),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: it must be 1 or more")
        self._run_id = run_id
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._fs = fs
        self._directory = run_dir / CHECKPOINTS
        self._best = run_dir / BEST
        self._final = run_dir / FINAL
        self._note: str | None = None  # from the thread, for `poll`
        self._journal = Journal(run_dir / JOURNAL, fs=fs)
        self._writer = Writer(
            self._write, timeout_secs=timeout_secs, clock=clock
        )
        try:
            # What it points to could be another run's, and old checkpoints
            # are removed.
            if self._directory.is_symlink():
                raise RunDirError(
                    f"{self._directory} is a symbolic link: make the run "
                    "directory itself one instead"
                )
            if not self._directory.exists():
                fs.mkdir(self._directory)
                storage.sync_directory(run_dir, fs)
            storage.clean_leftovers(self._directory, fs=fs)
            storage.clean_leftovers(run_dir, fs=fs)
        except OSError as e:
            raise RunDirError(
                f"{run_dir}: checkpoints cannot be written here: {e}"
            ) from e

    # Saving.

    def save(
        self,
        step: int,
        arrays: Mapping[str, np.ndarray],
        host: dict[str, JSON],
        data: Mapping[str, bytes] | None = None,
        *,
        best: bool = False,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        """Copies everything and returns; it is written in the background.

        Waits only while the two checkpoints before are still being written.
        When writing fails, the newest ones are kept for the next try.

        Args:
            step: completed training steps.
            arrays: name -> array; may be changed as soon as this returns.
            host: the state that is not arrays.
            data: name -> opaque bytes.
            best: whether to publish it as `best/` too.
            before_commit: called in the thread first: makes durable what the
                checkpoint refers to. Called again if writing is tried again.

        Raises:
            TypeError: if JSON has no exact form for something in `host`.
            ValueError: if `step`, `host` or a name in `data` cannot be stored.
            CheckpointError: if an array cannot be stored, or nothing could be
                written for `timeout_secs`.
        """
        # Everything that can be wrong with the arguments is found here: an
        # error in the thread would be tried again and again.
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step {step} is negative")
        data = {name: bytes(value) for name, value in (data or {}).items()}
        storage.check_names(DATA + name for name in data)
        encoded = strict_json.dumps(host)
        self._writer.submit(
            Job(
                step=step,
                arena=self._writer.fill_arena(arrays),
                host=encoded,
                data=data,
                best=best,
                before_commit=before_commit,
            )
        )

    def load_final(self) -> Checkpoint | None:
        """What `save_final` wrote; None if nothing intact is there."""
        try:
            return load_checkpoint(self._final, run_id=self._run_id)
        except CheckpointError:
            return None

    def save_final(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes what a finished run ended with as `final/`, and waits.

        It is no checkpoint to train on from: hooks at the end of training may
        have put other weights in than training would go on with.

        Raises:
            CheckpointError: if it could not be written.
        """
        self.wait()
        arena = self._writer.fill_arena(arrays)  # all of them are free
        about = About.encode(
            step=step, run_id=self._run_id, best=False, layout=arena.layout
        )
        files = {STATE: arena.buffer, HOST: strict_json.dumps({})}
        try:
            storage.commit_directory(self._final, files, about, fs=self._fs)
        except OSError as e:
            raise CheckpointError(
                f"{self._final} could not be written: {e}. The checkpoints "
                "are not affected: run it again."
            ) from e

    def poll(self) -> None:
        """To be called at each loop end; costs nothing when all is well.

        Warns of a write error (once until a write succeeds), and starts the
        next try when it is due.

        Raises:
            CheckpointError: if nothing could be written for `timeout_secs`.
        """
        self._writer.poll()
        if self._note is not None:
            note, self._note = self._note, None
            warnings.warn(note, LegatoWarning, stacklevel=2)

    def wait(self) -> None:
        """Returns when everything saved is on disk; tries again after errors.

        Raises:
            CheckpointError: if nothing could be written for `timeout_secs`.
        """
        self._writer.wait()

    def close(self) -> None:
        """The same as `wait`: there is nothing to be closed.

        Raises:
            CheckpointError: if nothing could be written for `timeout_secs`.
        """
        self._writer.wait()

    # Reading.

    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, ascending."""
        return list_steps(self._directory)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self._directory / step_name(step)

    def best_step(self) -> int | None:
        """The step of the checkpoint in `best/`; None if there is none.

        Raises:
            DamagedError: if it cannot be told.
        """
        if not os.path.lexists(self._best):
            return None
        return read_about(self._best, run_id=self._run_id).step

    def restore(self, step: int | None = None) -> Checkpoint | None:
        """Reads the newest intact checkpoint, or that of a step.

        The newest: damaged ones after it are set aside, with a warning, and
        `best/` is published if a kill prevented that. A warning also tells if
        a newer one had been committed and is gone.

        A given step: nothing is changed. To train on from it, call `rewind`.

        Returns:
            The checkpoint; None if there is none at all.

        Raises:
            CheckpointError: if there are some, but none is intact (none is set
                aside then), or the given one is missing or damaged, or one
                cannot be read for a passing reason, such as permissions.
        """
        if step is not None:
            return self._load_given(step)
        steps = self.steps()
        damaged: list[tuple[int, DamagedError]] = []
        restored = None
        for candidate in reversed(steps):
            try:
                restored = self._load(candidate)
                break
            except DamagedError as e:
                damaged.append((candidate, e))
        if damaged and restored is None:
            reasons = "".join(f"\n  {error}" for _, error in damaged)
            raise CheckpointError(
                f"{self._directory}: none of the checkpoints is intact:"
                f"{reasons}\nMove them away to begin again from step 0."
            )
        for candidate, error in damaged:
            aside = self._set_aside(self.path(candidate), "damaged")
            warnings.warn(
                f"the checkpoint of step {candidate} is damaged and was set "
                f"aside as {aside.name}: {error}. The one before it is used.",
                LegatoWarning,
                stacklevel=2,
            )
        self._check_journal(steps)
        if restored is not None:
            self._repair_best()
        return restored

    def find(self, step: int) -> Checkpoint | None:
        """Reads the checkpoint of a step; None if it is damaged.

        Raises:
            CheckpointError: if it cannot be read for a passing reason.
        """
        try:
            return self._load(step)
        except DamagedError:
            return None

    def rewind(self, step: int, *, keep_best: bool = False) -> None:
        """Makes the checkpoint of a step the newest.

        Later checkpoints, and a `best/` of a later step, are set aside
        (`aside-...`), so that the run does not mix two histories; `best/` is
        published again from the newest that was best, if it is still there.

        Args:
            step: the checkpoint's.
            keep_best: leave `best/` as it is.

        Raises:
            CheckpointError: if there is no checkpoint of that step.
            OSError: if something could not be renamed.
        """
        self.wait()
        steps = self.steps()
        if step not in steps:
            raise CheckpointError(self._missing(step))
        # First: a kill in between must not leave claims to what is aside.
        self._journal.record_rewind(step)
        for later in reversed(steps[steps.index(step) + 1 :]):
            self._set_aside(self.path(later), "aside")
        if keep_best:
            return
        published = self._published()
        if published is not None and published > step:
            self._set_aside(self._best, "aside")
        self._repair_best()

    # The parts.

    def _write(self, job: Job) -> None:
        """One job from beginning to end; in the thread; may be repeated."""
        if job.before_commit is not None:
            job.before_commit()
        if job.sha256 is None:
            layout = job.arena.layout
            job.sha256 = storage.commit_directory(
                self.path(job.step),
                {
                    STATE: job.arena.buffer,
                    HOST: job.host,
                    **{DATA + name: data for name, data in job.data.items()},
                },
                About.encode(
                    step=job.step,
                    run_id=self._run_id,
                    best=job.best,
                    layout=layout,
                ),
                fs=self._fs,
            )
        # After the commit: the journal must not claim what is not there.
        self._journal.record_commit(job.step, job.sha256)
        if job.best:
            # Before old ones are removed, of which this may soon be one.
            try:
                storage.copy_directory(
                    self.path(job.step), self._best, fs=self._fs
                )
            except DamagedError:
                job.sha256 = None  # write it anew
                raise
        try:
            self._remove_old(job.step)
        except OSError as e:
            # The next one tries again; this one is safe on disk.
            self._note = f"an old checkpoint could not be removed: {e}"

    def _remove_old(self, newest: int) -> None:
        if self._keep_last is None:
            return
        # Later ones are another history (see `rewind`), and are let alone.
        steps = [step for step in self.steps() if step <= newest]
        for step in steps[: -self._keep_last]:
            if self._keep_every is None or step % self._keep_every:
                storage.remove_directory(self.path(step), fs=self._fs)

    def _load(self, step: int) -> Checkpoint:
        return load_checkpoint(self.path(step), run_id=self._run_id)

    def _load_given(self, step: int) -> Checkpoint:
        if step not in self.steps():
            raise CheckpointError(self._missing(step))
        try:
            return self._load(step)
        except DamagedError as e:
            raise CheckpointError(f"{e}. {self._missing(step)}") from e

    def _missing(self, step: int) -> str:
        others = ", ".join(str(s) for s in self.steps() if s != step)
        return (
            f"{self._directory}: no intact checkpoint of step {step}; there "
            f"are checkpoints of the steps: {others or 'none'}"
        )

    def _set_aside(self, path: Path, why: str) -> Path:
        number = 1
        while True:
            aside = path.with_name(f"{why}-{path.name}-{number}")
            if not os.path.lexists(aside):
                break
            number += 1
        self._fs.rename(path, aside)
        storage.sync_directory(path.parent, self._fs)
        return aside

    def _check_journal(self, steps: list[int]) -> None:
        """Warns if a newer checkpoint was committed than there is now."""
        try:
            claimed = self._journal.newest()
        except DamagedError as e:
            aside = self._set_aside(self._journal.path, "damaged")
            warnings.warn(
                f"the journal of commits was set aside as {aside.name}: {e}. "
                "It cannot be told whether checkpoints were removed.",
                LegatoWarning,
                stacklevel=3,
            )
            return
        if claimed is not None and claimed > max(steps, default=-1):
            used = f"step {max(steps)}" if steps else "the beginning"
            warnings.warn(
                f"{self._directory}: a checkpoint of step {claimed} was "
                f"committed and is gone; training goes on from {used}",
                LegatoWarning,
                stacklevel=3,
            )
        now = max(self.steps(), default=-1)
        if claimed is not None and claimed > now:
            # The run repeats these steps: until it has, they are not claimed.
            self._journal.record_rewind(now)

    def _published(self) -> int | None:
        """As `best_step`; a damaged `best/` is set aside with a warning."""
        try:
            return self.best_step()
        except DamagedError as e:
            aside = self._set_aside(self._best, "damaged")
            warnings.warn(
                f"the best checkpoint is damaged and was set aside as "
                f"{aside.name}: {e}",
                LegatoWarning,
                stacklevel=3,
            )
            return None

    def _is_overtaken(self, step: int) -> bool:
        """Whether the run went back behind a step since it was saved."""
        try:
            return self._journal.is_overtaken(step)
        except DamagedError:
            return False  # which is warned of elsewhere

    def _repair_best(self) -> None:
        """Publishes the newest that was best, unless a newer one is."""
        published = self._published()
        if published is not None and self._is_overtaken(published):
            published = None  # any that was best since is newer
        for step in reversed(self.steps()):
            if published is not None and step <= published:
                return
            try:
                if not read_about(self.path(step), run_id=self._run_id).best:
                    continue
                self._load(step)  # only what is intact is published
            except DamagedError:
                continue
            storage.copy_directory(self.path(step), self._best, fs=self._fs)
            return
