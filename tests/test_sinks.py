"""Where a run's values go: lines, curves, tables, plug-ins; and the rewind."""

import csv
import enum
import importlib.metadata
import json
import math
import os
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from legato import storage
from legato.config import sinks as names
from legato.errors import (
    ConfigError,
    LegatoWarning,
    RestoreError,
    RunDirError,
    SummaryError,
)
from legato.sinks import CSV, METRICS, RunLog, Sink
from legato.sinks.log import LATE
from legato.storage import FileSystem
from legato.summaries import SummaryManager, SummaryManagerInterface
from legato.summaries.events import EVENTS
from legato.types import Table
from tests.summary_files import read, read_below


def curves(run_dir, split):
    return read(run_dir / "summaries" / split)


def records(run_dir):
    lines = (run_dir / METRICS).read_text().splitlines()
    return [json.loads(line) for line in lines]


def rows(run_dir):
    with open(run_dir / CSV, newline="") as file:
        return [tuple(row) for row in csv.reader(file)]


def test_scalars_are_read_back_by_tensorboard(tmp_path):
    log = RunLog(tmp_path)
    for step in (2, 4):
        log.write("train", step, {"loss": 1 / step, "matrix": [[1.0]]})
    log.write("validation", 4, {"loss": 0.5, "metric/part": float("nan")})
    log.write("epoch", 4, {"loss": 0.1})
    log.close()
    assert curves(tmp_path, "train") == {"loss": [(2, 0.5), (4, 0.25)]}
    assert list(curves(tmp_path, "validation")) == ["loss", "metric/part"]
    assert [r["kind"] for r in records(tmp_path)] == [
        "train",
        "train",
        "validation",
        "epoch",
    ]
    assert records(tmp_path)[0]["matrix"] == [[1.0]]


def test_numbers_wait_until_the_device_works_and_keep_their_order(tmp_path):
    log = RunLog(tmp_path, sinks=["tensorboard", "csv"])
    log.write("train", 2, {"loss": 0.5})
    log.write("epoch", 2, {"epoch": 0, "loss": 0.5})
    before = log.get_state()  # a checkpoint counts them
    log.write("train", 4, {"loss": 0.25})
    log.write("train", 6, {"loss": [0.125]})  # no number
    log.write("train", 8, {"loss": 0.0625})
    log.catch_up()
    log.write("train", 10, {"loss": 0.03125})
    log.close()
    steps = [(r["kind"], r["step"]) for r in records(tmp_path)]
    assert steps == [("train", 2), ("epoch", 2)] + [
        ("train", step) for step in (4, 6, 8, 10)
    ]
    assert [s for s, _ in curves(tmp_path, "train")["loss"]] == [2, 4, 8, 10]
    log = RunLog(tmp_path, sinks=["tensorboard", "csv"])
    log.write("train", 12, {"loss": 0.0})  # of a future that is taken back
    log.rewind(before)
    log.close()
    assert [r["step"] for r in records(tmp_path)] == [2, 2]


@pytest.mark.parametrize("own", ["a step", "a function", "a class"])
def test_what_users_write_is_called_at_once(tmp_path, own):
    at, seen = [0], []

    class Manager(SummaryManager):
        def write_summaries(self, summary_dict):
            seen.append(at[0])

    arguments = {
        "a step": {"global_step": lambda: seen.append(at[0]) or at[0]},
        "a function": {"summary_fn": lambda *_: seen.append(at[0])},
    }
    kind = Manager if own == "a class" else SummaryManager
    manager = kind(tmp_path / "tb", **arguments.get(own, {}))
    log = RunLog(tmp_path, managers={"train": manager})
    for at[0] in (2, 4):
        log.write("train", at[0], {"loss": 0.5})
    at[0] = 5
    log.close()
    assert seen == [2, 4]


RESULTS = {
    "loss": 0.5,
    "count": 3,
    "note": "fine",
    "per_class": np.array([0.25, 0.5], "float32"),
    "list": [1.0, None],
    "nothing": None,
    "weights": np.zeros(100),
    "picture": np.zeros((4, 4, 3), "uint8"),
    "train": {"iou": 0.75, "deep": {"x": np.float32(0.5)}},
}


