"""What XLA compiled, kept in the user's cache for the next process.

To compile takes most of the time until the first step, and a run that goes on
compiles what it compiled before. XLA's result is a function of the program,
the versions and the CPU; by the first two JAX names its files, by the last the
folder is named here. A run directory would be the wrong place: what is
compiled is code, and none is read from there.

JAX writes its files in place, and never again: half of one, left by a process
that was killed, would stay for ever. So each process has a folder of its own,
which holds links to all files of the shared one, and links back what is whole.
"""

import atexit
import contextlib
import hashlib
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

import filelock
import jax

from legato import machine

MAX_BYTES = 2 * 1024**3
"""The oldest files are removed when there are more."""

SETTLED_SECS = 2.0
"""A file is whole if it has not been written to for so long."""

_PREFIX = "process-"
_SUFFIX = "-cache"  # JAX's, of the files that count


class _Programs:
    """The folder of this process, beside the shared one."""

    def __init__(self, shared: Path) -> None:
        self._shared = shared
        self._own = shared / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        # Let go by the kernel, however this process ends; taken before there
        # is a folder, which another would otherwise take for an abandoned one.
        self._lock = filelock.FileLock(_lock_of(self._own), timeout=0)
        self._lock.acquire()
        self._own.mkdir()
        self._linked = _link_all(shared, self._own)

    def publish(self, settled_secs: float = SETTLED_SECS) -> None:
        """Give what is whole to the processes that come."""
        until = time.time() - settled_secs
        new = [
            entry.name
            for entry in os.scandir(self._own)
            if entry.name not in self._linked
            and entry.name.endswith(_SUFFIX)
            and entry.stat().st_mtime <= until
        ]
        for name in new:
            _sync(self._own / name)
            with contextlib.suppress(FileExistsError):
                os.link(self._own / name, self._shared / name)
            self._linked.add(name)

    def close(self) -> None:
        """At the process's end, when nothing is written any more."""
        jax.config.update("jax_compilation_cache_dir", None)
        with contextlib.suppress(OSError):
            self.publish(0)
            _shrink(self._shared)
        _remove(self._own, self._lock)


_programs: _Programs | None = None


def keep() -> None:
    """From here on, take what was compiled before, and keep what is new.

    Nothing is done where the user has told JAX where to keep it, or not to; or
    where there is no folder that is this user's alone.
    """
    global _programs
    config: Any = jax.config
    if (
        _programs is not None
        or config.jax_compilation_cache_dir
        or not config.jax_enable_compilation_cache
    ):
        return
    try:
        shared = _shared_folder()
        if shared is None:
            return
        _remove_abandoned(shared)
        _programs = _Programs(shared)
    except (OSError, filelock.Timeout):
        return  # a disk that is full or read only; no links there
    config.update("jax_compilation_cache_dir", str(_programs._own))
    # Its folder's name would be part of the name of every program.
    config.update("jax_persistent_cache_enable_xla_caches", "none")
    # A model's initialisers are many small programs.
    config.update("jax_persistent_cache_min_compile_time_secs", 0)
    atexit.register(_programs.close)


def publish() -> None:
    """Let other processes have what this one compiled."""
    if _programs is not None:
        with contextlib.suppress(OSError):
            _programs.publish()


def _shared_folder() -> Path | None:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    of_cpu = hashlib.sha256(machine.cpu().encode()).hexdigest()[:16]
    folder = Path(home, "legato", "jax", of_cpu)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    # What lies there is run.
    is_own = state.st_uid == os.getuid() and not state.st_mode & 0o022
    return folder if is_own else None


def _link_all(shared: Path, own: Path) -> set[str]:
    names = {e.name for e in os.scandir(shared) if e.name.endswith(_SUFFIX)}
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # another shrinks it
            os.link(shared / name, own / name)
    return names


def _sync(file: Path) -> None:
    """Before it has a name that lasts: JAX would read what a crash left."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _remove_abandoned(shared: Path) -> None:
    """Remove the folders of processes that were killed."""
    # (By their locks: a folder whose lock is gone may be in use.)
    for path in shared.glob(f"{_PREFIX}*.lock"):
        lock = filelock.FileLock(path, timeout=0)
        with contextlib.suppress(filelock.Timeout):
            lock.acquire()
            _remove(path.with_suffix(""), lock)


def _remove(folder: Path, lock: filelock.FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _lock_of(folder).unlink(missing_ok=True)
    lock.release()


def _shrink(shared: Path) -> None:
    """Remove what was used the longest ago, until it is small enough."""
    entries = [e for e in os.scandir(shared) if e.name.endswith(_SUFFIX)]
    total = sum(entry.stat().st_size for entry in entries)
    for entry in sorted(entries, key=lambda e: e.stat().st_atime):
        if total <= MAX_BYTES:
            break
        total -= entry.stat().st_size
        Path(entry).unlink(missing_ok=True)
