"""Directories that appear whole, and whose every byte is checked when read.

**Writing.** Files go into a temporary directory beside the final place and are
fsynced; `manifest.json`, with their sizes and hashes, is written last; the
directory is fsynced, renamed, and its parent fsynced. A kill at any point
leaves either nothing under the final name or all of it, and so does a power
cut, because contents are durable before the name that makes them count.

**Replacing.** No portable call exchanges two directories. The old one is
renamed to `.old-legato-NAME`, the new one to `NAME`, and the old one removed.
At the one moment when `NAME` does not exist, the old one lies complete beside
it: readers look there, and `clean_leftovers` moves it back.

**Reading.** The manifest ends with the hash of its own body; it is checked
first. Then each file that it lists is opened without following symbolic links,
must be a regular file of the listed size (checked before anything is
allocated), and must have the listed hash. Files that the manifest does not
list are never opened, and not an error either: a stray `.nfs0001` or
`.DS_Store` must not cost a checkpoint. Hashes show damage; they do not
authenticate, for whoever can write files can write hashes.
"""

import contextlib
import dataclasses
import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from legato.errors import CheckpointError, DamagedError
from legato.storage import strict_json
from legato.storage.files import (
    BLOCK,
    OS,
    TEMPORARY,
    FileSystem,
    set_direct,
    sync_directory,
    temporary_path,
    write_all,
)
from legato.types import JSON

MANIFEST = "manifest.json"
SCHEMA = 1