def test_groups_lie_flat_in_lines_and_deep_in_directories(tmp_path):
    log = RunLog(tmp_path, sinks=["csv", "tensorboard"])
    log.write("validation", 3, RESULTS)
    log.close()
    numbers = {
        "loss": 0.5,
        "count": 3,
        "train/iou": 0.75,
        "train/deep/x": 0.5,
    }
    (record,) = records(tmp_path)
    assert record == {
        "kind": "validation",
        "step": 3,
        **numbers,
        "note": "fine",
        "per_class": [0.25, 0.5],
        "list": [1.0, None],
        "nothing": None,
    }
    head, *found = rows(tmp_path)
    assert head == ("kind", "step", "name", "value")
    assert {(kind, step) for kind, step, _, _ in found} == {("validation", "3")}
    assert {name: float(value) for _, _, name, value in found} == numbers
    below = read_below(tmp_path / "summaries" / "validation")
    assert list(below) == [".", "train", "train/deep"]
    assert sorted(below["."]) == [
        "count",
        "loss",
        "note",
        "per_class",
        "picture",
        "weights",
    ]
    assert below["train/deep"] == {"x": [(3, 0.5)]}


def test_numbers_in_a_table_are_exact_and_quoted(tmp_path):
    log = RunLog(tmp_path, sinks=["csv"])
    values = {"a,b": 0.1 + 0.2, 'quoted "x"': float("inf"), "two\nlines": 1.0}
    log.write("train", 1, values)
    log.close()
    found = {name: float(value) for _, _, name, value in rows(tmp_path)[1:]}
    assert found == values
    assert not (tmp_path / "summaries").exists()


def test_two_values_of_one_name_are_refused(tmp_path):
    log = RunLog(tmp_path)
    with pytest.raises(SummaryError, match="'a/b', one of them in a group"):
        log.write("validation", 1, {"a/b": 1.0, "a": {"b": 2.0}})
    log.close()


def write(log, steps):
    for step in steps:
        log.write("train", step, {"loss": float(step)})
        if step % 3 == 0:
            group = {"mean": float(step), "square": np.eye(4) * step}
            log.write(
                "validation",
                step,
                # A column, a directory and a file that appear late.
                {"loss": -float(step), f"group{step}": group},
            )
        log.flush()


def test_a_rewound_log_is_that_of_the_run_that_was_never_ahead(tmp_path):
    sinks = ["csv", "tensorboard"]
    whole = tmp_path / "whole"
    whole.mkdir()
    log = RunLog(whole, sinks=sinks)
    write(log, range(1, 9))
    expected = log.get_state()
    log.close()

    killed = tmp_path / "killed"
    killed.mkdir()
    log = RunLog(killed, sinks=sinks)
    write(log, [1, 2])
    state = log.get_state()  # before the first validation
    write(log, [3, 4, 5])
    log.write("train", 6, {"loss": 6.0})  # in memory when it is killed
    # Only in this future.
    log.write("validation", 6, {"other": {"x": 1.0}, "train": {"y": 2.0}})
    log.flush()
    del log

    log = RunLog(killed, sinks=sinks)
    log.rewind(state)
    assert read_below(killed / "summaries").keys() == {"train"}
    write(log, range(3, 9))
    assert log.get_state() == expected
    log.close()
    found = read_below(killed / "summaries")
    assert found == read_below(whole / "summaries")
    assert list(found) == [
        "train",
        "validation",
        "validation/group3",
        "validation/group6",
    ]
    for file in (METRICS, CSV):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    log = RunLog(tmp_path, sinks=["csv", "tensorboard"])
    log.write("train", 1, {"loss": 9.0, "group": {"x": 1.0}})
    log.flush()
    log = RunLog(tmp_path, sinks=["csv", "tensorboard"])
    log.rewind(None)
    log.write("train", 1, {"loss": 1.0})
    log.close()
    below = read_below(tmp_path / "summaries")
    assert below == {"train": {"loss": [(1, 1.0)]}}
    assert len(records(tmp_path)) == 1
    assert rows(tmp_path)[1:] == [("train", "1", "loss", "1.0")]


