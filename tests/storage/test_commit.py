import errno
import fcntl
import hashlib
import json
import os

import numpy as np
import pytest

from legato.errors import CheckpointError, DamagedError
from legato.storage import (
    FileSystem,
    clean_leftovers,
    commit_directory,
    copy_directory,
    locate,
    read_directory,
    read_manifest,
    remove_directory,
    strict_json,
)
from legato.storage.files import set_direct

FILES = {
    "a.bin": b"x" * 5000,
    "host.json": b"{}",
    "data/it": b"",
    "data/b": b"2",
}


class Recording(FileSystem):
    """Notes every call; may fail at one of them."""

    def __init__(self, fail_at=None):
        self.calls = []
        self.paths = {}
        self.fail_at = fail_at

    def _note(self, call, path):
        self.calls.append((call, str(path)))
        if len(self.calls) - 1 == self.fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open(self, path, flags):
        self._note("open", path)
        fd = super().open(path, flags)
        self.paths[fd] = path
        return fd

    def write(self, fd, data):
        self._note("write", self.paths[fd])
        return super().write(fd, data[:3000])  # writes may be short

    def fsync(self, fd):
        self._note("fsync", self.paths[fd])
        super().fsync(fd)

    def mkdir(self, path):
        self._note("mkdir", path)
        super().mkdir(path)

    def rename(self, source, target):
        self._note("rename", f"{source} -> {target}")
        super().rename(source, target)

    def link(self, source, target):
        self._note("link", target)
        super().link(source, target)

    def remove(self, path):
        self._note("remove", path)
        super().remove(path)


def contents(path):
    return {name: bytes(data) for name, data in read_directory(path)[1].items()}


def names(path):
    return sorted(os.listdir(path))


def test_what_is_written_is_read(tmp_path):
    sha = commit_directory(tmp_path / "c", FILES, {"step": 3})
    manifest, files = read_directory(tmp_path / "c")
    assert {k: bytes(v) for k, v in files.items()} == FILES
    assert manifest.about == {"step": 3} and manifest.sha256 == sha
    assert read_manifest(tmp_path / "c") == manifest
    assert names(tmp_path) == ["c"]


def test_the_manifest_is_json_that_ends_with_its_own_hash(tmp_path):
    sha = commit_directory(tmp_path / "c", FILES, {"step": 3})
    data = (tmp_path / "c/manifest.json").read_bytes()
    assert json.loads(data)["files"]["a.bin"]["size"] == 5000
    assert data.endswith(f',"sha256":"{sha}"}}\n'.encode())
    assert hashlib.sha256(data[:-78] + b"}").hexdigest() == sha


def test_the_order_of_calls_makes_it_durable(tmp_path):
    fs = Recording()
    commit_directory(tmp_path / "c", FILES, {}, fs=fs)
    calls = fs.calls
    rename = next(i for i, c in enumerate(calls) if c[0] == "rename")
    temporary = calls[rename][1].split(" -> ")[0]

    def at(call, path):
        return calls.index((call, path))

    written = [f"{temporary}/{name}" for name in FILES]
    manifest = f"{temporary}/manifest.json"
    for path in written:
        assert at("fsync", path) < at("open", manifest), "manifest is last"
    assert at("fsync", manifest) < at("fsync", temporary) < rename
    assert at("fsync", f"{temporary}/data") < rename
    assert calls[-1] == ("fsync", str(tmp_path)) and at(*calls[-1]) > rename


class Direct(FileSystem):
    """Counts what goes past the system's cache, and may refuse.

    As a disk does whose blocks are of 4096 bytes: others take less.

    Args:
        refuse_at: a write that is refused in any case.
        shorten: how many bytes a write may take.
        error: of what is refused.
    """

    def __init__(self, refuse_at=None, shorten=None, error=errno.EINVAL):
        self.direct = self.through_cache = 0
        self._refuse_at = refuse_at
        self._shorten = shorten
        self._error = error
        self._writes = 0
        self._first = None

    def open(self, path, flags):
        fd = super().open(path, flags)
        if self._first is None and not flags & os.O_DIRECTORY:
            self._first = fd, path
        return fd

    def write(self, fd, data):
        is_direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        place = os.lseek(fd, 0, os.SEEK_CUR)
        self._writes += 1
        if is_direct and (
            self._writes - 1 == self._refuse_at
            or len(data) % 4096
            or place % 4096
        ):
            raise OSError(self._error, "Invalid argument")
        done = super().write(fd, data[: self._shorten])
        if is_direct:
            self.direct += done
        elif os.path.samestat(os.fstat(fd), os.stat(self._first[1])):
            self.through_cache += done
        return done


MB = 2**20


def aligned(size, off=0):
    whole = np.empty(size + 8192, np.uint8)
    begin = -whole.ctypes.data % 4096 + off
    found = whole[begin : begin + size]
    found[:] = np.random.default_rng(size).integers(0, 255, size, np.uint8)
    return found


