"""Worker processes: the same batches, every kind of death, nothing left."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from legato.errors import ConfigError, WorkerError
from legato.workers import Job, Pad
from legato.workers.processes import Processes
from legato.workers.recipe import Rows, digest, leaves
from legato.workers.sharing import SharedFile, anonymous_file
from legato.workers.threads import Threads
from tests.processes import is_alive
from tests.waiting import until
from tests.workers import datasets

ROOT = Path(__file__).parents[2]


def job(batch, *indices):
    return Job(5, 0, batch, np.array(indices, np.int64))


@contextlib.contextmanager
def running(kind, recipe, count=1, prefetch=2, timeout=60.0):
    workers = kind(recipe, count, prefetch, timeout)
    try:
        yield workers
    finally:
        workers.close()


def here(recipe, *jobs):
    return [digest(recipe.make(each, alone=True)) for each in jobs]


JOBS = [job(i, *range(3 * i, 3 * i + 3)) for i in range(7)]


@pytest.mark.parametrize("count, prefetch", [(1, 1), (1, 3), (3, 2)])
def test_batches_come_in_order_and_are_those_made_here(count, prefetch):
    recipe = datasets.recipe(datasets.Draws(), datasets.augment)
    expected = here(recipe, *JOBS)
    with running(Processes, recipe, count, prefetch) as workers:
        todo, found = list(JOBS), []
        while len(found) < len(JOBS):
            while todo and workers.room():
                workers.begin(todo.pop(0))
            found.append(digest(workers.take()))
    assert found == expected and len(set(found)) == len(JOBS)


def test_what_a_worker_imports_while_it_draws_is_seeded_too():
    recipe = datasets.recipe(datasets.DrawsFromTorch())
    with running(Processes, recipe) as workers:
        for each in JOBS[:2]:
            workers.begin(each)
        found = [digest(workers.take()) for _ in range(2)]
    assert found == here(recipe, *JOBS[:2])


@pytest.mark.parametrize("kind", [Threads, Processes])
def test_what_was_dropped_does_not_come(kind):
    recipe = datasets.recipe(datasets.Numbers())
    with running(kind, recipe, count=2) as workers:
        for _ in range(20):
            for each in JOBS[:3]:
                workers.begin(each)
            workers.drop()
        workers.begin(JOBS[5])
        assert workers.take()["y"].tolist() == [15, 16, 17]
        workers.drop()
        deadline = time.monotonic() + 10
        while not workers.room() and time.monotonic() < deadline:
            workers.begin(JOBS[0])
            workers.take()
        assert workers.room() >= 3


@pytest.mark.parametrize(
    "how, words",
    [
        ("raises", ["OSError: the file is not there", "example 7", "_raise"]),
        ("is killed", ["killed by SIGKILL", "examples 6, 7, 8"]),
        ("segfaults", ["ended by SIGSEGV", "_segfault"]),
        ("exits", ["exit status 3", "batch 2 of epoch 0"]),
        ("hangs", ["hangs", "0.5 seconds", "_hang"]),
        ("hangs in C", ["hangs", "_hang_in_c"]),
        ("has another shape", ["example 7 has the shape (2,) at x"]),
    ],
)
def test_a_worker_that_fails_is_named_in_its_turn(how, words):
    recipe = datasets.recipe(datasets.Bad(how))
    with running(Processes, recipe, count=2) as workers:
        for each in JOBS[:4]:
            workers.begin(each)
        assert workers.take()["y"].tolist() == [0, 1, 2]
        assert workers.take()["y"].tolist() == [3, 4, 5]
        if how.startswith("hangs"):  # (What comes may be late.)
            workers._timeout = 0.5
        with pytest.raises(WorkerError) as caught:
            workers.take()
        for word in ["the dataset", "batch 2 of epoch 0", *words]:
            assert word in str(caught.value), str(caught.value)
        assert workers.broken != how.startswith(("raises", "has"))
        if not workers.broken:
            assert workers.take()["y"].tolist() == [9, 10, 11]


@pytest.mark.parametrize(
    "how, words",
    [
        ("raises", ["OSError: the file is not there", "example 7"]),
        ("hangs", ["0.3 seconds", "in _hang"]),
    ],
)
def test_a_thread_that_fails_is_named(how, words):
    recipe = datasets.recipe(datasets.Bad(how))
    with running(Threads, recipe, count=2) as workers:
        for each in JOBS[:3]:
            workers.begin(each)
        workers.take(), workers.take()
        if how == "hangs":
            workers._timeout = 0.3
        with pytest.raises(WorkerError) as caught:
            workers.take()
        for word in ["the dataset", "batch 2 of epoch 0", *words]:
            assert word in str(caught.value)


class Tells(datasets.Numbers):
    """Tells that it hangs."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def __getitem__(self, index):
        self.told.touch()
        time.sleep(1000)