def test_a_sink_that_is_left_out_for_a_while_is_rewound_later(tmp_path):
    log = RunLog(tmp_path, sinks=["csv"])
    log.write("train", 1, {"loss": 1.0})
    state = log.get_state()
    log.write("train", 2, {"loss": 9.0})
    log.close()
    log = RunLog(tmp_path, sinks=[])
    log.rewind(state)
    log.write("train", 2, {"loss": 2.0})
    state = log.get_state()
    log.close()
    log = RunLog(tmp_path, sinks=["csv"])
    log.rewind(state)
    log.write("train", 3, {"loss": 3.0})
    log.close()
    assert [row[1] for row in rows(tmp_path)[1:]] == ["1", "3"]
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "file", [METRICS, CSV, "summaries/train/events.out.tfevents.legato"]
)
def test_lost_lines_are_named_and_can_be_done_without(file, tmp_path):
    sinks = ["csv", "tensorboard"]
    log = RunLog(tmp_path, sinks=sinks)
    log.write("train", 1, {"loss": 1.0, "group": {"x": 1.0}})
    state = log.get_state()
    log.write("train", 2, {"loss": 1.0, "group": {"x": 1.0}})
    log.close()
    (tmp_path / file).unlink()
    log = RunLog(tmp_path, sinks=sinks)
    with pytest.raises(RestoreError, match=r"legato|metrics|csv.*override"):
        log.rewind(state)
    log.rewind(state, lenient=True)
    # All else was rewound.
    assert log.get_state() == {
        name: each
        if name not in file
        else ({"group": each["group"]} if name == "summaries/train" else 0)
        for name, each in state.items()
    }
    log.close()


@pytest.mark.parametrize(
    "state",
    [
        3,
        {"metrics.jsonl": "x"},
        ["a"],
        {"metrics.jsonl": True},
        {"summaries.csv": [1]},
        {"summaries/train": 5},
        {"summaries/train": {"": -1}},
        {"summaries/train": {"../x": 1}},
        {"summaries/train": {"/x": 1}},
    ],
)
def test_what_is_no_position_is_refused(tmp_path, state):
    log = RunLog(tmp_path, sinks=["csv", "tensorboard"])
    with pytest.raises(RestoreError, match="log positions"):
        log.rewind(state)
    log.close()


@pytest.mark.parametrize(
    "name", ["summaries", "summaries/x", "summaries/train/x/y"]
)
def test_a_link_among_the_summaries_is_refused(name, tmp_path):
    outside = tmp_path / "outside"
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    outside.mkdir()
    victim = outside / "events.out.tfevents.legato"
    victim.write_bytes(b"x" * 100)
    link.symlink_to(outside)
    with pytest.raises(RunDirError, match="symbolic link"):
        RunLog(tmp_path / "run").rewind(None)
    assert victim.stat().st_size == 100


@pytest.mark.parametrize("kind", ["link", "directory", "FIFO"])
@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "timing.jsonl",
        "summaries.csv",
        f"summaries/train/{EVENTS}",
    ],
)
def test_what_is_no_file_is_refused_in_the_place_of_one(name, kind, tmp_path):
    def write():
        log = RunLog(tmp_path / "run", sinks=["csv", "tensorboard"])
        try:
            log.rewind(None)
            log.write("train", 1, {"loss": 1.0})
        finally:
            log.close()

    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    if kind == "link":
        path.symlink_to(tmp_path / "victim")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(RunDirError, match=f"{name} is .*regular file"):
        write()
    path.rmdir() if kind == "directory" else path.unlink()
    write()
    assert not (tmp_path / "victim").exists()


def test_a_file_in_the_place_of_the_summaries_is_refused(tmp_path):
    (tmp_path / "summaries").write_text("")
    with pytest.raises(RunDirError, match=r"summaries is there.*no directory"):
        RunLog(tmp_path)


def test_a_link_that_appears_later_is_refused_too(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    log = RunLog(run_dir)
    log.write("train", 1, {"loss": 1.0})
    log.flush()
    (run_dir / "summaries" / "train" / "group").symlink_to(outside)
    with pytest.raises(RunDirError, match="symbolic link"):
        log.write("train", 2, {"group": {"x": 1.0}})
    log.close()
    assert not list(outside.iterdir())


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    log = RunLog(tmp_path, sinks=["csv", "tensorboard"])
    write(log, [1])
    full = OSError(28, "No space left on device")

    def fail(self, fd, data):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "write", fail)
        log.write("train", 2, {"loss": 2.0})
        state = log.get_state()
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                log.sync()
            with pytest.raises(OSError, match="No space"):
                log.flush()
    log.sync()
    assert log.dropped == []
    log.write("train", 3, {"loss": 3.0})
    log.rewind(state)
    log.close()
    assert curves(tmp_path, "train") == {"loss": [(1, 1.0), (2, 2.0)]}
    assert len(rows(tmp_path)) == 3
    assert len(records(tmp_path)) == 2


