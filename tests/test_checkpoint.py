import contextlib
import errno
import inspect
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref

import numpy as np
import pytest

from legato import storage
from legato.checkpoint import (
    CheckpointStore,
    find_checkpoint,
    load_checkpoint,
    watch_checkpoints,
)
from legato.errors import (
    CheckpointError,
    ConfigError,
    DamagedError,
    LegatoWarning,
    RunDirError,
)
from tests.waiting import until


def state(step):
    """Arrays, host state and data that can be told from any other step's."""
    rng = np.random.default_rng(step)
    arrays = {
        "dense/kernel": rng.normal(size=(17, 5)).astype("f4"),
        "dense/bias": rng.normal(size=5),
        "step": np.array(step, "i8"),
    }
    return (
        arrays,
        {"step": int(step), "loss": int(step) / 7},
        {"it": b"%d" % step},
    )


def save(store, *steps, best=()):
    for step in steps:
        store.save(step, *state(step), best=step in best)
    store.wait()


def assert_is(checkpoint, step):
    arrays, host, data = state(step)
    assert checkpoint is not None and checkpoint.step == step
    assert (checkpoint.host, checkpoint.data) == (host, data)
    assert checkpoint.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        found = checkpoint.arrays[name]
        assert found.dtype == array.dtype and found.shape == array.shape
        assert found.tobytes() == array.tobytes()


class NoSync(storage.FileSystem):
    """No test here cuts the power, and a busy disk makes fsync slow.

    That it is called, and in which order, is tested with `commit_directory`.
    """

    def fsync(self, fd):
        pass


def open_store(path, **kwargs):
    return CheckpointStore(path, **({"run_id": "run", "fs": NoSync()} | kwargs))


def names(path):
    return sorted(os.listdir(path))