def test_where_it_hangs_is_told_also_by_one_that_gets_little_time(tmp_path):
    told = tmp_path / "told"
    with running(Processes, datasets.recipe(Tells(told))) as workers:
        workers.begin(JOBS[0])
        until(told.exists)
        workers._timeout = 0.1
        pid = workers._workers[0].process.pid
        os.kill(pid, signal.SIGSTOP)
        timer = threading.Timer(0.7, os.kill, (pid, signal.SIGCONT))
        timer.start()
        with pytest.raises(WorkerError, match=r"(?s)hangs.*in __getitem__"):
            workers.take()
        timer.join()


def test_one_that_was_killed_while_it_was_idle_is_named():
    recipe = datasets.recipe(datasets.Numbers())
    with running(Processes, recipe) as workers:
        workers.begin(JOBS[0])
        workers.take()
        os.kill(workers._workers[0].process.pid, signal.SIGTERM)
        workers._workers[0].process.wait()
        workers.begin(JOBS[1])
        with pytest.raises(WorkerError, match="ended by SIGTERM"):
            workers.take()
        workers.begin(JOBS[2])
        with pytest.raises(WorkerError, match="ended by SIGTERM"):
            workers.take()


class CannotBeSent(datasets.Numbers):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def test_what_cannot_be_pickled_is_refused_with_a_remedy():
    dataset = CannotBeSent()
    with pytest.raises(ConfigError) as caught:
        Processes(datasets.recipe(dataset), 1, 1, 60)
    for word in ("_thread.lock", "in __getitem__", "processes=False"):
        assert word in str(caught.value)


def test_functions_without_a_name_are_sent_by_their_code():
    pytest.importorskip("cloudpickle")
    recipe = datasets.recipe(
        datasets.Numbers(), lambda example, rng: example["y"] + 1
    )
    with running(Processes, recipe) as workers:
        workers.begin(JOBS[0])
        assert workers.take().tolist() == [1, 2, 3]


def test_memory_is_bounded_and_used_again():
    recipe = datasets.recipe(Large())
    with running(Processes, recipe, count=2, prefetch=2) as workers:
        for _ in range(5):
            while workers.room():
                workers.begin(job(0, 1, 2))
            assert workers.room() == 0
            assert len(workers.take()["x"]) == 2
        sizes = [os.fstat(s._descriptor).st_size for s in workers._slots]
        # Two for each worker, and the one that is being read.
        assert len(sizes) == 5 and max(sizes) < 2 * 4_000_000 + 2**20 + 1


class Large(datasets.Numbers):
    def __getitem__(self, index):
        return {"x": np.full(1_000_000, index, "float32")}


def test_what_was_taken_stays_until_there_is_room_again():
    recipe = datasets.recipe(datasets.Numbers())
    with running(Processes, recipe, prefetch=1) as workers:
        workers.begin(JOBS[0])
        workers.begin(JOBS[1])
        taken = workers.take()
        workers._read(workers._workers[0])  # the other is made by now
        assert taken["y"].tolist() == [0, 1, 2]
        assert len(workers._free) == 0 and workers.room() == 1


def test_batches_that_grow():
    recipe = datasets.recipe(Growing(), collate=Pad())
    with running(Processes, recipe) as workers:
        for n in (1, 10, 700_000, 3, 2_000_000):
            workers.begin(job(0, n))
            (found,) = workers.take()
            assert found.shape == (n,) and (found == n).all()


class Growing(datasets.Numbers):
    def __getitem__(self, index):
        return np.full(index, index, "float64")


def test_data_in_memory_are_there_once_for_all_workers(tmp_path):
    big = np.arange(4_000_000, dtype="float32").reshape(-1, 4)
    np.save(tmp_path / "rows.npy", big)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert len(pickle.dumps(Rows({"x": mapped}))) < 1000
    recipe = datasets.recipe(Rows({"x": big, "y": mapped}))
    with running(Processes, recipe, count=2) as workers:
        for each in JOBS[:4]:
            workers.begin(each)
        for each in JOBS[:4]:
            batch = workers.take()
            assert (batch["x"] == big[each.indices]).all()
            assert (batch["y"] == big[each.indices]).all()
        for worker in workers._workers:
            status = Path(f"/proc/{worker.process.pid}/smaps_rollup")
            own = status.read_text().split("Private_Dirty:")[1].split()[0]
            assert int(own) * 1024 < 50e6  # (16 MB of it would be the data)