def test_all_directories_are_named_durably(tmp_path, monkeypatch):
    synced = []
    real = FileSystem.fsync

    def fsync(self, fd):
        synced.append(fd)
        real(self, fd)

    opened = {}
    real_open = FileSystem.open

    def open_(self, path, flags):
        fd = real_open(self, path, flags)
        opened.setdefault(str(path), []).append(fd)
        return fd

    monkeypatch.setattr(FileSystem, "fsync", fsync)
    monkeypatch.setattr(FileSystem, "open", open_)
    log = RunLog(tmp_path)
    log.write("train", 1, {"a": {"b": {"x": 1.0}}})
    log.sync()
    for folder in (
        "summaries/train/a/b",
        "summaries/train/a",
        "summaries/train",
        "summaries",
        ".",
    ):
        assert str(tmp_path / folder) in opened, folder
    before = len(opened)
    log.write("train", 2, {"a": {"b": {"x": 1.0}}})
    log.sync()
    assert len(opened) == before  # once is enough
    log.close()


def test_a_group_that_comes_meanwhile_is_named_durably(tmp_path, monkeypatch):
    manager = SummaryManager(tmp_path / "board", global_step=1)
    synced = []
    real = storage.sync_directory

    def sync_directory(path):
        if not synced:  # as the training thread may
            manager.write_summaries({"late": {"x": 1.0}})
        synced.append(path)
        real(path)

    monkeypatch.setattr(storage, "sync_directory", sync_directory)
    manager.write_summaries({"early": {"x": 1.0}})
    manager.summary_writer("empty")
    manager.sync()
    for add in (
        lambda: None,  # late
        lambda: manager.write_summaries({"empty": {"x": 1.0}}),
    ):
        synced.clear()
        add()
        manager.sync()
        assert manager.summary_dir in synced
    synced.clear()
    manager.sync()
    assert not synced
    manager.close()


def test_directories_that_could_not_be_synced_are_tried_again(
    tmp_path, monkeypatch
):
    manager = SummaryManager(tmp_path / "board", global_step=1)
    manager.write_summaries({"a": {"x": 1.0}})
    synced = []

    def fail(path):
        raise OSError("no space")

    monkeypatch.setattr(storage, "sync_directory", fail)
    with pytest.raises(OSError, match="no space"):
        manager.sync()
    monkeypatch.setattr(storage, "sync_directory", synced.append)
    manager.sync()
    assert {tmp_path / "board", tmp_path, tmp_path.parent} == set(synced)
    manager.close()


# -- summary managers of the user's ------------------------------------------


def test_a_users_manager_is_rewound_and_its_neighbours_are_left(tmp_path):
    folder = tmp_path / "board"
    before = SummaryManager(folder, global_step=7)
    before.write_summaries({"loss": 7.0})
    before.close()

    def log():
        managers = {
            "train": SummaryManager(folder),
            # One's directory in the other's.
            "validation": SummaryManager(folder / "eval"),
        }
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        return RunLog(run_dir, managers=managers, run_id="id")

    first = log()
    first.rewind(None)
    write(first, range(1, 5))
    state = first.get_state()
    assert state["summaries/train"].keys() == {""}
    expected = read_below(folder)
    write(first, range(5, 10))
    first.close()
    again = log()
    again.rewind(state)
    again.close()
    assert read_below(folder) == expected
    assert expected["."]["loss"][0] == (7, 7.0)
    again = log()
    again.rewind(None)
    again.close()
    assert read_below(folder) == {".": {"loss": [(7, 7.0)]}}
    assert not (tmp_path / "run" / "summaries").exists()


