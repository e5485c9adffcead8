"""One process at a time trains in a run directory."""

import datetime
import json
import os
import re
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

import filelock

from legato.errors import RunDirError

LOCK_NAME = "lock"


class RunLock:
    """Holds a run directory for this process, from making it to `release`.

    The lock is the kernel's (`flock` on the file `lock`) and ends with the
    process, however it dies: a file that was left behind is no obstacle. What
    is written in the file is only for the message to others.

    Args:
        run_dir: the directory; made if there is none.

    Raises:
        RunDirError: if another process, or another part of this one, holds it,
            or the directory cannot be written.
    """

    def __init__(self, run_dir: Path):
        self._path = run_dir / LOCK_NAME
        # Not thread-local: a run may be ended by another thread.
        self._lock = filelock.FileLock(self._path, thread_local=False)
        try:
            self._lock.acquire(blocking=False)
        except filelock.Timeout:
            raise RunDirError(
                f"{run_dir}: another process is training here"
                f"{_holder(self._path)}. Wait for it, stop it, or choose "
                "another run_dir."
            ) from None
        except OSError as e:
            raise RunDirError(
                f"{run_dir}: cannot be locked for training: {e}. Is it a "
                "directory that you may write to?"
            ) from e
        self._describe()

    def release(self) -> None:
        """Gives the directory up; a second call does nothing."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _describe(self) -> None:
        if not isinstance(self._lock, filelock.UnixFileLock):
            return  # then the contents of the file are the lock's own
        now = datetime.datetime.now(datetime.UTC)
        record = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": now.isoformat(timespec="seconds"),
        }
        # In place: a renamed file would be another inode, which no one holds.
        # A second descriptor is closed without harm to the lock (unlike with
        # POSIX record locks).
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW)
            try:
                os.ftruncate(fd, 0)
                os.write(fd, json.dumps(record).encode() + b"\n")
            finally:
                os.close(fd)
        except OSError:
            pass  # a full disk is no reason against the lock itself


def _holder(path: Path) -> str:
    """Who says that they hold it; nothing if that is not well-formed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            text = os.read(fd, 1000).decode("ascii")
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return ""
    found = re.fullmatch(
        r'\{"pid": (\d{1,10}), "host": "([\w.-]{1,255})", '
        r'"since": "([\dT:+-]{1,40})"\}\n',
        text,
    )
    if found is None:
        return ""
    pid, host, since = found.groups()
    return f" (process {pid} on {host}, since {since})"