class Clock:
    """Goes on only when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Disk(NoSync):
    """Fails while there is an error to raise at a call."""

    def __init__(self):
        self.failing: dict[str, OSError] = {}
        self.gate = threading.Event()
        self.gate.set()

    def _call(self, name):
        self.gate.wait()
        if name in self.failing:
            raise self.failing[name]

    def write(self, fd, data):
        self._call("write")
        return super().write(fd, data)

    def fsync(self, fd):
        self._call("fsync")
        super().fsync(fd)

    def rename(self, source, target):
        self._call("rename")
        super().rename(source, target)

    def mkdir(self, path):
        self._call("mkdir")
        super().mkdir(path)

    def link(self, source, target):
        self._call("link")
        super().link(source, target)

    def remove(self, path):
        self._call("remove")
        super().remove(path)


def full():
    return OSError(errno.ENOSPC, "No space left on device")


# Saving and restoring.


def test_nothing_saved_is_nothing_restored(tmp_path):
    store = open_store(tmp_path)
    assert store.restore() is None
    assert store.steps() == [] and store.best_step() is None
    with pytest.raises(CheckpointError, match="none"):
        store.restore(3)


def test_the_newest_is_restored(tmp_path):
    save(open_store(tmp_path), 100, 200)
    store = open_store(tmp_path)
    assert_is(store.restore(), 200)
    assert_is(store.restore(100), 100)
    assert_is(load_checkpoint(store.path(100)), 100)
    assert names(store.path(200)) == [
        "data",
        "host.json",
        "manifest.json",
        "state.safetensors",
    ]


def test_arrays_may_change_as_soon_as_save_returns(tmp_path):
    disk = Disk()
    store = open_store(tmp_path, fs=disk)
    arrays, host, data = state(1)
    disk.gate.clear()
    store.save(1, arrays, host, data)
    arrays["dense/kernel"][:] = 0
    host["loss"] = 0.0
    disk.gate.set()
    store.close()
    assert_is(store.restore(), 1)


def test_arrays_may_change_their_shapes_between_saves(tmp_path):
    store = open_store(tmp_path, keep_last=None)
    for step in range(1, 8):
        store.save(step, {"x": np.full(step % 3, step)}, {})
    store.wait()
    for step in range(1, 8):
        x = load_checkpoint(store.path(step)).arrays["x"]
        assert x.tolist() == [step] * (step % 3)


def test_steps_are_integers(tmp_path):
    store = open_store(tmp_path, keep_last=None)
    save(store, 99_999_999, 100_000_000, 5, np.int64(1_234_567_890_123))
    (tmp_path / "checkpoints/step_7").mkdir()
    (tmp_path / "checkpoints/step_000000007").mkdir()
    assert store.steps() == [5, 99_999_999, 100_000_000, 1_234_567_890_123]
    assert_is(store.restore(), 1_234_567_890_123)


def test_a_step_may_be_saved_again(tmp_path):
    store = open_store(tmp_path)
    save(store, 1)
    store.save(1, {}, {"final": True})
    store.close()
    assert store.restore().host == {"final": True}
    assert names(tmp_path / "checkpoints") == ["step_00000001"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((-1, {}, {}), ValueError),
        ((1, {}, {"x": np.float32(1)}), TypeError),
        ((1, {}, {"x": (1,)}), TypeError),
        ((1, {}, {}, {"../x": b""}), ValueError),
        ((1, {}, {}, {"a/b": b""}), ValueError),
        ((1, {"x": np.array(["a"])}, {}), CheckpointError),
    ],
)
def test_wrong_arguments_are_told_at_once(tmp_path, arguments, error):
    store = open_store(tmp_path)
    with pytest.raises(error):
        store.save(*arguments)
    save(store, 1)
    assert_is(store.restore(), 1)


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="keep_last"):
        open_store(tmp_path, keep_last=0)
    with pytest.raises(RunDirError):
        open_store(tmp_path / "missing")
    (tmp_path / "checkpoints").symlink_to(tmp_path)
    with pytest.raises(RunDirError, match="symbolic link"):
        open_store(tmp_path)


def test_an_interpreter_that_exits_loses_nothing(tmp_path):
    code = (
        "import sys, numpy as np, pathlib\n"
        "from legato.checkpoint import CheckpointStore\n"
        "s = CheckpointStore(pathlib.Path(sys.argv[1]), run_id='run')\n"
        "s.save(1, {'x': np.ones(5_000_000)}, {})\n"
        "raise RuntimeError('the user code failed')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True
    )
    assert b"the user code failed" in done.stderr and done.returncode == 1
    assert open_store(tmp_path).restore().arrays["x"].sum() == 5_000_000


# Two buffers.


def test_save_waits_only_while_both_buffers_are_busy(tmp_path):
    disk = Disk()
    store = open_store(tmp_path, fs=disk)
    disk.gate.clear()
    store.save(1, *state(1))
    store.save(2, *state(2))
    third = threading.Thread(target=lambda: store.save(3, *state(3)))
    third.start()
    time.sleep(0.1)
    assert third.is_alive()
    disk.gate.set()
    third.join(10)
    store.wait()
    assert store.steps() == [1, 2, 3]
    assert all(store.restore(s).step == s for s in (1, 2, 3))


def test_an_interrupted_save_loses_no_buffer(tmp_path, monkeypatch):
    store = open_store(tmp_path, keep_last=None)
    fill = storage.TensorArena.fill

    def interrupted(self, arrays):
        fill(self, arrays)
        raise KeyboardInterrupt

    for _ in range(3):
        monkeypatch.setattr(storage.TensorArena, "fill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.save(1, *state(1))
        monkeypatch.setattr(storage.TensorArena, "fill", fill)
    save(store, 2, 3, 4)
    assert store.steps() == [2, 3, 4]
    assert_is(store.restore(), 4)


# Errors of the disk.


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir", "link"])
def test_an_error_is_told_once_and_tried_again(tmp_path, call):
    disk, clock = Disk(), Clock()
    store = open_store(tmp_path, fs=disk, clock=clock)
    save(store, 1, best={1})
    disk.failing[call] = full()
    store.save(2, *state(2), best=True)
    until(lambda: store._writer._error)
    with pytest.warns(LegatoWarning, match="No space left") as caught:
        for _ in range(3):
            store.poll()
            clock.now += 10
            until(lambda: not store._writer._running())
    assert len(caught) == 1
    assert_is(load_checkpoint(store.path(1)), 1)
    assert load_checkpoint(tmp_path / "best").step == 1
    disk.failing.clear()
    clock.now += 10
    store.poll()
    store.wait()
    assert_is(store.restore(), 2)
    assert store.best_step() == 2
    assert names(tmp_path) == ["best", "checkpoints", "commits.jsonl"]
    # A new trouble is told again.
    disk.failing["write"] = full()
    store.save(3, *state(3))
    until(lambda: store._writer._error)
    with pytest.warns(LegatoWarning):
        store.poll()
    disk.failing.clear()
    clock.now += 10
    store.wait()


@pytest.mark.parametrize("told", ["poll", "wait"])
def test_an_error_is_told_also_where_the_next_try_succeeds(tmp_path, told):
    disk, clock = Disk(), Clock()
    store = open_store(tmp_path, fs=disk, clock=clock)
    disk.failing["write"] = full()
    store.save(1, *state(1))
    until(lambda: store._writer._error)
    disk.failing.clear()
    clock.now += 10
    store.save(2, *state(2))  # begins it, and nobody has asked before
    until(lambda: store.steps() == [1, 2])
    with pytest.warns(LegatoWarning, match="No space left"):
        getattr(store, told)()
    store.close()  # not again


def test_a_newer_checkpoint_supersedes_those_that_failed(tmp_path):
    disk, clock = Disk(), Clock()
    store = open_store(tmp_path, fs=disk, clock=clock, keep_last=None)
    disk.failing["write"] = full()
    with pytest.warns(LegatoWarning):
        for step in (1, 2, 3, 4, 5):
            store.save(step, *state(step), best=step == 2)
            until(lambda: store._writer._error)
            store.poll()
    disk.failing.clear()
    clock.now += 10
    store.wait()
    # The best is not superseded by one that is not.
    assert store.steps() == [2, 5]
    assert_is(store.restore(), 5)
    assert_is(load_checkpoint(tmp_path / "best"), 2)


def test_when_nothing_can_be_written_for_long_it_is_an_error(tmp_path):
    disk, clock = Disk(), Clock()
    store = open_store(tmp_path, fs=disk, clock=clock, timeout_secs=60)
    save(store, 1)
    clock.now = 1000.0
    disk.failing["fsync"] = full()
    store.save(2, *state(2))
    until(lambda: store._writer._error)
    with pytest.warns(LegatoWarning):
        store.poll()
    clock.now += 59
    store.poll()
    clock.now += 2
    store.poll()  # late, but it might have been suspended: one more try
    clock.now += 6
    for call in (store.poll, store.wait, store.close):
        with pytest.raises(CheckpointError, match=r"67 seconds.*No space"):
            call()
    until(lambda: not store._writer._running())  # it fails once more
    disk.failing.clear()
    clock.now += 6
    with pytest.raises(CheckpointError):
        store.close()
    until(lambda: store.steps() == [1, 2])  # but it is tried to the end


def test_a_disk_that_does_not_answer_is_an_error_too(tmp_path):
    disk, clock = Disk(), Clock()
    store = open_store(tmp_path, fs=disk, clock=clock, timeout_secs=60)
    disk.gate.clear()
    store.save(1, *state(1))
    store.save(2, *state(2))
    clock.now = 61
    store.poll()
    clock.now = 67
    with pytest.raises(CheckpointError, match="does not answer"):
        store.save(3, *state(3))
    thread = store._writer._thread
    disk.gate.set()
    thread.join()
    assert store.steps() == [1, 2]


def test_one_success_starts_the_time_anew(tmp_path):
    disk, clock = Disk(), Clock()
    store = open_store(tmp_path, fs=disk, clock=clock, timeout_secs=60)
    for step in range(1, 6):
        save(store, step)
        clock.now += 50
        store.poll()
    assert_is(store.restore(), 5)


def test_old_checkpoints_that_cannot_be_removed_are_told(tmp_path):
    disk = Disk()
    store = open_store(tmp_path, fs=disk, keep_last=1)
    save(store, 1)
    disk.failing["remove"] = OSError(errno.EACCES, "Permission denied")
    save(store, 2)
    with pytest.warns(LegatoWarning, match="could not be removed"):
        store.poll()
    store.poll()
    assert_is(store.restore(), 2)


# Retention and the best.


def test_retention(tmp_path):
    store = open_store(tmp_path, keep_last=2, keep_every=40)
    save(store, *range(0, 130, 10), best={20})
    assert store.steps() == [0, 40, 80, 110, 120]
    assert store.best_step() == 20
    assert_is(load_checkpoint(tmp_path / "best"), 20)


def test_the_best_is_replaced(tmp_path):
    store = open_store(tmp_path, keep_last=1)
    save(store, 1, 2, 3, 4, best={1, 3})
    assert_is(load_checkpoint(tmp_path / "best"), 3)
    assert load_checkpoint(tmp_path / "best").best
    assert not store.restore().best
    assert names(tmp_path) == ["best", "checkpoints", "commits.jsonl"]


def test_a_damaged_best_is_published_again(tmp_path):
    class NoLinks(NoSync):
        def link(self, source, target):
            raise OSError(errno.EPERM, "Operation not permitted")

    store = open_store(tmp_path, fs=NoLinks())
    save(store, 1, 2, 3, best={2})
    flip(tmp_path / "best/manifest.json", random.Random(0))
    with pytest.raises(DamagedError):
        store.best_step()
    with pytest.warns(LegatoWarning, match="damaged-best-1"):
        assert_is(store.restore(), 3)
    assert_is(load_checkpoint(tmp_path / "best"), 2)


def test_a_reader_never_misses_the_best(tmp_path):
    store = open_store(tmp_path, keep_last=2)
    save(store, 0, best={0})
    seen, failures, done = [], [], threading.Event()

    def read():
        while not done.is_set():
            try:
                seen.append(load_checkpoint(tmp_path / "best").step)
            except CheckpointError as e:
                failures.append(e)

    reader = threading.Thread(target=read)
    reader.start()
    step = 0
    while step < 60 or (len(set(seen)) < 5 and step < 10_000):
        step += 1
        store.save(step, *state(step), best=True)
    store.close()
    done.set()
    reader.join()
    assert not failures and seen == sorted(seen) and len(set(seen)) > 3


# The journal, and rewinding.


def test_a_removed_checkpoint_is_noticed_once(tmp_path):
    store = open_store(tmp_path, keep_last=2)
    save(store, 1, 2, 3)
    storage.remove_directory(store.path(3))
    store = open_store(tmp_path)
    with pytest.warns(LegatoWarning, match="step 3 was committed and is gone"):
        assert_is(store.restore(), 2)
    assert_is(open_store(tmp_path).restore(), 2)
    save(store, 3, 4)
    storage.remove_directory(store.path(4))
    with pytest.warns(LegatoWarning, match="step 4"):
        assert_is(open_store(tmp_path).restore(), 3)


def test_all_checkpoints_removed_is_noticed(tmp_path):
    store = open_store(tmp_path)
    save(store, 1)
    storage.remove_directory(store.path(1))
    with pytest.warns(LegatoWarning, match="from the beginning"):
        assert store.restore() is None
    assert store.restore() is None


def test_the_journal_says_what_was_committed(tmp_path):
    store = open_store(tmp_path, keep_last=1)
    save(store, 1, 2)
    lines = (tmp_path / "commits.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    sha256 = store.restore().sha256
    assert json.loads(lines[1])["manifest_sha256"] == sha256


def test_a_torn_journal_is_mended(tmp_path):
    store = open_store(tmp_path)
    save(store, 1)
    with open(tmp_path / "commits.jsonl", "ab") as f:
        f.write(b'{"step": 9, "manif')
    assert_is(store.restore(), 1)
    save(store, 2)
    assert_is(store.restore(), 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(b"\x80\n"),
        lambda p: p.write_bytes(b"{}\n"),
        lambda p: p.write_bytes(b"[" * 10**6),
        lambda p: (p.unlink(), p.symlink_to("/dev/zero")),
        lambda p: (p.unlink(), os.mkfifo(p)),
        lambda p: (p.unlink(), p.mkdir()),
    ],
)
def test_a_damaged_journal_is_set_aside(tmp_path, damage):
    store = open_store(tmp_path)
    save(store, 1)
    damage(tmp_path / "commits.jsonl")
    with pytest.warns(LegatoWarning, match="damaged-commits.jsonl-1"):
        assert_is(store.restore(), 1)
    save(store, 2)
    assert_is(store.restore(), 2)


def test_rewinding_sets_the_later_ones_aside(tmp_path):
    store = open_store(tmp_path, keep_last=None)
    save(store, 1, 2, 3, 4, 5, best={1, 4})
    with pytest.raises(CheckpointError, match="1, 2, 3, 4, 5"):
        store.rewind(7)
    store.rewind(3)
    assert store.steps() == [1, 2, 3]
    assert {"aside-step_00000004-1", "aside-step_00000005-1"} <= set(
        names(tmp_path / "checkpoints")
    )
    assert "aside-best-1" in names(tmp_path)
    assert_is(load_checkpoint(tmp_path / "best"), 1)
    assert_is(open_store(tmp_path).restore(), 3)  # and nothing is missed
    save(store, 4)
    store.rewind(3)
    assert "aside-step_00000004-2" in names(tmp_path / "checkpoints")


# Damage.


def flip(path, rng):
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data) * 8)
    data[at // 8] ^= 1 << at % 8
    replace(path, bytes(data))


def replace(path, data):
    path.unlink()  # a hard link may share it
    path.write_bytes(data)


def truncate(path, rng):
    data = path.read_bytes()
    replace(path, data[: rng.randrange(len(data))])


def zero(path, rng):
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    count = min(rng.randint(1, 4096), len(data) - at)
    if not any(data[at : at + count]):
        data[-1] ^= 255
    data[at : at + count] = bytes(count)
    replace(path, bytes(data))


def append(path, rng):
    replace(path, path.read_bytes() + rng.randbytes(rng.randint(1, 9)))


def link(path, rng):
    """A symbolic link to the very same bytes."""
    other = path.parents[-1] / f"{path}.{rng.random()}"
    os.rename(path, other)
    path.symlink_to(other)


def delete(path, rng):
    path.unlink()


def bomb(path, rng):
    pickled = b"cos\nsystem\n(S'touch /tmp/pwned'\ntR."
    terabytes = (2**40).to_bytes(8, "little") + b'{"x":{"dtype":"F64"'
    replace(
        path,
        rng.choice([b"[" * 10**5, pickled, terabytes, b"", b"\x80\x04."]),
    )


def other_step(path, rng):
    """The same file of the checkpoint before."""
    older = path.parents[1 + ("data/" in str(path))] / "step_00000001"
    relative = path.relative_to(older.with_name("step_00000002"))
    replace(path, (older / relative).read_bytes())


FILES = ["state.safetensors", "host.json", "data/it", "manifest.json"]
KINDS = [flip, truncate, zero, append, link, delete, bomb, other_step]


@pytest.mark.parametrize("kind", KINDS)
def test_any_damage_is_found_and_the_one_before_used(tmp_path, kind):
    rng = random.Random(kind.__name__)
    rounds = 20 if kind in (flip, truncate, zero) else 4
    run = tmp_path / "run"
    run.mkdir()
    store = open_store(run)
    save(store, 1, 2)
    for file in FILES:
        for _ in range(rounds):
            kind(store.path(2) / file, rng)
            with pytest.raises(DamagedError, match="step_00000002"):
                load_checkpoint(store.path(2))
            with pytest.warns(LegatoWarning, match="step 2 is damaged"):
                assert_is(store.restore(), 1)
            assert store.steps() == [1]
            assert_is(store.restore(), 1)
            save(store, 2)
            assert_is(store.restore(), 2)


def test_whole_checkpoints_in_wrong_places_are_damage(tmp_path):
    store = open_store(tmp_path, keep_last=None)
    save(store, 1, 2, 3)
    a, b, c = (store.path(s) for s in (1, 2, 3))
    os.rename(c, tmp_path / "c")
    os.rename(b, c)
    os.rename(tmp_path / "c", b)
    with pytest.raises(DamagedError, match="of step 2"):
        load_checkpoint(c)
    with pytest.warns(LegatoWarning) as caught:
        assert_is(store.restore(), 1)
    assert len(caught) == 2
    b.symlink_to(a)
    with pytest.warns(LegatoWarning):
        assert_is(store.restore(), 1)


def test_another_runs_checkpoint_is_not_used(tmp_path):
    theirs = tmp_path / "theirs"
    ours = tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    other = open_store(theirs, run_id="another")
    save(other, 9)
    store = open_store(ours)
    save(store, 1)
    os.rename(other.path(9), store.path(9))
    with pytest.warns(LegatoWarning, match="another run"):
        assert_is(store.restore(), 1)


def test_when_none_is_intact_none_is_touched(tmp_path):
    store = open_store(tmp_path)
    save(store, 1, 2)
    for step in (1, 2):
        delete(store.path(step) / "host.json", None)
    for _ in range(2):  # running it again does not begin from step 0
        with pytest.raises(CheckpointError, match=r"(?s)none.*host.json"):
            store.restore()
    assert store.steps() == [1, 2]


def test_a_given_step_that_is_damaged_names_the_others(tmp_path):
    store = open_store(tmp_path)
    save(store, 1, 2)
    delete(store.path(2) / "host.json", None)
    with pytest.raises(CheckpointError, match=r"host\.json.*steps: 1"):
        store.restore(2)
    assert store.steps() == [1, 2]


def test_a_passing_trouble_sets_nothing_aside(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    save(store, 1, 2)

    def too_many(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "readv", too_many)
    with pytest.raises(CheckpointError, match="Too many"):
        store.restore()
    assert store.steps() == [1, 2]


# Kills.

LOOP = """
import sys, numpy as np, pathlib, warnings
from legato.checkpoint import CheckpointStore
from tests_state import NoSync, state
warnings.simplefilter("error")
run = pathlib.Path(sys.argv[1])
s = CheckpointStore(run, run_id="run", keep_last=2, fs=NoSync())
c = s.restore()
step = c.step if c else 0
while True:
    step += 1
    s.save(step, *state(step), best=step % 3 == 0)
    s.poll()
    if step % 5 == 0:
        s.wait()
        print(step, flush=True)