def test_one_manager_for_both(tmp_path):
    manager = SummaryManager(tmp_path / "board")
    managers = dict.fromkeys(("train", "validation"), manager)
    log = RunLog(tmp_path, managers=managers, run_id="id")
    log.write("train", 1, {"loss": 1.0})
    log.write("validation", 1, {"val": 2.0})
    state = log.get_state()
    log.flush()
    expected = read_below(tmp_path / "board")
    assert expected == {".": {"loss": [(1, 1.0)], "val": [(1, 2.0)]}}
    log.write("train", 2, {"loss": 2.0})
    log.rewind(state)
    log.close()
    assert read_below(tmp_path / "board") == expected


class Notes(SummaryManagerInterface):
    """Keeps what it is given; cannot be rewound."""

    def __init__(self):
        self.given = []
        self.flushes = 0

    def summary_writer(self, relative_path=""):
        raise NotImplementedError

    def write_summaries(self, summary_dict):
        self.given.append(summary_dict)

    def flush(self):
        self.flushes += 1


class Rewindable(Notes):
    def get_state(self):
        return len(self.given)

    def set_state(self, state):
        del self.given[state or 0 :]


def test_a_manager_that_cannot_be_rewound_is_named(tmp_path):
    notes, kept = Notes(), Rewindable()
    log = RunLog(tmp_path, managers={"train": notes, "validation": kept})
    (why,) = log.inexact
    assert "summaries of train go to a Notes" in why
    values = {"loss": 1.0, "list": [1.0]}
    for step in (1, 2):
        log.write("train", step, values)
        log.write("validation", step, values)
    state = log.get_state()
    assert state["summaries/validation"] == 2
    assert (notes.flushes, kept.flushes) == (1, 1)
    log.write("validation", 3, values)
    log.rewind(state)
    # It is given everything, lists too.
    assert kept.given == [values] * 2
    log.close()


# -- sinks that fail, and plug-ins -------------------------------------------


class Recording:
    """A sink that keeps what it is given in memory."""

    def __init__(self, run_dir):
        self.run_dir = run_dir
        self.values = []
        self.calls = []

    def write(self, kind, step, values):
        self.calls.append("write")
        self.values.append((kind, step, dict(values)))

    def flush(self):
        self.calls.append("flush")

    def sync(self):
        self.calls.append("sync")
        self.thread = threading.current_thread()

    def get_state(self):
        self.calls.append("get_state")
        return {"count": len(self.values)}

    def set_state(self, state):
        self.calls.append("set_state")
        del self.values[state["count"] if state else 0 :]

    def close(self):
        self.calls.append("close")


@pytest.fixture
def offer(monkeypatch):
    """Offers sinks, as installed packages do."""

    def offer(**factories):
        points = [
            importlib.metadata.EntryPoint(
                name, f"tests.test_sinks:{name}", names.GROUP
            )
            for name in factories
        ]
        monkeypatch.setattr(
            importlib.metadata,
            "entry_points",
            lambda group: points if group == names.GROUP else [],
        )
        for name, factory in factories.items():
            monkeypatch.setitem(globals(), name, factory)

    return offer


def test_a_plug_in(tmp_path, offer):
    made = []
    offer(recording=lambda run_dir: made.append(Recording(run_dir)) or made[-1])
    log = RunLog(tmp_path, sinks=["recording"])
    (sink,) = made
    assert isinstance(sink, Sink)
    log.rewind(None)
    log.write("train", 1, {"loss": 1.0})
    state = log.get_state()
    assert state["recording"] == {"count": 1}
    thread = threading.Thread(target=log.sync)
    thread.start()
    thread.join()
    assert sink.thread is thread
    log.write("epoch", 2, {"loss": 2.0})
    log.rewind(state)
    log.close()
    assert sink.run_dir == tmp_path
    assert sink.values == [("train", 1, {"loss": 1.0})]
    assert sink.calls == [
        "set_state",
        "write",
        "flush",
        "get_state",
        "sync",
        "write",
        "set_state",
        "close",
    ]


def test_a_plug_in_among_the_known_names(offer):
    offer(recording=Recording)
    names.require_known(["recording", "csv"])
    with pytest.raises(ConfigError, match=r"mean 'recording'.*csv, tensorb"):
        names.require_known(["recordin"])


def run(tmp_path, sinks):
    """A run that is resumed once; what was told, and the last state."""
    told, state = [], None
    for process in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            log = RunLog(tmp_path, sinks=sinks)
            log.rewind(state)
            log.write("train", 1 + process, {"loss": 1.0, "g": {"x": 1.0}})
            log.write("train", 1 + process, {"more": 1.0})
            state = log.get_state()
            log.sync()
            log.flush()
            log.get_state()
            log.close()
        told.append([str(w.message) for w in caught])
        assert all(w.category is LegatoWarning for w in caught)
    return told, state