@pytest.mark.parametrize(
    ("size", "options", "direct"),
    [
        (8 * MB, {}, 8 * MB),
        (8 * MB + 4000, {}, 8 * MB),
        (8 * MB + 4096, {}, 8 * MB + 4096),
        (8 * MB, {"refuse_at": 0}, 0),
        (12 * MB, {"refuse_at": 1}, 4 * MB),
        (8 * MB, {"refuse_at": 1, "error": errno.ENOTSUP}, 4 * MB),
        (8 * MB, {"shorten": 8192}, 8 * MB),
        # The second one begins in the midst of a block.
        (8 * MB, {"shorten": 5 * 512}, 5 * 512),
        (4 * MB - 4096, {}, 0),  # not worth while
    ],
)
def test_large_files_go_past_the_systems_cache(tmp_path, size, options, direct):
    with open(tmp_path / "trial", "wb") as trial:
        if not set_direct(trial.fileno(), True):
            pytest.skip("the file system of the tests cannot do that")
    fs, data = Direct(**options), aligned(size)
    commit_directory(tmp_path / "c", {"a": data}, {}, fs=fs)
    assert contents(tmp_path / "c") == {"a": data.tobytes()}
    assert fs.direct + fs.through_cache == size
    assert fs.direct == direct


def test_what_a_disk_cannot_read_goes_through_the_cache(tmp_path, monkeypatch):
    fs, data = Direct(), aligned(8 * MB, off=64)
    commit_directory(tmp_path / "c", {"a": data}, {}, fs=fs)
    monkeypatch.delattr(os, "O_DIRECT")  # another system
    commit_directory(tmp_path / "d", {"a": aligned(8 * MB)}, {})
    assert contents(tmp_path / "c") == {"a": data.tobytes()}
    assert contents(tmp_path / "d") == {"a": aligned(8 * MB).tobytes()}
    assert not fs.direct


@pytest.mark.parametrize(
    "name", ["../x", "/x", ".x", "a/b/c", "a/../b", "manifest.json", "", "a\0"]
)
def test_names_that_could_escape_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="name"):
        commit_directory(tmp_path / "c", {name: b""}, {})
    assert names(tmp_path) == []


def test_every_failing_call_leaves_the_old_or_the_new(tmp_path):
    old, new = {"a": b"old"}, {"a": b"new", "data/x": b"1"}
    path = tmp_path / "c"
    fail_at = 0
    while True:
        commit_directory(path, old, {})
        fs = Recording(fail_at)
        try:
            commit_directory(path, new, {}, fs=fs)
        except OSError:
            clean = [n for n in names(tmp_path) if n != "c"]
            assert all(n.startswith(".old") for n in clean)
            assert contents(locate(path)) in (old, new)
        if len(fs.calls) <= fail_at:
            break
        clean_leftovers(tmp_path)
        assert names(tmp_path) == ["c"]
        assert contents(path) in (old, new)
        commit_directory(path, new, {})  # the retry works
        assert contents(path) == new
        fail_at += 1
    assert fail_at > 15


def test_between_the_two_renames_the_old_is_found(tmp_path):
    path = tmp_path / "best"
    commit_directory(path, {"a": b"old"}, {})

    class Dies(FileSystem):
        def rename(self, source, target):
            if target == path:
                raise KeyboardInterrupt
            super().rename(source, target)

    with pytest.raises(KeyboardInterrupt):
        commit_directory(path, {"a": b"new"}, {}, fs=Dies())
    assert not path.exists()
    assert contents(locate(path)) == {"a": b"old"}
    clean_leftovers(tmp_path)
    assert names(tmp_path) == ["best"]
    assert contents(path) == {"a": b"old"}


def test_leftovers_are_removed_without_following_links(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"")
    parent = tmp_path / "run"
    parent.mkdir()
    (parent / ".tmp-legato-dir").mkdir()
    (parent / ".tmp-legato-dir" / "link").symlink_to(outside)
    (parent / ".tmp-legato-link").symlink_to(outside)
    (parent / ".tmp-legato-file").write_bytes(b"")
    (parent / ".tmp-mine").write_bytes(b"")
    clean_leftovers(parent)
    assert names(parent) == [".tmp-mine"]
    assert names(outside) == ["precious"]


