"""Small files: replaced whole, or appended to line by line."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from legato.errors import DamagedError, RunDirError

_LINE = (
    orjson.OPT_APPEND_NEWLINE
    # What `json` refuses.
    | orjson.OPT_PASSTHROUGH_SUBCLASS
    | orjson.OPT_PASSTHROUGH_DATACLASS
    | orjson.OPT_PASSTHROUGH_DATETIME
)

TEMPORARY = ".tmp-legato-"
"""How the names of unfinished files and directories begin."""


class FileSystem:
    """The calls to the operating system by which this package writes.

    Tests put a subclass in its place that fails, or dies, at any of them.
    """

    def open(self, path: Path, flags: int) -> int:
        """As `os.open`; no last component may be a symbolic link."""
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, data: memoryview) -> int:
        """As `os.write`: may write less than all."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        """As `os.fsync`."""
        os.fsync(fd)

    def truncate(self, fd: int, size: int) -> None:
        """As `os.ftruncate`."""
        os.ftruncate(fd, size)

    def mkdir(self, path: Path) -> None:
        """As `os.mkdir`."""
        os.mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        """As `os.rename`."""
        os.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        """As `os.link`: a second name for a file."""
        os.link(source, target, follow_symlinks=False)

    def remove(self, path: Path) -> None:
        """Removes a file, a link, or a directory with all that is in it."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


OS = FileSystem()
"""The operating system itself."""


def sync_directory(path: Path, fs: FileSystem = OS) -> None:
    """Makes the names in a directory durable.

    An fsync of a file does not save its name: after a power cut a file that
    was renamed or made may be missing unless its directory was synced.
    """
    fd = fs.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fs.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: Any, fs: FileSystem) -> None:
    """Writes all of a buffer, of which nothing is held when that fails.

    An error keeps what its frames refer to: a bytearray could not grow while
    one is reported.
    """
    done = 0
    with memoryview(data) as given, given.cast("B") as view:
        while done < len(view):
            with view[done:] as rest:
                done += fs.write(fd, rest)


BLOCK = 4096
"""Memory, places and sizes are multiples of it, where a disk reads memory."""


def set_direct(fd: int, on: bool) -> bool:
    """Have the disk read what is written from memory itself, or no longer.

    Otherwise it is copied into the system's cache first, and written from
    there by threads of the kernel: for a file of 100 MB that took as long as
    the rest of writing it, of CPUs that have other work.

    Returns:
        Whether the system and the file system can do that.
    """
    flag = getattr(os, "O_DIRECT", 0)  # not everywhere
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    flags = flags | flag if on else flags & ~flag
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    except OSError:
        return False
    return flag != 0


def temporary_path(path: Path) -> Path:
    """An unused name beside a path, for what will be renamed to it."""
    return path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")


def write_file(path: Path, data: bytes, *, fs: FileSystem = OS) -> None:
    """Writes or replaces a small file: a reader sees the old or the new.

    Raises:
        OSError: if it could not be written; the old file is still there.
    """
    temporary = temporary_path(path)
    try:
        fd = fs.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            write_all(fd, data, fs)
            # Before the rename: else a power cut could leave the new name
            # with no contents.
            fs.fsync(fd)
        finally:
            os.close(fd)
        fs.rename(temporary, path)
        sync_directory(path.parent, fs)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def open_regular(path: Path, *, dir_fd: int | None = None) -> BinaryIO:
    """Opens a file of a run directory, which may be hostile, for reading.

    A symbolic link could lead anywhere, and a named pipe would wait for ever.

    Raises:
        DamagedError: it is a link or no regular file.
        OSError: it is not there, or cannot be opened.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise DamagedError(f"{path}: not a regular file") from error
        raise
    file = os.fdopen(fd, "rb")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        file.close()
        raise DamagedError(f"{path}: not a regular file")
    return file


def read_file(path: Path, *, max_bytes: int) -> bytes:
    """Reads a small file of a run directory, which may be hostile.

    Raises:
        DamagedError: it is a link, no regular file, or larger.
        OSError: it is not there, or cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise DamagedError(f"{path}: more than {max_bytes} bytes")
    return data