@pytest.mark.parametrize(
    "method",
    ["write", "flush", "sync", "get_state", "set_state", "close", "__init__"],
)
def test_a_sink_that_fails_is_told_once_and_left_out(method, tmp_path, offer):
    calls = []

    def fail(self, *arguments):
        calls.append(method)
        raise OSError(f"no network for {method}")

    offer(failing=type("Failing", (Recording,), {method: fail}))
    told, state = run(tmp_path, ["failing", "csv", "tensorboard"])
    for messages in told:
        (message,) = messages
        assert "sink 'failing' failed" in message
        assert f"no network for {method}" in message
    assert len(calls) == 2  # once in each process
    assert ("failing" in state) == (method in ("close", "sync"))
    assert curves(tmp_path, "train")["loss"] == [(1, 1.0), (2, 1.0)]
    assert len(records(tmp_path)) == 4
    assert len(rows(tmp_path)) == 7


def test_a_state_that_is_no_json_is_a_failure(tmp_path, offer):
    class Failing(Recording):
        def get_state(self):
            return {"count": np.int64(1)}

    offer(failing=Failing)
    told, state = run(tmp_path, ["failing"])
    assert "sink 'failing' failed" in told[0][0] and "int64" in told[0][0]
    assert "failing" not in state


def test_a_dropped_sink_keeps_its_state_for_the_next_process(tmp_path, offer):
    class Failing(Recording):
        def write(self, kind, step, values):
            if step == 3:
                raise RuntimeError("gone")
            super().write(kind, step, values)

    offer(failing=Failing)
    log = RunLog(tmp_path, sinks=["failing"])
    log.rewind(None)
    log.write("train", 1, {"loss": 1.0})
    assert log.get_state()["failing"] == {"count": 1}
    with pytest.warns(LegatoWarning, match="RuntimeError: gone"):
        log.write("train", 3, {"loss": 1.0})
    log.write("train", 4, {"loss": 1.0})
    state = log.get_state()
    assert state["failing"] == {"count": 1}
    log.close()
    assert log.dropped == ["failing"]
    # In the same process, as after a recovery, it stays left out.
    log = RunLog(tmp_path, sinks=["failing"], dropped=log.dropped)
    log.rewind(state)
    log.write("train", 5, {"loss": 1.0})
    assert log.get_state()["failing"] == {"count": 1}
    log.close()


def test_a_users_summary_function_that_fails_is_left_out(tmp_path):
    def fail(name, value, step):
        raise KeyError(name)

    manager = SummaryManager(tmp_path / "board", fail)
    log = RunLog(tmp_path, managers={"train": manager}, run_id="id")
    with pytest.warns(LegatoWarning, match="summaries/train.*KeyError: 'x'"):
        log.write("train", 1, {"x": 1.0})
    log.write("train", 2, {"x": 1.0})
    log.write("validation", 2, {"y": 1.0})
    log.get_state()
    log.sync()
    log.close()
    assert list(curves(tmp_path, "validation")) == ["y"]


def test_what_is_no_sink_is_refused(tmp_path, offer):
    class Half:
        def __init__(self, run_dir):
            pass

        def write(self, kind, step, values):
            pass

        def close(self):
            pass

    offer(half=Half)
    with pytest.raises(ConfigError, match="no flush, get_state, set_state"):
        RunLog(tmp_path, sinks=["half"])


def test_a_value_that_is_none_stops_with_its_name_and_the_rule(tmp_path):
    log = RunLog(tmp_path)
    with pytest.raises(SummaryError, match="'thing' is a object: it must be"):
        log.write("validation", 1, {"thing": object()})
    log.close()


@pytest.mark.parametrize("sinks", [[], ["csv"], ["tensorboard"]])
@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, [object()], np.array(["a"]), np.datetime64(0, "s")],
)
def test_what_no_sink_writes_is_refused_whatever_they_are(
    value, sinks, tmp_path
):
    log = RunLog(tmp_path, sinks=sinks)
    with pytest.raises(SummaryError, match="'group/thing' is a"):
        log.write("validation", 1, {"group": {"thing": value}, "a": 1.0})
    log.close()


