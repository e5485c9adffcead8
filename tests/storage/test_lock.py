import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from legato.errors import RunDirError
from legato.storage import RunLock

HOLD = """
import os, sys, time
from pathlib import Path
from legato.storage import RunLock
lock = RunLock(Path(sys.argv[1]))
if sys.argv[2] == "orphan" and os.fork() == 0:
    os.close(1)
    time.sleep(300)
    os._exit(0)
print("held", flush=True)
time.sleep(300)
"""


def hold(path, how="plain"):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), how],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    return child


def end_session(child):
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()


def test_a_lock_is_given_up_and_taken_again(tmp_path):
    with RunLock(tmp_path):
        pass
    lock = RunLock(tmp_path)
    lock.release()
    lock.release()
    RunLock(tmp_path).release()


def test_the_same_process_cannot_take_it_twice(tmp_path):
    with RunLock(tmp_path), pytest.raises(RunDirError):
        RunLock(tmp_path)


def test_another_process_is_named_and_a_killed_one_is_no_obstacle(tmp_path):
    child = hold(tmp_path)
    try:
        with pytest.raises(RunDirError) as caught:
            RunLock(tmp_path)
        message = str(caught.value)
        assert str(tmp_path) in message
        assert f"process {child.pid} on {socket.gethostname()}" in message
        assert "run_dir" in message
    finally:
        end_session(child)
    with RunLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_a_forked_child_that_outlives_it_is_no_obstacle(tmp_path):
    child = hold(tmp_path, "orphan")
    try:
        child.kill()  # only the parent: the forked child lives on
        child.wait()
        deadline = time.monotonic() + 60  # long before the orphan ends
        while True:
            try:
                RunLock(tmp_path).release()
                break
            except RunDirError:
                assert time.monotonic() < deadline, "the orphan holds it"
                time.sleep(0.05)
    finally:
        end_session(child)


@pytest.mark.parametrize(
    "text", [b"", b"\x1b[31mevil\n", b'{"pid": 1}\n', b"\xff" * 5000]
)
def test_what_the_file_says_is_not_believed(tmp_path, text):
    with RunLock(tmp_path):
        (tmp_path / "lock").write_bytes(text)
        with pytest.raises(RunDirError) as caught:
            RunLock(tmp_path)
        assert "another process is training here." in str(caught.value)


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunDirError, match="cannot be locked"):
        RunLock(tmp_path / "file")
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirError):
        RunLock(tmp_path)
    assert not (tmp_path / "elsewhere").exists()