class RecordFile:
    """A file that grows by whole records, and can be rewound.

    Records are kept in memory until `flush`, and are never torn by an error
    (a failed `flush` can be repeated). After a kill the last record may be
    torn: rewind to where a whole one ended. One thread may append while
    another one flushes.

    Args:
        path: the file; if there is none, the first `flush` with something to
            write makes it, and its directory. Not a symbolic link.
        fs: how to write.

    Raises:
        OSError: if it is there and cannot be opened.
    """

    def __init__(self, path: Path, *, fs: FileSystem = OS):
        self._path = path
        self._fs = fs
        self._lock = threading.RLock()
        self._pending = bytearray()
        self._fd = -1
        self._size = 0
        self._is_named = False  # durably
        with contextlib.suppress(FileNotFoundError):
            self._open()

    def _open(self, flags: int = 0) -> None:
        self._fd = self._fs.open(self._path, os.O_RDWR | os.O_APPEND | flags)
        self._size = os.fstat(self._fd).st_size

    def _reopen(self) -> None:
        if self._fd < 0:
            with contextlib.suppress(FileNotFoundError):
                self._open()

    def append_bytes(self, record: bytes) -> None:
        """Adds a record, in memory."""
        with self._lock:
            self._pending += record

    @property
    def offset(self) -> int:
        """Where the next record will begin, in bytes from the beginning."""
        with self._lock:
            return self._size + len(self._pending)

    def flush(self) -> None:
        """Hands all records to the system: they survive the process.

        Raises:
            OSError: if it failed. The records are kept for the next time.
        """
        with self._lock:
            if not self._pending:
                return
            if self._fd < 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._open(os.O_CREAT)
            # A flush that failed or was interrupted may have written some of
            # them: they would be there twice.
            found = os.fstat(self._fd).st_size
            if found > self._size:
                self._fs.truncate(self._fd, self._size)
            self._size = min(found, self._size)
            write_all(self._fd, self._pending, self._fs)
            self._size += len(self._pending)
            self._pending = bytearray()

    def sync(self) -> None:
        """Flushes, and makes durable: the records survive a power cut.

        Another thread may append meanwhile.

        Raises:
            OSError: if it failed. It can be repeated.
        """
        with self._lock:
            self.flush()
            if self._fd < 0:
                return
            # Appending does not wait for the disk, nor closing.
            fd = os.dup(self._fd)
        try:
            self._fs.fsync(fd)
        finally:
            os.close(fd)
        if not self._is_named:
            sync_directory(self._path.parent, self._fs)
            self._is_named = True

    def truncate_to(self, offset: int) -> None:
        """Removes all records from an offset on.

        Raises:
            DamagedError: if the file is shorter than that.
            OSError: if it failed.
        """
        self.flush()
        self._reopen()
        if not 0 <= offset <= self._size:
            raise DamagedError(
                f"{self._path}: cannot be rewound to byte {offset}: it has "
                f"only {self._size}; records were removed"
            )
        if offset != self._size:
            self._fs.truncate(self._fd, offset)
            self._size = offset

    def close(self) -> None:
        """Flushes and closes; a second call does nothing.

        What is added afterwards opens it again.

        Raises:
            OSError: if the flush failed.
        """
        try:
            self.flush()
        finally:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class Lines(RecordFile):
    """A file of lines. Opening it cuts off one that a kill left torn."""

    def __init__(self, path: Path, *, fs: FileSystem = OS):
        super().__init__(path, fs=fs)
        if self._fd < 0:
            return
        try:
            whole = _whole_lines(self._fd)
            if whole != self._size:
                fs.truncate(self._fd, whole)
                self._size = whole
        except BaseException:
            os.close(self._fd)
            raise

    def truncate_to(self, offset: int) -> None:
        """Removes all records from an offset on.

        Raises:
            DamagedError: if the file is shorter than that, or no line begins
                there.
            OSError: if it failed.
        """
        self.flush()
        self._reopen()
        inside = 0 < offset <= self._size
        if inside and os.pread(self._fd, 1, offset - 1) != b"\n":
            raise DamagedError(
                f"{self._path}: cannot be rewound to byte {offset}: no line "
                "begins there; lines were changed"
            )
        super().truncate_to(offset)


class JsonLines(Lines):
    """A file of JSON records, one a line.

    The lines are for people and for other tools, so they are ordinary JSON:
    floats in the fewest digits that are exact, and `NaN`, `Infinity` and
    `-Infinity`, which are not standard but which most readers take.
    """

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record, in memory.

        Raises:
            TypeError: if JSON has no form for something in it.
        """
        self.append_bytes(_as_line(record))

    def extend(self, records: Iterable[dict[str, Any]]) -> None:
        """Adds records, in memory; all of them or none.

        Raises:
            TypeError: see `append`.
        """
        self.append_bytes(b"".join(map(_as_line, records)))


def require_kind(path: Path, *, is_directory: bool = False) -> None:
    """Refuse what stands where a run writes, and is something else.

    Args:
        path: which may be there or not.
        is_directory: whether a directory is expected, or a regular file.

    Raises:
        RunDirError: something else is there.
    """
    kind = "directory" if is_directory else "regular file"
    if path.is_symlink():
        raise RunDirError(
            f"{path} is a symbolic link, and what it leads to could be another "
            f"run's, which would be cut: put a {kind} in its place."
        )
    right = path.is_dir() if is_directory else path.is_file()
    if not right and path.exists():
        raise RunDirError(
            f"{path} is there, and is no {kind}, as which the run writes it: "
            "move it away."
        )


def _as_line(record: dict[str, Any]) -> bytes:
    # The digits of floats take `json` several times as long; but it knows more
    # (orjson has null for NaN), and what a record becomes depends on it alone.
    try:
        line = orjson.dumps(record, option=_LINE)
    except TypeError:
        line = b""
    if line and b"null" not in line:
        return line
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _whole_lines(fd: int) -> int:
    """The size without a torn last line."""
    end = os.fstat(fd).st_size
    while end:
        begin = max(0, end - 65536)
        newline = os.pread(fd, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0