"""


def write_module(path):
    """Parts of this file, importable by a subprocess."""
    parts = [inspect.getsource(part) for part in (state, NoSync)]
    text = "\n".join(
        ["import numpy as np", "from legato import storage", *parts]
    )
    (path / "tests_state.py").write_text(text)
    before = os.environ.get("PYTHONPATH", "")
    return os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{before}"}


def test_kills_at_random_instants_lose_nothing(tmp_path):
    rng = random.Random(0)
    env = write_module(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    newest = 0
    for _ in range(20):
        child = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(run)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
        )
        assert child.stdout is not None and child.stderr is not None
        child.stdout.readline()
        time.sleep(rng.random() * 0.03)
        child.kill()
        out, errors = child.communicate()
        assert not errors, errors
        reported = max([newest, *map(int, out.split())])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is set aside, or missed
            store = open_store(run, keep_last=2)
            restored = store.restore()
        assert restored is not None and restored.step >= reported
        assert_is(restored, restored.step)
        assert_is(load_checkpoint(run / "best"), store.best_step())
        assert store.best_step() == restored.step // 3 * 3
        newest = restored.step
    assert newest >= 100  # 20 lives of 5 steps or more


ENUMERATE = """
import os, sys, pathlib, shutil, warnings
from legato import storage
from legato.checkpoint import CheckpointStore
from tests_state import NoSync, state

