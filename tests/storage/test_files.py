import errno
import math
import os

import pytest

from legato.errors import DamagedError
from legato.storage import FileSystem, JsonLines, write_file


class FullDisk(FileSystem):
    """Takes so many bytes more."""

    def __init__(self, room):
        self.room = room

    def write(self, fd, data):
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = super().write(fd, data[: self.room])
        self.room -= count
        return count


class Failing(FileSystem):
    def __init__(self, call):
        self.call = call

    def _fail(self, call):
        if call == self.call:
            raise OSError(errno.EIO, "Input/output error")

    def fsync(self, fd):
        self._fail("fsync")
        super().fsync(fd)

    def rename(self, source, target):
        self._fail("rename")
        super().rename(source, target)


class Making(FileSystem):
    """No new file can be made for a while."""

    def __init__(self, failures):
        self.failures = failures

    def open(self, path, flags):
        if flags & os.O_CREAT and self.failures:
            self.failures -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().open(path, flags)


def test_a_file_is_made_and_replaced(tmp_path):
    path = tmp_path / "config.yaml"
    write_file(path, b"a: 1\n")
    write_file(path, b"a: 2\n")
    assert path.read_bytes() == b"a: 2\n"
    assert os.listdir(tmp_path) == ["config.yaml"]


@pytest.mark.parametrize(
    "fs", [FullDisk(2), Failing("fsync"), Failing("rename")]
)
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, fs):
    path = tmp_path / "config.yaml"
    write_file(path, b"old")
    with pytest.raises(OSError):
        write_file(path, b"new one", fs=fs)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_symbolic_link_is_replaced_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "config.yaml").symlink_to(victim)
    write_file(tmp_path / "config.yaml", b"a: 1\n")
    assert victim.read_bytes() == b"precious"
    os.symlink(victim, tmp_path / "log.jsonl")
    with pytest.raises(OSError):
        JsonLines(tmp_path / "log.jsonl")


def test_records_are_plain_json_lines(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1, "loss": 0.1, "text": "é"})
    assert not (tmp_path / "metrics.jsonl").exists()
    lines.append({"loss": math.nan})
    lines.close()
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step":1,"loss":0.1,"text":"é"}\n{"loss":NaN}\n'
    )


def test_rewinding_and_writing_again_gives_the_same_bytes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    offsets = []
    for step in range(20):
        lines.append({"step": step, "loss": step / 7})
        offsets.append(lines.offset)
        if step % 3 == 0:
            lines.flush()
    lines.sync()
    whole = path.read_bytes()
    assert offsets[-1] == len(whole)
    lines.close()
    with open(path, "ab") as f:
        f.write(b'{"step": 20, "lo')  # torn by a kill
    lines = JsonLines(path)
    assert lines.offset == len(whole)
    lines.truncate_to(offsets[6])
    assert lines.offset == offsets[6]
    for step in range(7, 20):
        lines.append({"step": step, "loss": step / 7})
    lines.close()
    assert path.read_bytes() == whole


def test_rewinding_forgets_what_was_not_flushed(tmp_path):
    lines = JsonLines(tmp_path / "m")
    lines.append({"a": 1})
    offset = lines.offset
    lines.append({"b": 2})
    lines.truncate_to(offset)
    lines.close()
    assert (tmp_path / "m").read_bytes() == b'{"a":1}\n'


@pytest.mark.parametrize("offset", [-1, 3, 10**9])
def test_a_place_that_is_no_line_is_damage(tmp_path, offset):
    lines = JsonLines(tmp_path / "m")
    lines.append({"a": 1})
    with pytest.raises(DamagedError, match="rewound"):
        lines.truncate_to(offset)
    lines.close()
    assert (tmp_path / "m").read_bytes() == b'{"a":1}\n'


def test_a_full_disk_tears_and_repeats_nothing(tmp_path):
    fs = FullDisk(13)
    lines = JsonLines(tmp_path / "m", fs=fs)
    lines.append({"a": 1})
    lines.append({"a": 2})
    with pytest.raises(OSError):
        lines.flush()
    lines.append({"a": 3})
    fs.room = 10**6
    lines.close()
    assert (tmp_path / "m").read_bytes() == b'{"a":1}\n{"a":2}\n{"a":3}\n'


def test_a_long_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    JsonLines(path).close()
    assert path.read_bytes() == b'{"a": 1}\n'
    path.write_bytes(b"x" * 200_000)
    JsonLines(path).close()
    assert path.read_bytes() == b""


def test_an_unfit_record_leaves_the_file_alone(tmp_path):
    lines = JsonLines(tmp_path / "m")
    with pytest.raises(TypeError):
        lines.append({"a": object()})
    lines.close()
    assert not (tmp_path / "m").exists()


def test_it_is_made_when_there_is_room(tmp_path):
    path = tmp_path / "folder" / "m"
    fs = Making(failures=2)
    lines = JsonLines(path, fs=fs)
    lines.append({"a": 1})
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            lines.sync()
        assert lines.offset == 8
    lines.sync()
    assert path.read_bytes() == b'{"a":1}\n'
    lines.close()


def test_it_grows_while_a_failure_is_reported(tmp_path):
    records = JsonLines(tmp_path / "log.jsonl", fs=FullDisk(0))
    records.append({"step": 1})
    with pytest.raises(OSError) as kept:
        records.flush()
    records.append({"step": 2})  # the error holds no part of the first
    assert kept.value.errno == errno.ENOSPC
