"""What differs between two checkpoints and two runs is found, and told."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

from legato.checkpoint import CheckpointStore, load_checkpoint
from legato.checkpoint.format import step_name
from legato.cli import main
from legato.diff import compare_checkpoints, compare_runs
from legato.diff.checkpoints import ABSENT, compare_arrays, compare_values
from legato.errors import RunDirError
from legato.sinks import RunLog
from legato.summaries import SummaryManager

ARRAYS = {
    "model/kernel": np.arange(6, dtype="float32").reshape(2, 3),
    "model/count": np.int32(4),
}
HOST = {"clock": {"step": 5, "logs": [["loss", 0.5]]}, "seed": 3}


def write(run, step=5, arrays=ARRAYS, host=HOST, data=None):
    run.mkdir(exist_ok=True)
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    store = CheckpointStore(run, run_id="a", keep_last=None)
    store.save(step, arrays, host, data)
    store.close()
    return load_checkpoint(run / "checkpoints" / step_name(step))


def differences(tmp_path, **changed):
    a = write(tmp_path / "a")
    b = write(tmp_path / "b", **changed)
    return compare_checkpoints(a, b)


def one(a, b):
    """The one difference between two arrays."""
    (found,) = compare_arrays("x", np.asarray(a), np.asarray(b))
    return found


def test_nothing_differs(tmp_path):
    assert differences(tmp_path) == []


def test_what_varies_without_consequences_is_not_compared(tmp_path):
    from legato.data.state import OPAQUE

    name = f"data/{OPAQUE}0"
    a = write(tmp_path / "a", arrays={**ARRAYS, name: np.zeros(3, "uint8")})
    b = write(tmp_path / "b", arrays={**ARRAYS, name: np.ones(5, "uint8")})
    assert compare_checkpoints(a, b) == []
    c = write(tmp_path / "c")
    (found,) = compare_checkpoints(a, c)
    assert found.path == name


def test_an_array(tmp_path):
    kernel = ARRAYS["model/kernel"].copy()
    kernel[0, 1] = np.nextafter(kernel[0, 1], np.float32(9))
    kernel[1, 2] += 0.5
    (found,) = differences(tmp_path, arrays={**ARRAYS, "model/kernel": kernel})
    assert found.path == "model/kernel"
    assert (found.differing, found.size) == (2, 6)
    assert found.max_abs == 0.5
    assert found.max_ulp == 2**20
    assert str(found) == (
        "2 of 6 elements differ, by at most 0.5 (1,048,576 ULP)"
    )


@pytest.mark.parametrize(
    "dtype, one_ulp",
    [
        ("float64", 2.0**-52),
        ("float32", 2.0**-23),
        ("float16", 2.0**-10),
        (ml_dtypes.bfloat16, 2.0**-7),
        (ml_dtypes.float8_e4m3fn, 2.0**-3),
    ],
)
def test_units_in_the_last_place(dtype, one_ulp):
    a, b = np.array([1, 1], dtype), np.array([1, 1 + one_ulp], dtype)
    assert one(a, b).max_ulp == 1
    # Across zero: from the smallest number to its negative are two steps.
    tiny = np.array([1], f"u{a.dtype.itemsize}").view(dtype)
    assert one(tiny, -tiny).max_ulp == 2


def test_numbers_that_are_none():
    nan, inf = np.float32("nan"), np.float32("inf")
    assert one([nan], [np.float32(1)]).max_abs is None
    assert (
        one([inf, np.float32(1)], [np.float32(1), np.float32(2)]).max_abs == 1
    )
    assert compare_arrays("x", np.array([nan]), np.array([nan])) == []
    zero = one(np.array([0.0]), np.array([-0.0]))
    assert (zero.differing, zero.max_abs, zero.max_ulp) == (1, 0, 0)


def test_integers_at_their_extremes():
    info = np.iinfo("int64")
    found = one(np.array([info.min]), np.array([info.max]))
    assert found.max_abs == 2.0**64
    assert found.max_ulp is None
    assert one(np.array([True, False]), np.array([True, True])).max_abs is None


def test_shapes_and_dtypes(tmp_path):
    (found,) = differences(
        tmp_path, arrays={**ARRAYS, "model/count": np.int64(4)}
    )
    assert str(found) == "'int32[]' -> 'int64[]'"
    assert one(np.zeros(0), np.zeros((0, 2))).before == "float64[0]"
    assert compare_arrays("x", np.zeros(0), np.zeros(0)) == []


def test_what_one_side_lacks(tmp_path):
    found = differences(tmp_path, arrays={"model/count": np.int32(4)}, host={})
    assert [(each.path, each.after) for each in found] == [
        ("model/kernel", ABSENT),
        ("clock", ABSENT),
        ("seed", ABSENT),
    ]
    assert "after" not in found[0].to_json()


def test_values(tmp_path):
    host = {"clock": {"step": 6, "logs": [["loss", 0.25]]}, "seed": 3}
    found = differences(tmp_path, host=host, data={"order": b"12"})
    assert [each.path for each in found] == [
        "clock.logs.0.1",
        "clock.step",
        "data/order",
    ]
    assert str(found[0]) == "0.5 -> 0.25"


def test_values_that_look_alike():
    def found(a, b):
        return list(compare_values({"x": a}, {"x": b}))

    assert found(1, True) and found(0.0, -0.0) and found(1, 1.0)
    assert not found(float("nan"), float("nan"))
    assert found([1, 2], [1]) and found({"a": 1}, {"a": 1, "b": 2})


# -- runs --------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """Two runs that are the same."""
    a, b = tmp_path / "a", tmp_path / "b"
    write(a)
    write(a, step=10)
    log = RunLog(a)
    for step in (5, 10):
        log.write("train", step, {"loss": 1 / step, "note": "x"})
    log.close()
    (a / "log.csv").write_text("epoch,loss\n0,1\n")
    shutil.copytree(a, b)
    return a, b


def differing(a, b):
    return [each.name for each in compare_runs(a, b).differing]


def test_runs_that_are_the_same(runs):
    found = compare_runs(*runs)
    assert not found.differing
    assert [each.name for each in found.compared] == [
        "step_00000005",
        "step_00000010",
        "metrics.jsonl",
        "summaries/train",
        "log.csv",
    ]
    assert found.num_bytes > 400


def test_wall_clock_times_do_not_count(runs):
    a, b = runs
    shutil.rmtree(b / "summaries")
    for step in (5, 10):  # the same curve, at another time
        events = SummaryManager(b / "summaries" / "train", global_step=step)
        events.write_summaries({"loss": 1 / step, "note": "x"})
        events.close()
    (b / "timing.jsonl").write_text('{"step": 5, "time": "then"}\n')
    assert differing(a, b) == []


def test_each_thing_that_differs(runs):
    a, b = runs
    write(b, step=10, host={**HOST, "seed": 4})
    text = (b / "metrics.jsonl").read_text()
    (b / "metrics.jsonl").write_text(text.replace("0.1,", "0.2,"))
    (b / "log.csv").write_text("epoch,loss\n0,2\n")
    (b / "more.txt").write_text("")
    found = {each.name: each for each in compare_runs(a, b).differing}
    assert list(found) == [
        "step_00000010",
        "metrics.jsonl",
        "log.csv",
        "more.txt",
    ]
    assert found["metrics.jsonl"].step == 10
    (line,) = found["metrics.jsonl"].differences
    assert (line.path, line.before, line.after) == ("line 2.loss", 0.1, 0.2)


def test_curves(runs):
    a, b = runs
    events = SummaryManager(b / "summaries" / "train", global_step=15)
    events.write_summaries({"loss": 3.0})
    events.close()
    (found,) = compare_runs(a, b).differing
    assert (found.name, found.step) == ("summaries/train", 15)
    assert str(found.differences[0]) == "absent -> '3.0 at step 15'"


def test_a_damaged_or_missing_checkpoint(runs):
    a, b = runs
    state = b / "checkpoints" / "step_00000005" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    shutil.rmtree(b / "checkpoints" / "step_00000010")
    found = compare_runs(a, b).differing
    assert [each.step for each in found] == [5, 10]
    assert "damaged" in str(found[0].differences[0])
    assert str(found[1].differences[0]) == "'intact' -> absent"


def test_hostile_files(runs, tmp_path):
    a, b = runs
    (tmp_path / "secret").write_text("secret")
    (b / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(b / "pipe")
    (b / "summaries" / "train" / "events.out.tfevents.x").write_bytes(
        (2**60).to_bytes(8, "little") + b"1234" + b"x" * 40
    )
    (found,) = compare_runs(a, b).differing
    assert "wrong checksum" in found.differences[0].after


def test_no_run(tmp_path, runs):
    with pytest.raises(RunDirError, match="holds neither"):
        compare_runs(runs[0], tmp_path)


# -- the command -------------------------------------------------------------


def test_the_command(runs, capsys):
    a, b = runs
    assert main(["diff", str(a), str(b)]) == 0
    assert "Nothing differs: 5 things" in capsys.readouterr().out
    write(b, step=10, host={**HOST, "seed": 4})
    assert main(["diff", str(a), str(b)]) == 1
    out = capsys.readouterr().out
    assert "step_00000010" in out and "3 -> 4" in out
    assert main(["diff", str(a), str(b), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["differs"]
    assert report["compared"][1]["differences"] == [
        {"path": "seed", "before": 3, "after": 4}
    ]


def test_the_command_on_checkpoints(runs, capsys):
    a, b = (run / "checkpoints" / "step_00000005" for run in runs)
    assert main(["diff", str(a), str(b)]) == 0
    assert main(["diff", str(a), str(runs[1])]) == 2
    assert "give two of one kind" in capsys.readouterr().err
    assert main(["diff", str(a), str(a / "no")]) == 2
    state = b / "host.json"
    state.write_bytes(state.read_bytes() + b" ")
    assert main(["diff", str(a), str(b)]) == 1
    assert "manifest says" in capsys.readouterr().err


def test_a_name_that_holds_an_end_of_lines_of_another_kind(tmp_path):
    for name, loss in (("a", 0.5), ("b", 0.25)):
        (tmp_path / name).mkdir()
        log = RunLog(tmp_path / name, sinks=[])
        log.write("train", 5, {"one\u2028\x85two": 1.0})
        log.write("train", 10, {"one\u2028\x85two": loss})
        log.close()
    compared = compare_runs(tmp_path / "a", tmp_path / "b")
    metrics = next(each for each in compared.differing if each.kind == "log")
    assert metrics.step == 10
    assert "line 2" in str(metrics.differences[0].path)