def test_a_shared_file_holds_what_it_was_given():
    descriptor = anonymous_file()
    writer, reader = SharedFile(descriptor), SharedFile(descriptor)
    values = [
        {"a": np.arange(10.0), "b": (np.zeros((0, 3)), "text", None)},
        np.arange(12).reshape(3, 4).T,
        [np.array(["x", "yz"]), np.array([None, 1], object)],
    ]
    for value in values:
        found = reader.read(writer.write(value))
        assert digest(found) == digest(value)
        assert all(isinstance(leaf, np.ndarray | str) for leaf in leaves(found))
    os.close(descriptor)


# -- who is left when the parent is no more -----------------------------------

PARENT = """
import json, os, signal, sys, time
import numpy as np
from legato.workers import Job
from legato.workers.processes import Processes
from tests.workers import datasets

recipe = datasets.recipe(datasets.Bad(sys.argv[1], bad=0))
workers = Processes(recipe, 2, 2, 60)
workers.begin(Job(0, 0, 0, np.array([3])))
workers.begin(Job(0, 0, 1, np.array([4])))
workers.take(), workers.take()
if sys.argv[2] == "busy":
    workers.begin(Job(0, 0, 2, np.array([0])))
    workers.begin(Job(0, 0, 3, np.array([0])))
    time.sleep(0.2)
print(json.dumps([w.process.pid for w in workers._workers]), flush=True)
time.sleep(100)
"""


def children(pid):
    found = []
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            stat = (each / "stat").read_text().rpartition(")")[2].split()
            if int(stat[1]) == pid and stat[0] != "Z":
                found.append(int(each.name))
    return found


@pytest.mark.parametrize(
    "how, state, number",
    [
        ("hangs", "idle", signal.SIGKILL),
        ("hangs", "busy", signal.SIGKILL),
        ("hangs in C", "busy", signal.SIGKILL),
        ("hangs in C", "busy", signal.SIGTERM),
    ],
)
def test_nobody_outlives_the_parent(how, state, number):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, how, state],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pids = json.loads(parent.stdout.readline())
    # These are all that it has started: no server, no tracker.
    assert sorted(children(parent.pid)) == sorted(pids)
    assert all(map(is_alive, pids))
    os.kill(parent.pid, number)
    parent.wait()
    parent.stdout.close()
    until(lambda: not any(map(is_alive, pids)))


def test_closing_ends_them_also_those_that_hang():
    recipe = datasets.recipe(datasets.Bad("hangs"))
    workers = Processes(recipe, 2, 2, 60)
    workers.begin(job(0, 7))
    workers.begin(job(1, 1))
    pids = [w.process.pid for w in workers._workers]
    began = time.monotonic()
    workers.close()
    assert time.monotonic() - began < 60  # (It hangs for much longer.)
    assert not any(map(is_alive, pids))
    workers.close()


def test_collecting_them_ends_them():
    workers = Processes(datasets.recipe(datasets.Numbers()), 1, 1, 60)
    pid = workers._workers[0].process.pid
    assert is_alive(pid)
    del workers
    assert not is_alive(pid)


PROGRAM = """
import sys
import numpy as np
from legato.workers import Job, Recipe, stack
from legato.workers.processes import Processes

sys.modules["cloudpickle"] = None  # as if it were not installed

class Mine:
    def __getitem__(self, index):
        return np.array(index)

if True:
    workers = Processes(Recipe(Mine(), None, stack, "mine"), 1, 1, 60)
    workers.begin(Job(0, 0, 0, np.array([3, 4])))
    print(workers.take().tolist())
"""


@pytest.mark.parametrize("guarded", [True, False])
def test_a_dataset_of_the_program_itself(guarded, tmp_path):
    text = PROGRAM
    if guarded:
        text = text.replace("if True:", 'if __name__ == "__main__":')
    (tmp_path / "program.py").write_text(text)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if guarded:
        assert done.stdout.strip() == "[3, 4]", done.stderr
    else:
        assert 'if __name__ == "__main__":' in done.stderr
        assert "could not start" in done.stderr


def test_nothing_slow_is_imported():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, legato.workers.child, legato.workers.processes; "
            "print([m for m in ('keras', 'jax', 'torch', 'tensorflow', "
            "'pydantic') if m in sys.modules])",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_recipe_is_its_own_when_it_is_made_twice():
    recipe = datasets.recipe(datasets.Draws())
    batch, findings = recipe.try_out(JOBS[0])
    assert findings.same and findings.draws
    assert digest(batch) == here(recipe, JOBS[0])[0]
    assert not datasets.recipe(datasets.Counts()).try_out(JOBS[0])[1].same
    assert not datasets.recipe(datasets.Numbers()).try_out(JOBS[0])[1].draws