def test_removing_never_leaves_half_under_the_name(tmp_path):
    path = tmp_path / "c"
    commit_directory(path, FILES, {})

    class Dies(FileSystem):
        def remove(self, path):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remove_directory(path, fs=Dies())
    assert not path.exists()
    clean_leftovers(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_copy_is_the_same(tmp_path, links):
    class NoLinks(FileSystem):
        def link(self, source, target):
            if "host" in str(target):  # not even the first
                raise OSError(errno.EPERM, "Operation not permitted")
            super().link(source, target)

    fs = FileSystem() if links else NoLinks()
    sha = commit_directory(tmp_path / "c", FILES, {"step": 1})
    copy_directory(tmp_path / "c", tmp_path / "best", fs=fs)
    assert contents(tmp_path / "best") == FILES
    assert read_manifest(tmp_path / "best").sha256 == sha
    shared = os.path.samefile(tmp_path / "c/a.bin", tmp_path / "best/a.bin")
    assert shared == links
    remove_directory(tmp_path / "c")
    assert contents(tmp_path / "best") == FILES


def reseal(path, **changes):
    """Rewrites a manifest as an attacker would: with a right hash."""
    value = json.loads((path / "manifest.json").read_bytes())
    value.pop("sha256")
    body = strict_json.dumps(value | changes)
    sha = hashlib.sha256(body).hexdigest().encode()
    (path / "manifest.json").write_bytes(
        body[:-1] + b',"sha256":"' + sha + b'"}\n'
    )


def entry(data):
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize(
    "files",
    [
        {"../secret": entry(b"s")},
        {"data/../../secret": entry(b"s")},
        {"/etc/passwd": entry(b"s")},
        {"manifest.json": entry(b"s")},
        {"a.bin": {"size": -1, "sha256": "0" * 64}},
        {"a.bin": {"size": True, "sha256": "0" * 64}},
        {"a.bin": {"size": 10**18, "sha256": "0" * 64}},
        {"a.bin": {"size": 5000, "sha256": "0" * 63}},
        {"a.bin": {"size": 5000}},
        {"a.bin": None},
        [],
        None,
    ],
)
def test_a_hostile_manifest_is_damage(tmp_path, files):
    (tmp_path / "secret").write_bytes(b"s")
    commit_directory(tmp_path / "c", FILES, {})
    reseal(tmp_path / "c", files=files)
    with pytest.raises(DamagedError):
        read_directory(tmp_path / "c")


def test_the_reseal_of_these_tests_is_right(tmp_path):
    commit_directory(tmp_path / "c", FILES, {})
    reseal(tmp_path / "c", about={"other": 1})
    assert read_manifest(tmp_path / "c").about == {"other": 1}


def test_a_newer_schema_is_not_damage(tmp_path):
    commit_directory(tmp_path / "c", FILES, {})
    reseal(tmp_path / "c", schema=2)
    with pytest.raises(CheckpointError, match="use the version") as caught:
        read_directory(tmp_path / "c")
    assert not isinstance(caught.value, DamagedError)


def swap(path, make):
    path.unlink()
    make(path)


@pytest.mark.parametrize(
    ("file", "make"),
    [
        ("a.bin", lambda p: p.symlink_to(p.parent.parent / "copy")),
        ("manifest.json", lambda p: p.symlink_to(p.parent.parent / "m")),
        ("a.bin", os.mkfifo),
        ("manifest.json", os.mkfifo),
        ("a.bin", os.mkdir),
        ("a.bin", lambda p: os.truncate(os.open(p, os.O_CREAT | 1), 2**40)),
        (
            "manifest.json",
            lambda p: os.truncate(os.open(p, os.O_CREAT | 1), 2**40),
        ),
        ("a.bin", lambda p: None),
        ("manifest.json", lambda p: None),
        ("manifest.json", lambda p: p.write_bytes(b"[" * 10**6)),
        ("manifest.json", lambda p: p.write_bytes(b"")),
        ("a.bin", lambda p: p.write_bytes(b"y" * 5000)),
        ("a.bin", lambda p: p.write_bytes(b"x" * 4999)),
    ],
)
def test_a_file_that_is_not_what_was_written_is_named(tmp_path, file, make):
    path = tmp_path / "c"
    commit_directory(path, FILES, {})
    (tmp_path / "copy").write_bytes(FILES["a.bin"])
    (tmp_path / "m").write_bytes((path / "manifest.json").read_bytes())
    swap(path / file, make)
    with pytest.raises(DamagedError, match=file):
        read_directory(path)


def test_directories_that_are_links_are_damage(tmp_path):
    commit_directory(tmp_path / "c", FILES, {})
    (tmp_path / "link").symlink_to(tmp_path / "c")
    with pytest.raises(DamagedError):
        read_directory(tmp_path / "link")
    os.rename(tmp_path / "c/data", tmp_path / "data")
    (tmp_path / "c/data").symlink_to(tmp_path / "data")
    with pytest.raises(DamagedError, match="data/"):
        read_directory(tmp_path / "c")
    with pytest.raises(DamagedError):
        read_directory(tmp_path / "missing")


def test_files_that_are_not_listed_are_not_read(tmp_path):
    commit_directory(tmp_path / "c", FILES, {})
    os.mkfifo(tmp_path / "c/.nfs0001")
    assert contents(tmp_path / "c") == FILES


def test_a_passing_trouble_is_not_damage(tmp_path, monkeypatch):
    commit_directory(tmp_path / "c", FILES, {})

    def too_many(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "readv", too_many)
    with pytest.raises(CheckpointError, match="Too many") as caught:
        read_directory(tmp_path / "c")
    assert not isinstance(caught.value, DamagedError)
