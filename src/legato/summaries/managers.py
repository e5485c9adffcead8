"""Summary managers: nested results, each group in a directory of its own."""

import abc
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from legato import storage
from legato.errors import (
    ConfigError,
    DamagedError,
    RestoreError,
    SummaryError,
)
from legato.summaries.events import EVENTS, EventFile
from legato.summaries.values import RULES
from legato.summaries.worker import Worker
from legato.summaries.writers import (
    SummaryWriter,
    as_step_number,
    by_type,
    current_step,
)
from legato.types import JSON, Table

MAX_WAITING = 32
"""How many values wait to be converted, before training waits for them."""

_MAX_NAME_BYTES = 200

SummaryFn = Callable[[str, Any, int], None]


class SummaryManagerInterface(abc.ABC):
    """What writes the summaries of training, or those of validation.

    A manager that also has `get_state()` and `set_state(state)` takes part in
    checkpoints: the state is plain JSON, and `set_state` takes back all that
    was written since (None: everything). Without them a run that is killed
    may write something a second time, and says so.
    """

    @abc.abstractmethod
    def summary_writer(self, relative_path: str = "") -> Any:
        """The writer of a directory.

        Args:
            relative_path: of the directory, in that of the manager.
        """

    @abc.abstractmethod
    def write_summaries(self, summary_dict: Mapping[str, Any]) -> None:
        """Write values by name.

        Args:
            summary_dict: the values. A dict among them is a group, whose
                values go to a directory of its own.
        """

    @abc.abstractmethod
    def flush(self) -> None:
        """Have all summaries outlive this process, however it ends.

        Called at every checkpoint.
        """