_OLD = ".old-legato-"
# No leading dot, so neither hidden files nor "..".
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_FILE_NAME = re.compile(rf"{_PART}(?:/{_PART})?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\n\Z')
_CHUNK = 4 * 1024 * 1024
_NOT_DIRECT = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_READ = 1 << 30  # a read takes at most 2 GiB at once
# These say something about the files; others (no permission, too many open
# files, ...) about this moment, and must not condemn a good checkpoint.
_DAMAGE = {
    errno.ENOENT,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENXIO,
    errno.EIO,
}
_NO_LINKS = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a `manifest.json` that matches its own hash.

    Attributes:
        about: what the writer said about the directory.
        files: name -> (size, sha256).
        sha256: the hash of the manifest itself.
    """

    about: dict[str, JSON]
    files: dict[str, tuple[int, str]]
    sha256: str


def commit_directory(
    path: Path,
    files: Mapping[str, Any],
    about: dict[str, JSON],
    *,
    fs: FileSystem = OS,
) -> str:
    """Writes a directory that appears whole, replacing one that is there.

    Args:
        path: where. Its parent exists.
        files: name, or `directory/name` -> contents (any contiguous buffer).
        about: what to say about them in the manifest.
        fs: how to write.

    Returns:
        The sha256 of the manifest.

    Raises:
        ValueError: if a name cannot be used.
        OSError: if it could not be written; what was there is still there.
    """
    check_names(files)
    temporary = temporary_path(path)
    try:
        fs.mkdir(temporary)
        for name in sorted({n.split("/")[0] for n in files if "/" in n}):
            fs.mkdir(temporary / name)
        listed = {
            name: _write_hashed(temporary / name, data, fs)
            for name, data in files.items()
        }
        data, sha256 = _seal(about, listed)
        _write_hashed(temporary / MANIFEST, data, fs)
        _move_in(temporary, path, list(files), fs)
    except OSError:
        _discard(temporary, fs)
        raise
    return sha256


def check_names(names: Iterable[str]) -> None:
    """Refuses names that a committed directory cannot have.

    Raises:
        ValueError: for anything but letters, digits, `_`, `-`, `.`, with at
            most one directory, and for a leading dot.
    """
    for name in names:
        if name == MANIFEST or not _FILE_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot be the name of a file in a checkpoint: use "
                "letters, digits, '_', '-' and '.'"
            )


def copy_directory(source: Path, path: Path, *, fs: FileSystem = OS) -> None:
    """Publishes a committed directory under a second name, atomically.

    The files are hard links where the file system has them (they are never
    changed in place, so that sharing is safe), else checked copies.

    Raises:
        DamagedError: if the source is damaged.
        OSError: if it could not be written; what was there is still there.
    """
    manifest = read_manifest(source)
    names = [*manifest.files, MANIFEST]
    temporary = temporary_path(path)
    try:
        fs.mkdir(temporary)
        for name in sorted({n.split("/")[0] for n in names if "/" in n}):
            fs.mkdir(temporary / name)
        try:
            for name in names:
                fs.link(source / name, temporary / name)
        except OSError as e:
            if e.errno not in _NO_LINKS:
                raise
            _copy_files(source, temporary, manifest, fs)
        _move_in(temporary, path, names, fs)
    except Exception:
        _discard(temporary, fs)
        raise


def read_manifest(path: Path) -> Manifest:
    """Reads and checks the manifest of a directory, and nothing else.

    Raises:
        DamagedError: if it is not what was written.
        CheckpointError: if it could not be read for another reason, or is of
            a newer schema.
    """
    with _reading(path), _directory(path) as fd:
        return _read_manifest(fd, path)


def read_directory(path: Path) -> tuple[Manifest, dict[str, memoryview]]:
    """Reads a directory and checks every byte of it.

    Returns:
        The manifest, and the contents of the files that it lists (private
        memory, writable).

    Raises:
        DamagedError: if anything in it is not what was written.
        CheckpointError: if it could not be read for another reason, or is of
            a newer schema.
    """
    with _reading(path), _directory(path) as fd:
        manifest = _read_manifest(fd, path)
        return manifest, {
            name: _read_hashed(fd, path, name, size, sha256)
            for name, (size, sha256) in manifest.files.items()
        }


def locate(path: Path) -> Path:
    """Where the directory is, if it is just being replaced by its writer."""
    old = path.with_name(_OLD + path.name)
    return old if not os.path.lexists(path) and os.path.lexists(old) else path


def clean_leftovers(parent: Path, *, fs: FileSystem = OS) -> None:
    """Finishes what a dead writer left: no temporary or old directories.

    Only for who holds the lock of the run directory: the work of a living
    writer would be removed.

    Raises:
        OSError: if something could not be removed.
    """
    for entry in sorted(parent.iterdir()):
        if entry.name.startswith(_OLD):
            final = parent / entry.name.removeprefix(_OLD)
            if not os.path.lexists(final):
                fs.rename(entry, final)
                sync_directory(parent, fs)
            else:
                fs.remove(entry)
        elif entry.name.startswith(TEMPORARY):
            fs.remove(entry)


def remove_directory(path: Path, *, fs: FileSystem = OS) -> None:
    """Removes a committed directory; no half of it keeps its name.

    Raises:
        OSError: if it could not be removed.
    """
    doomed = temporary_path(path)
    fs.rename(path, doomed)
    fs.remove(doomed)


# Writing.


def _write_hashed(path: Path, data: Any, fs: FileSystem) -> tuple[int, str]:
    """Writes and fsyncs a file; returns its size and hash."""
    view = memoryview(data).cast("B")
    digest = hashlib.sha256()
    fd = fs.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        is_direct = _is_for_disk(view) and set_direct(fd, True)
        # Hashed and written while it is in the cache; both let go of the GIL.
        for begin in range(0, len(view), _CHUNK):
            chunk = view[begin : begin + _CHUNK]
            digest.update(chunk)
            try:
                write_all(fd, chunk, fs)
            except OSError as error:
                if not is_direct or error.errno not in _NOT_DIRECT:
                    raise
                # The last one is no whole block; or blocks are larger here,
                # one was written in part, or a server refuses.
                set_direct(fd, False)
                is_direct = False
                done = os.lseek(fd, 0, os.SEEK_CUR)
                write_all(fd, view[done : begin + len(chunk)], fs)
        fs.fsync(fd)
    finally:
        os.close(fd)
    return len(view), digest.hexdigest()


def _is_for_disk(view: memoryview) -> bool:
    """Whether it is worth while, and lies as a disk can read it."""
    if len(view) < _CHUNK:  # is as well in the system's cache
        return False
    return np.frombuffer(view, np.uint8).ctypes.data % BLOCK == 0


def _seal(
    about: dict[str, JSON], listed: Mapping[str, tuple[int, str]]
) -> tuple[bytes, str]:
    """The bytes of a manifest, which end with the hash of what precedes."""
    body = strict_json.dumps(
        {
            "schema": SCHEMA,
            "about": about,
            "files": {
                name: {"size": size, "sha256": sha256}
                for name, (size, sha256) in listed.items()
            },
        }
    )
    sha256 = hashlib.sha256(body).hexdigest()
    return body[:-1] + b',"sha256":"' + sha256.encode() + b'"}\n', sha256


def _move_in(
    temporary: Path, path: Path, names: list[str], fs: FileSystem
) -> None:
    """Gives a finished temporary directory its name, durably."""
    # The names inside first: the rename must not be durable before them.
    for name in sorted({n.split("/")[0] for n in names if "/" in n}):
        sync_directory(temporary / name, fs)
    sync_directory(temporary, fs)
    old = path.with_name(_OLD + path.name)
    replacing = os.path.lexists(path)
    if replacing:
        if os.path.lexists(old):  # of an earlier try; `path` is newer
            fs.remove(old)
        fs.rename(path, old)
        # Durable before the next rename, so that no power cut can keep the
        # second and lose the first.
        sync_directory(path.parent, fs)
    try:
        fs.rename(temporary, path)
    except OSError:
        if replacing:
            os.rename(old, path)
        raise
    sync_directory(path.parent, fs)
    if replacing:
        with contextlib.suppress(OSError):  # the next start will
            remove_directory(old, fs=fs)


def _copy_files(
    source: Path, target: Path, manifest: Manifest, fs: FileSystem
) -> None:
    for name in [*manifest.files, MANIFEST]:
        (target / name).unlink(missing_ok=True)  # linked before the failure
    checked, contents = read_directory(source)
    for name, data in contents.items():
        _write_hashed(target / name, data, fs)
    _write_hashed(target / MANIFEST, _seal(checked.about, checked.files)[0], fs)


def _discard(temporary: Path, fs: FileSystem) -> None:
    """Makes room again at once: the disk may be full."""
    if os.path.lexists(temporary):
        with contextlib.suppress(OSError):
            fs.remove(temporary)


# Reading.


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in _DAMAGE:
            raise DamagedError(f"{path}: {e.strerror}") from e
        raise CheckpointError(f"{path}: cannot be read now: {e}") from e
    except MemoryError as e:
        raise CheckpointError(f"{path}: does not fit into memory") from e


@contextlib.contextmanager
def _directory(path: str | Path, parent: int | None = None) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


def _read_manifest(directory: int, path: Path) -> Manifest:
    where = f"{path / MANIFEST}"
    data = bytes(_read_file(directory, path, MANIFEST, None))
    seal = _SEAL.search(data)
    if seal is None:
        raise DamagedError(f"{where}: does not end with its own hash")
    body = data[: seal.start()] + b"}"
    sha256 = hashlib.sha256(body).hexdigest()
    if sha256.encode() != seal[1]:
        raise DamagedError(f"{where}: its hash does not match: it was changed")
    value = strict_json.loads(body, name=where)
    if not isinstance(value, dict) or type(value.get("schema")) is not int:
        raise DamagedError(f"{where}: not a manifest")
    if value["schema"] != SCHEMA:
        raise CheckpointError(
            f"{where}: has the schema {value['schema']}, but this version of "
            f"legato reads {SCHEMA}: use the version that wrote it"
        )
    about, listed = value.get("about"), value.get("files")
    if not isinstance(about, dict) or not isinstance(listed, dict):
        raise DamagedError(f"{where}: not a manifest")
    files = {}
    for name, entry in listed.items():
        if name == MANIFEST or not _FILE_NAME.fullmatch(name):
            raise DamagedError(f"{where}: lists a file named {name[:80]!r}")
        match entry:
            case {"size": int(size), "sha256": str(sha)} if (
                size >= 0 and len(entry) == 2 and _SHA256.fullmatch(sha)
            ):
                files[name] = (size, sha)
            case _:
                raise DamagedError(f"{where}: a malformed entry for {name!r}")
    return Manifest(about=about, files=files, sha256=sha256)


def _read_hashed(
    directory: int, path: Path, name: str, size: int, sha256: str
) -> memoryview:
    data = _read_file(directory, path, name, size)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedError(
            f"{path / name}: its sha256 is not the manifest's: it was changed "
            "or the disk returned wrong bytes"
        )
    return data


def _read_file(
    directory: int, path: Path, name: str, size: int | None
) -> memoryview:
    """Reads a regular file; `size` None: any size that a manifest may have."""
    try:
        if "/" in name:
            parent, name_there = name.split("/")
            with _directory(parent, directory) as inner:
                return _read_open(inner, name_there, path / name, size)
        return _read_open(directory, name, path / name, size)
    except OSError as e:
        if e.errno in _DAMAGE:
            reason = "missing" if e.errno == errno.ENOENT else e.strerror
            raise DamagedError(f"{path / name}: {reason}") from e
        raise


def _read_open(
    directory: int, name: str, where: Path, size: int | None
) -> memoryview:
    # O_NONBLOCK: a named pipe would wait for ever to be opened.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=directory)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise DamagedError(f"{where}: not a regular file")
        if size is None:
            size = found.st_size
            if size > strict_json.MAX_BYTES:
                raise DamagedError(f"{where}: {size} bytes are too many")
        elif found.st_size != size:
            raise DamagedError(
                f"{where}: {found.st_size} bytes, but the manifest says {size}"
            )
        buffer = np.empty(size, np.uint8).data
        done = 0
        while done < size:
            count = os.readv(fd, [buffer[done : done + _READ]])
            if count == 0:
                raise DamagedError(f"{where}: became shorter while it was read")
            done += count
        return buffer
    finally:
        os.close(fd)