def test_what_a_manager_of_the_users_takes_is_left_to_it(tmp_path):
    taken = []

    class Manager(SummaryManager):
        def write_summaries(self, summary_dict):
            taken.append(summary_dict)

    manager = Manager(tmp_path / "tb")
    log = RunLog(tmp_path, managers={"validation": manager})
    log.write("validation", 1, {"thing": (thing := object()), "a": 1.0})
    log.close()
    assert taken == [{"thing": thing, "a": 1.0}]
    assert records(tmp_path) == [{"kind": "validation", "step": 1, "a": 1.0}]


@pytest.mark.parametrize("sinks", [[], ["tensorboard", "csv"]])
def test_kinds_of_numpy_are_what_they_look_like(sinks, tmp_path):
    log = RunLog(tmp_path, sinks=sinks)
    masked = np.ma.masked_array([1.0, 2.0], [0, 1])
    log.write(
        "validation",
        1,
        {
            "text": np.str_("cat"),
            "number": np.float32(0.5),
            "masked": np.ma.masked,
            "array": masked,
            "member": enum.IntEnum("Colour", "red")(1),
            "picture": np.ma.masked_array(np.ones((4, 4, 3), "uint8"), True),
        },
    )
    log.close()
    (record,) = records(tmp_path)
    assert record.pop("text") == "cat" and record.pop("number") == 0.5
    assert record["member"] == 1 and "picture" not in record
    assert math.isnan(record["masked"])
    assert record["array"][0] == 1 and math.isnan(record["array"][1])


@pytest.mark.parametrize(
    "values",
    [
        {"loss": 0.1, "n": 3, 'a "b" %s é': -1e300},
        {"loss": 1e-5, "tiny": 5e-324, "zero": -0.0, "third": 1 / 3},
        {"loss": math.nan, "other": 1.5},
        {"a": math.inf, "b": -math.inf},
        {"a": 1e308, "b": 1e308},  # their sum is infinite
        {"step": 2.5, "loss": 1.0},
        {"kind": 2.5},
        {"null": 1e-5},
        {"text": "x", "flag": True, "none": None, "large": 2**70},
        {"surrogate": "\ud800"},
        {},
    ],
    ids=str,
)
def test_a_line_is_what_json_reads_back_to_the_bit(values, tmp_path):
    log = RunLog(tmp_path, sinks=[])
    log.write("train", 7, values)
    log.close()
    record = {"kind": "train", "step": 7, **values}
    (line,) = (tmp_path / METRICS).read_text().splitlines()
    # (NaN is not equal to itself, and -0.0 is equal to 0.0.)
    assert repr(json.loads(line)) == repr(record)


def test_lines_do_not_depend_on_how_many_are_written_at_once(tmp_path):
    columns = {
        "loss": [0.1, math.nan, 1e-5, 1e22],
        "rate": [1e-7, 1e-7, math.inf, 1 / 3],
    }
    table = Table([1, 2, 3, 4], columns)
    together, alone = tmp_path / "together", tmp_path / "alone"
    for folder in (together, alone):
        folder.mkdir()
    log = RunLog(together, sinks=[])
    log.write_later("train", lambda: table)
    log.close()
    log = RunLog(alone, sinks=[])
    for step, values in table.rows():
        log.write("train", step, values)
    log.close()
    lines = (together / METRICS).read_bytes()
    assert lines.count(b"\n") == 4
    assert lines == (alone / METRICS).read_bytes()


def test_values_wait_for_a_moment_and_not_for_long(tmp_path, monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("legato.sinks.log.time", clock)
    log = RunLog(tmp_path)
    assert not log.is_behind and not log.is_late
    for step in (2, 4):
        log.write_later("train", lambda step=step: Table([step], {"a": [0.5]}))
        assert log.is_behind and not log.is_late
        now[0] += LATE / 2
    assert log.is_late  # counted from the first
    log.catch_up()
    assert not log.is_behind and not log.is_late
    log.write_later("train", lambda: Table([6], {"a": [0.5]}))
    assert not log.is_late
    log.flush()  # as for a checkpoint
    assert [record["step"] for record in records(tmp_path)] == [2, 4, 6]
    log.close()