class SummaryManager(SummaryManagerInterface):
    """Writes summaries for TensorBoard, groups in sub-directories.

    `{"loss": 0.5, "train": {"iou": 0.7}, "test": {"iou": 0.6}}` becomes one
    curve `loss`, and two of different colours, `iou`.

    Given to a Trainer, it takes part in the run's checkpoints: its files are
    cut back when the run is resumed. They are the run's own, known by their
    names, whatever else is in the directory.

    Arrays are copied when they are given, and Matplotlib figures are the
    manager's from then on. What takes time is done in a background thread, in
    order; `flush` waits for it.

    Args:
        summary_dir: the directory; made when something is written.
        summary_fn: called with a name, a value and a step, to write it to the
            current writer: `legato.summaries.scalar`, or one that calls
            several functions of that module. The default goes by the types
            and shapes of values.
        global_step: a whole number, a function that returns one, or a
            keras.Variable; None is the step of the run that writes.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        summary_dir: str | os.PathLike[str],
        summary_fn: SummaryFn = by_type,
        global_step: Any = None,
    ) -> None:
        self._root = _check_directory(summary_dir)
        if not callable(summary_fn):
            raise ConfigError(
                f"summary_fn={summary_fn!r:.80}: it must be a function of a "
                "name, a value and a step, such as legato.summaries.scalar."
            )
        if global_step is not None and not callable(global_step):
            try:
                as_step_number(global_step, "global_step")
            except SummaryError as error:
                raise ConfigError(str(error)) from None
        self._summary_fn = summary_fn
        self._global_step = global_step
        self._ending = ""
        self._files: dict[str, EventFile] = {}
        self._writers: dict[str, SummaryWriter] = {}
        self._unnamed: set[str] = set()  # groups: not durably
        self._worker = Worker(MAX_WAITING)

    @property
    def summary_dir(self) -> Path:
        """The directory."""
        return self._root

    @property
    def is_plain(self) -> bool:
        """Whether no code of a user's takes part: no subclass's either."""
        return (
            type(self) is SummaryManager
            and self._summary_fn is by_type
            and self._global_step is None
        )

    def claim(self, ending: str) -> None:
        """From now on write files whose names end so, as a run's own.

        Args:
            ending: tells the files of one run, and of one use in it, from all
                others.
        """
        if ending != self._ending:
            self.close()
            self._write_files(ending)

    def release(self) -> None:
        """From now on write files of no run.

        To be called when it is closed: what could not be written is let go,
        for no checkpoint counts it.
        """
        self._write_files("")

    def _write_files(self, ending: str) -> None:
        self._ending = ending
        self._files, self._writers = {}, {}

    def summary_writer(self, relative_path: str = "") -> SummaryWriter:
        """See `SummaryManagerInterface`.

        Raises:
            SummaryError: it is no path that leads down, or has a part that is
                no name for a directory.
            RunDirError: a symbolic link is on the way.
        """
        writer = self._writers.get(os.fspath(relative_path))
        if writer is None:
            path = _check_path(relative_path)
            writer = SummaryWriter(self._file(path), self._worker)
            self._writers[path] = writer
        return writer

    def write_summaries(self, summary_dict: Mapping[str, Any]) -> None:
        """See `SummaryManagerInterface`.

        Raises:
            SummaryError: it is no dict, a name is none, or a value is
                something that `summary_fn` does not take.
        """
        step = self._global_step
        if step is None:
            step = current_step()
            if step is None:
                raise SummaryError(
                    "global_step=None is the step of the run that writes, and "
                    "none does: give global_step to the SummaryManager."
                )
        else:
            step = as_step_number(step, "global_step")
        self._write_group(summary_dict, "", step)

    def _write_group(self, group: Any, path: str, step: int) -> None:
        if not isinstance(group, Mapping):
            raise SummaryError(
                f"summary_dict={group!r:.80}: it must be a dict of names and "
                f"values. A value is {RULES}."
            )
        numbers: dict[str, float] = {}
        others: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        goes_by_type = self._summary_fn is by_type
        for name, value in group.items():
            if type(name) is not str or not name:
                raise SummaryError(
                    f"summary_dict has the name {name!r:.80}: names must be "
                    "str, and not empty."
                )
            if goes_by_type and type(value) is float:
                numbers[name] = value
            elif isinstance(value, Mapping):
                groups[f"{path}/{name}" if path else name] = value
            else:
                others[name] = value
        if numbers:
            columns = {name: [value] for name, value in numbers.items()}
            self.summary_writer(path).write_table(Table([step], columns))
        if others:
            with self.summary_writer(path).as_default():
                for name, value in others.items():
                    self._summary_fn(name, value, step)
        for below, value in groups.items():
            self._write_group(value, below, step)

    def drain(self) -> list[SummaryError]:
        """Wait until all is converted.

        Returns:
            What is wrong with the values that could not be.
        """
        self._worker.wait()
        errors = self._worker.take_errors()
        for error in errors:
            if not isinstance(error, SummaryError):
                raise error
        return [each for each in errors if isinstance(each, SummaryError)]

    def flush(self) -> None:
        """Wait until all is converted, and hand it to the system.

        Raises:
            SummaryError: a value could not be converted; the others were.
            OSError: it failed; nothing is lost, and it can be repeated.
        """
        errors = self.drain()
        for file in self._files.values():
            file.flush()
        if errors:
            raise errors[0]

    def sync(self) -> None:
        """Have what is converted outlive a power cut; from any thread.

        Raises:
            OSError: see `flush`.
        """
        # Groups that come meanwhile are for the next time.
        unnamed = list(self._unnamed)
        for file in list(self._files.values()):
            file.sync()
        # Directories are made with the files in them.
        made = [path for path in unnamed if (self._root / path).exists()]
        above = {folder for path in made for folder in self._above(path)}
        for folder in sorted(above, reverse=True):
            # (Above its own, there may be some that it must not read.)
            with contextlib.suppress(PermissionError):
                storage.sync_directory(folder)
        self._unnamed.difference_update(made)

    def _above(self, path: str) -> list[Path]:
        """The directories that hold the names of a group's, and of its own."""
        groups = (self._root / path).parents if path else ()
        own = [each for each in groups if each.is_relative_to(self._root)]
        return [*own, self._root.parent, self._root.parent.parent]

    def get_state(self) -> JSON:
        """How far each file counts, for a checkpoint."""
        self._worker.wait()
        # A file that is there but empty is one of a killed process's future.
        return {
            path: offset
            for path, file in sorted(self._files.items())
            if (offset := file.offset)
        }

    def set_state(self, state: JSON) -> None:
        """Take back everything after a checkpoint (None: everything).

        Raises:
            RestoreError: it is no state of a SummaryManager.
            DamagedError: files are shorter than it says; all else was done.
            RunDirError: a symbolic link is in a file's way.
        """
        offsets = {} if state is None else state
        if not isinstance(offsets, dict) or not all(
            type(offset) is int and offset >= 0 for offset in offsets.values()
        ):
            raise RestoreError(f"The saved log positions are {state!r:.80}.")
        self._worker.wait()
        self._worker.take_errors()  # of what is taken back
        for path in {*self._find(), *map(_check_saved, offsets)}:
            self._file(path)
        damaged = None
        for path, file in self._files.items():
            try:
                file.truncate_to(offsets.get(path, 0))
            except DamagedError as error:
                damaged = error
        if damaged is not None:
            raise damaged

    def close(self) -> None:
        """Flush, and close the files; more can be written afterwards.

        Raises:
            SummaryError: see `flush`.
            OSError: see `flush`.
        """
        try:
            self.flush()
        finally:
            for file in self._files.values():
                file.close()

    def _file(self, path: str) -> EventFile:
        """The event file of a directory, by its path in that of the manager."""
        if path not in self._files:
            folder = self._root
            for part in path.split("/") if path else ():
                folder = folder / part
                storage.require_kind(folder, is_directory=True)
            name = f"{EVENTS}{self._ending}"
            storage.require_kind(folder / name)
            self._files[path] = EventFile(folder / name)
            self._unnamed.add(path)
        return self._files[path]

    def _find(self) -> Iterator[str]:
        """The directories with an event file of this manager.

        A killed process may have written to some that no checkpoint knows.
        """
        name = f"{EVENTS}{self._ending}"
        for folder, folders, files in os.walk(self._root):
            folders[:] = [each for each in folders if not each.startswith(".")]
            if name in files:
                path = Path(folder).relative_to(self._root).as_posix()
                yield "" if path == "." else path