class Dying(NoSync):
    left = 10**9

def dying(name):
    call = getattr(NoSync, name)
    def die_or_call(self, *args):
        if self.left == 0:
            os._exit(9)
        self.left -= 1
        return call(self, *args)
    return die_or_call

for name in ("open", "write", "fsync", "truncate", "mkdir", "rename", "link",
             "remove"):
    setattr(Dying, name, dying(name))

base = pathlib.Path(sys.argv[1])
for n in range(10**6):
    run = base / str(n)
    run.mkdir()
    pid = os.fork()
    if pid == 0:
        fs = Dying()
        s = CheckpointStore(run, run_id="run", keep_last=1, fs=fs)
        for step in (1, 2, 3):
            s.save(step, *state(step), best=True)
            s.wait()
            if step == 2:
                fs.left = n
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        print(n)
        break
"""


def test_a_kill_between_any_two_calls_is_repaired(tmp_path):
    env = write_module(tmp_path)
    runs = tmp_path / "runs"
    runs.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ENUMERATE, str(runs)],
        capture_output=True,
        env=env,
        check=True,
    )
    calls = int(done.stdout)
    assert calls > 30
    seen = set()
    for n in range(calls + 1):
        run = runs / str(n)
        store = open_store(run, keep_last=1)
        restored = store.restore()
        assert restored is not None
        assert_is(restored, restored.step)
        # Whatever happened, best/ is what the run at this step had.
        assert_is(load_checkpoint(run / "best"), restored.step)
        assert names(run) == ["best", "checkpoints", "commits.jsonl"]
        assert all(x.startswith("step_") for x in names(run / "checkpoints"))
        save(store, 4)
        assert_is(store.restore(), 4)
        seen.add(restored.step)
    assert seen == {2, 3}


@contextlib.contextmanager
def interrupted():
    try:
        yield
    except KeyboardInterrupt:
        pass
    except RuntimeError as error:
        # Where `Condition.wait` has just let go of its lock, Python's own
        # `with` cannot let go of it any more, and says so instead.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise


def test_ctrl_c_at_random_instants_harms_nothing(tmp_path):
    """KeyboardInterrupt anywhere in save, poll or wait; then on it goes."""
    store = open_store(tmp_path, keep_last=2)
    rng = random.Random(0)
    step = 0
    main = threading.main_thread().ident
    assert main is not None
    for _ in range(60):
        timer = threading.Timer(
            rng.random() * 0.01, signal.pthread_kill, (main, signal.SIGINT)
        )
        # The interrupt may come where Python must ignore it: in a destructor.
        late = time.monotonic() + 1
        with interrupted():
            timer.start()
            while time.monotonic() < late:
                step += 1
                store.save(step, *state(step))
                store.poll()
                if step % 4 == 0:
                    store.wait()
            timer.join()  # of which a busy machine may make more than that
        timer.join()
    step += 1
    save(store, step)
    assert_is(store.restore(), step)


# Reading beside a writer.


def begin_run(path, run_id="run", **kwargs):
    path.mkdir(exist_ok=True)
    record = json.dumps({"run_id": run_id, "legato": "0.1.0"})
    (path / "run.json").write_text(record)
    return open_store(path, run_id=run_id, keep_last=None, **kwargs)


def save_final(store, step, mark=0.0):
    store.save_final(step, {"x": np.full(3, mark)})


def spoil(path):
    delete(path / "host.json", None)


def snapshot(path):
    """Every name under a directory, and when it was last changed."""
    return {
        str(each.relative_to(path)): each.lstat().st_mtime_ns
        for each in [path, *path.rglob("*")]
    }


def test_the_latest_is_what_the_run_ended_with(tmp_path):
    store = begin_run(tmp_path)
    save(store, 1, 2)
    for which in (None, "latest"):
        assert_is(find_checkpoint(tmp_path, which), 2)
    save_final(store, 2, 0.5)
    found = find_checkpoint(tmp_path)
    assert (found.step, found.path) == (2, tmp_path / "final")
    assert found.arrays["x"].tolist() == [0.5] * 3
    save(store, 3)  # the run was made longer
    assert_is(find_checkpoint(str(tmp_path)), 3)
    for step in store.steps():  # only final/ was kept
        storage.remove_directory(store.path(step))
    assert find_checkpoint(tmp_path).path == tmp_path / "final"


def test_what_a_run_ends_with_takes_no_second_buffer(tmp_path, monkeypatch):
    made, at_once = [], []
    original = storage.TensorArena

    def counted(layout):
        at_once.append(sum(arena() is not None for arena in made))
        arena = original(layout)
        made.append(weakref.ref(arena))
        return arena

    monkeypatch.setattr(storage, "TensorArena", counted)
    store = begin_run(tmp_path)
    save(store, 1, 2)
    store.wait()
    save_final(store, 2)  # fewer arrays than a checkpoint's
    assert at_once[-1] == 0, at_once


def test_a_step_is_found_also_where_only_the_best_holds_it(tmp_path):
    store = begin_run(tmp_path)
    save(store, 1, 2, 3, best={2})
    assert_is(find_checkpoint(tmp_path, 1), 1)
    assert_is(find_checkpoint(tmp_path, np.int64(2)), 2)
    storage.remove_directory(store.path(2))
    found = find_checkpoint(tmp_path, 2)
    assert_is(found, 2)
    assert found.path == tmp_path / "best"


def test_the_best_is_found_also_where_a_kill_kept_it_from_its_place(tmp_path):
    store = begin_run(tmp_path)
    save(store, 1, 2, 3, best={1})
    assert_is(find_checkpoint(tmp_path, "best"), 1)
    os.rename(tmp_path / "best", tmp_path / "older")
    save(store, 4, 5, best={4})
    storage.remove_directory(tmp_path / "best")
    os.rename(tmp_path / "older", tmp_path / "best")
    before = snapshot(tmp_path)
    assert_is(find_checkpoint(tmp_path, "best"), 4)
    assert snapshot(tmp_path) == before
    spoil(store.path(4))
    assert_is(find_checkpoint(tmp_path, "best"), 1)


@pytest.mark.parametrize(
    ("place", "step"),
    [("checkpoints/step_00000002", 2), ("best", 1), ("final", 2)],
)
def test_a_checkpoint_is_found_by_its_own_directory(
    tmp_path, monkeypatch, place, step
):
    store = begin_run(tmp_path)
    save(store, 1, 2, best={1})
    save_final(store, 2)
    path = tmp_path / place
    assert find_checkpoint(path).step == step
    assert find_checkpoint(f"{path}/").path == path
    monkeypatch.chdir(path)
    assert find_checkpoint(".").path == path
    with pytest.raises(ConfigError, match="own directory"):
        find_checkpoint(path, "latest")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(CheckpointError, match="symbolic link"):
        find_checkpoint(tmp_path / "link")
    spoil(path)
    with pytest.raises(CheckpointError, match=r"host\.json: missing.*1"):
        find_checkpoint(path)


def test_what_was_copied_or_set_aside_is_found_by_its_directory(tmp_path):
    store = begin_run(tmp_path / "run")
    save(store, 1, 2)
    store.rewind(1)
    aside = tmp_path / "run/checkpoints/aside-step_00000002-1"
    assert_is(find_checkpoint(aside), 2)
    os.rename(store.path(1), tmp_path / "mine")
    assert_is(find_checkpoint(tmp_path / "mine"), 1)


def test_finding_takes_no_lock_and_changes_nothing(tmp_path):
    store = begin_run(tmp_path)
    save(store, 1, 2, 3, best={1})
    spoil(store.path(3))
    with storage.RunLock(tmp_path):
        before = snapshot(tmp_path)
        with pytest.warns(LegatoWarning, match="host.json: missing.*step 2 is"):
            assert_is(find_checkpoint(tmp_path), 2)
        assert_is(find_checkpoint(tmp_path, "best"), 1)
        with pytest.raises(CheckpointError):
            find_checkpoint(tmp_path, 3)
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("which", "error", "expected"),
    [
        (7, CheckpointError, "no checkpoint of step 7. There are checkpoints "),
        (7, CheckpointError, "of the steps: 1, 2, 3; the best is of step 1."),
        (3, CheckpointError, "step_00000003/host.json: missing. There are "),
        (-1, ConfigError, 'which=-1: it must be "latest", "best" or the'),
        ("newest", ConfigError, "which='newest': it must be"),
        ("final", ConfigError, "which='final': it must be"),
        ("2", ConfigError, "which='2': it must be"),
        (2.0, ConfigError, "which=2.0: it must be"),
        (True, ConfigError, "which=True: it must be"),
    ],
)
def test_what_is_not_found_is_named_with_what_there_is(
    tmp_path, which, error, expected
):
    store = begin_run(tmp_path)
    save(store, 1, 2, 3, best={1})
    spoil(store.path(3))
    with pytest.raises(error) as caught:
        find_checkpoint(tmp_path, which)
    assert expected in str(caught.value)
    if error is CheckpointError:
        assert str(tmp_path) in str(caught.value)


def test_a_run_without_checkpoints(tmp_path):
    store = begin_run(tmp_path)
    for which in (None, "latest", "best", 1):
        with pytest.raises(CheckpointError, match="no checkpoint yet: train"):
            find_checkpoint(tmp_path, which)
    save(store, *range(30))
    with pytest.raises(CheckpointError, match=r"no best.*best_metric"):
        find_checkpoint(tmp_path, "best")
    with pytest.raises(CheckpointError, match="30 of them, the newest 10, 11,"):
        find_checkpoint(tmp_path, 99)


@pytest.mark.parametrize("place", ["best", "checkpoints/step_00000005"])
def test_a_checkpoints_directory_that_is_not_there(tmp_path, place):
    save(begin_run(tmp_path), 1)
    with pytest.raises(CheckpointError, match=r"steps: 1\."):
        find_checkpoint(tmp_path / place)


def test_none_intact_names_each(tmp_path):
    store = begin_run(tmp_path)
    save(store, 1, 2)
    spoil(store.path(1))
    spoil(store.path(2))
    with pytest.raises(
        CheckpointError, match=r"(?s)none.*intact.*_00000002.*_00000001"
    ):
        find_checkpoint(tmp_path)
    save_final(store, 2)
    assert find_checkpoint(tmp_path).path == tmp_path / "final"


def test_a_damaged_final_or_best_is_told(tmp_path):
    store = begin_run(tmp_path)
    save(store, 1, 2, best={1})
    save_final(store, 2)
    flip(tmp_path / "final/state.safetensors", random.Random(0))
    with pytest.warns(LegatoWarning, match="final.*It is left out"):
        assert_is(find_checkpoint(tmp_path), 2)
    flip(tmp_path / "best/manifest.json", random.Random(0))
    with pytest.raises(CheckpointError, match=r"best/manifest\.json.*1, 2"):
        find_checkpoint(tmp_path, "best")


@pytest.mark.parametrize("name", ["", "empty", "file", "gone", "link"])
def test_no_run_and_no_checkpoint(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(RunDirError) as caught:
        find_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "Give" in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.unlink(),
        lambda p: (p.unlink(), os.mkfifo(p)),
        lambda p: (p.unlink(), p.mkdir()),
        lambda p: (p.rename(f"{p}.x"), p.symlink_to(f"{p}.x")),
        lambda p: p.write_bytes(b"[" * 10**7),
        lambda p: p.write_bytes(b"{}"),
        lambda p: p.write_bytes(b'{"run_id": 5}'),
        lambda p: p.write_bytes(b"\x80"),
    ],
)
def test_a_hostile_run_json_is_refused(tmp_path, damage):
    save(begin_run(tmp_path), 1)
    damage(tmp_path / "run.json")
    with pytest.raises(RunDirError, match=r"run\.json is not that of a run"):
        find_checkpoint(tmp_path)


def test_what_lies_outside_of_the_run_is_not_read(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    store, other = begin_run(ours), begin_run(theirs, "another")
    save(store, 1)
    save(other, 2, best={2})
    save_final(other, 2)
    for name in ("final", "best"):
        (ours / name).symlink_to(theirs / name)
    store.path(3).symlink_to(other.path(2))
    os.rename(other.path(2), store.path(2))
    with pytest.warns(LegatoWarning) as caught:
        assert_is(find_checkpoint(ours), 1)
    said = " ".join(str(each.message) for each in caught)
    for part in ("final", "step_00000003", "another run"):
        assert part in said
    with pytest.raises(CheckpointError):
        find_checkpoint(ours, "best")
    with pytest.raises(CheckpointError, match="another run"):
        find_checkpoint(ours, 2)
    os.rename(ours / "checkpoints", ours / "elsewhere")
    (ours / "checkpoints").symlink_to(ours / "elsewhere")
    with pytest.raises(RunDirError, match="symbolic link"):
        find_checkpoint(ours)


def test_a_passing_trouble_is_no_damage_to_a_reader(tmp_path, monkeypatch):
    save(begin_run(tmp_path), 1, 2)

    def too_many(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "readv", too_many)
    with pytest.raises(CheckpointError, match="Too many open files"):
        find_checkpoint(tmp_path)


def vanishing(monkeypatch, store, *steps):
    """These go when they are about to be read, as by retention."""
    gone = set(steps)
    read = storage.read_directory

    def read_or_lose(place):
        for step in list(gone):
            if place == store.path(step):
                gone.discard(step)
                storage.remove_directory(place)
        return read(place)

    monkeypatch.setattr(storage, "read_directory", read_or_lose)


def test_a_checkpoint_that_goes_while_it_is_read(tmp_path, monkeypatch):
    store = begin_run(tmp_path)
    save(store, 1, 2, 3)
    vanishing(monkeypatch, store, 3)
    assert_is(find_checkpoint(tmp_path), 2)  # without a warning
    save(store, 3)
    vanishing(monkeypatch, store, 3)
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        find_checkpoint(tmp_path, 3)


def test_all_that_were_listed_go_and_others_have_come(tmp_path, monkeypatch):
    store = begin_run(tmp_path)
    save(store, 1)
    read = storage.read_directory

    def go_on(place):
        if place == store.path(1) and place.exists():
            save(store, 2)
            storage.remove_directory(place)
        return read(place)

    monkeypatch.setattr(storage, "read_directory", go_on)
    assert_is(find_checkpoint(tmp_path), 2)


def test_a_reader_finds_the_latest_and_the_best_at_any_instant(tmp_path):
    begin_run(tmp_path)
    store = open_store(tmp_path, keep_last=1)
    save(store, 0, best={0})
    seen, failures, done = [], [], threading.Event()

    def read():
        while not done.is_set():
            try:
                latest = find_checkpoint(tmp_path)
                assert_is(latest, latest.step)
                seen.append(latest.step)
                best = find_checkpoint(tmp_path, "best")
                assert_is(best, best.step)
            except BaseException as e:
                failures.append(e)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = threading.Thread(target=read)
        reader.start()
        step = 0
        while step < 80 or (len(set(seen)) < 5 and step < 10_000):
            step += 1
            store.save(step, *state(step), best=step % 3 == 0)
        store.close()
        done.set()
        reader.join()
    assert not failures and seen == sorted(seen) and len(set(seen)) > 3


class Watch:
    """What `watch_checkpoints` yields; time goes on only while it waits."""

    def __init__(self, run_dir, **kwargs):
        self.now, self.stop, self.waiting = 0.0, False, lambda now: None
        self.watched = watch_checkpoints(
            run_dir,
            stop_requested=lambda: self.stop,
            clock=lambda: self.now,
            sleep=self._sleep,
            **kwargs,
        )

    def _sleep(self, seconds):
        assert 0 < seconds <= 1
        self.now += seconds
        self.waiting(self.now)

    def take(self, count):
        return [next(self.watched) for _ in range(count)]

    def rest(self):
        return [(each.step, each.path.name) for each in self.watched]


def test_each_checkpoint_is_watched_once_until_the_run_has_ended(tmp_path):
    store = begin_run(tmp_path)
    save(store, 1, 2)
    watch = Watch(tmp_path)
    for found, step in zip(watch.take(2), (1, 2), strict=True):
        assert_is(found, step)

    def go_on(now):
        if store.steps() == [1, 2] and now > 100:
            save(store, 3, 4)
        if store.steps() == [1, 2, 3, 4] and now > 200:
            save_final(store, 4)

    watch.waiting = go_on
    assert watch.rest() == [
        (3, "step_00000003"),
        (4, "step_00000004"),
        (4, "final"),
    ]
    assert watch.now > 200


def test_a_final_that_the_run_went_on_from_is_no_end(tmp_path):
    store = begin_run(tmp_path)
    save(store, 1)
    save_final(store, 1)
    save(store, 2)
    watch = Watch(tmp_path, timeout_secs=50)
    assert watch.rest() == [(1, "step_00000001"), (2, "step_00000002")]


def test_watching_begins_before_the_run_and_ends_after_the_timeout(tmp_path):
    watch = Watch(tmp_path / "run", timeout_secs=50)

    def begin(now):
        if now > 40 and not (tmp_path / "run").exists():
            save(begin_run(tmp_path / "run"), 1)

    watch.waiting = begin
    assert watch.rest() == [(1, "step_00000001")]
    assert 90 < watch.now < 93
    watch = Watch(tmp_path / "none", timeout_secs=50)
    assert watch.rest() == [] and watch.now == pytest.approx(50)
    watch = Watch(tmp_path / "run", timeout_secs=0)
    assert watch.rest() == [(1, "step_00000001")] and watch.now == 0


def test_watching_ends_when_asked(tmp_path):
    store = begin_run(tmp_path)
    save(store, 1, 2)
    watch = Watch(tmp_path)
    watch.take(1)
    watch.stop = True
    assert watch.rest() == []
    watch = Watch(tmp_path)
    watch.take(2)
    watch.waiting = lambda now: setattr(watch, "stop", now > 3)
    assert watch.rest() == [] and 3 < watch.now < 3.2


def test_what_cannot_be_read_is_not_watched(tmp_path, monkeypatch):
    store = begin_run(tmp_path)
    save(store, 1, 2, 3, 4)
    spoil(store.path(2))
    vanishing(monkeypatch, store, 3)
    watch = Watch(tmp_path, timeout_secs=20)
    with pytest.warns(LegatoWarning, match="step_00000002.*left out") as caught:
        assert [each.step for each in watch.take(2)] == [1, 4]

        def write_anew(now):
            if now > 10 and not (store.path(2) / "host.json").exists():
                storage.remove_directory(store.path(2))
                save(store, 2)

        watch.waiting = write_anew
        assert watch.rest() == [(2, "step_00000002")]
    assert len(caught) == 1


def test_a_run_that_is_begun_anew_is_watched_from_its_beginning(tmp_path):
    run = tmp_path / "run"
    save(begin_run(run), 1, 2)
    watch = Watch(run, timeout_secs=20)
    watch.take(2)
    os.rename(run, tmp_path / "old")
    save(begin_run(run, "another"), 1)
    assert watch.rest() == [(1, "step_00000001")]


def test_the_best_of_a_history_that_was_left_gives_way(tmp_path):
    store = open_store(tmp_path)
    save(store, 60, 95, best=(60, 95))
    store.rewind(60, keep_best=True)
    assert store.best_step() == 95
    save(store, 80)
    store = open_store(tmp_path)
    assert store.restore().step == 80
    # Killed between the commit of another best and its publication.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "copy_directory", lambda *_, **__: None)
        save(store, 90, best=(90,))
    store = open_store(tmp_path)
    assert store.restore().step == 90
    assert store.best_step() == 90