def _check_directory(summary_dir: Any) -> Path:
    if not isinstance(summary_dir, str | os.PathLike) or not str(summary_dir):
        raise ConfigError(
            f"summary_dir={summary_dir!r:.80}: it must be the path of a "
            "directory."
        )
    if "://" in str(summary_dir):
        raise ConfigError(
            f"summary_dir={str(summary_dir)!r}: a remote directory is not "
            "supported. Give a local path."
        )
    path = Path(os.path.abspath(summary_dir))
    if path.is_symlink():
        raise ConfigError(
            f"summary_dir={str(summary_dir)!r} is a symbolic link, and what "
            "it leads to could be another run's: give the directory itself."
        )
    if path.exists() and not path.is_dir():
        raise ConfigError(
            f"summary_dir={str(summary_dir)!r} is there, and no directory: "
            "give the path of one, or of none."
        )
    return path


def _check_path(path: Any) -> str:
    text = os.fspath(path)
    for part in text.split("/") if text else ():
        bad = not part or part.startswith((".", EVENTS)) or "\0" in part
        try:
            bad = bad or len(os.fsencode(part)) > _MAX_NAME_BYTES
        except UnicodeEncodeError:
            bad = True
        if bad:
            raise _bad_path(path)
    return text


def _bad_path(path: Any) -> SummaryError:
    return SummaryError(
        f"{path!r:.80} cannot be a directory of summaries: the name of a group "
        "must be a str whose parts between slashes are not empty, have at "
        f"most {_MAX_NAME_BYTES} bytes and no null character, and begin "
        f"neither with a dot nor with {EVENTS!r}. Rename it."
    )


def _check_saved(path: str) -> str:
    try:
        return _check_path(path)
    except SummaryError as error:
        raise RestoreError(f"The saved log positions: {error}") from error
