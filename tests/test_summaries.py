"""Summary managers: what TensorBoard reads of what they are given."""

import gc
import itertools
import os
import subprocess
import sys
import threading
import time

import keras
import matplotlib
import matplotlib.figure
import ml_dtypes
import numpy as np
import pytest

import legato
from legato import summaries
from legato.errors import (
    ConfigError,
    DamagedError,
    RestoreError,
    RunDirError,
    SummaryError,
)
from legato.summaries import SummaryManager, SummaryManagerInterface, events
from legato.summaries.events import EVENTS
from legato.types import Table
from tests.summary_files import read, read_below

matplotlib.use("agg")


@pytest.fixture
def manager(tmp_path):
    return SummaryManager(tmp_path / "board", global_step=4)


def written(manager, values):
    manager.write_summaries(values)
    manager.flush()
    return read(manager.summary_dir)


# -- the rules ---------------------------------------------------------------


@pytest.mark.parametrize(
    "value, number",
    [
        (0.5, 0.5),
        (3, 3.0),
        (True, 1.0),
        (np.float64(0.25), 0.25),
        (np.int32(7), 7.0),
        (np.array(0.5, "float32"), 0.5),
        (np.array(0.5, ml_dtypes.bfloat16), 0.5),
        (float("inf"), float("inf")),
        (10**400, float("inf")),
    ],
)
def test_numbers_are_curves(value, number, manager):
    assert written(manager, {"x": value}) == {"x": [(4, number)]}


@pytest.mark.parametrize("step", [0, 1, 127, 128, 300, 2**40])
def test_events_of_numbers_are_those_of_protocol_buffers(step, tmp_path):
    numbers = {
        "loss": 0.1,
        "zero": 0.0,
        "ä b/c": -1.5,
        "large": 1e300,
        "none": float("nan"),
        "infinite": float("-inf"),
        "x" * 200: 3.0,
    }
    made = events.protos()
    summary = made.Summary(value=events.scalar_values(numbers.items()))
    file = events.EventFile(tmp_path / "events")
    columns = {name: [0.0, number] for name, number in numbers.items()}
    file.write_table(12.5, Table([5, step], columns))
    file.flush()
    event = made.Event(wall_time=12.5, step=step, summary=summary)
    data = event.SerializeToString()
    assert (tmp_path / "events").read_bytes()[:-4].endswith(data)


def test_tensors_and_variables_of_the_backend(manager):
    tensor = keras.ops.convert_to_tensor([[0.0, 1.0], [2.0, 3.0]])
    found = written(
        manager,
        {
            "scalar": keras.ops.mean(tensor),
            "variable": keras.Variable(2.5),
            "half": keras.ops.cast(1.5, "bfloat16"),
            "histogram": tensor,
        },
    )
    assert found["scalar"] == [(4, 1.5)]
    assert found["variable"] == [(4, 2.5)]
    assert found["half"] == [(4, 1.5)]
    ((_, histogram),) = found["histogram"]
    assert (histogram[0], histogram[1], histogram[2]) == (0.0, 3.0, 4.0)


def test_texts(manager):
    text = "# A table\n\n| a | ü |\n|---|---|\n" * 50
    assert written(manager, {"note": text, "empty": ""}) == {
        "note": [(4, text)],
        "empty": [(4, "")],
    }


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "float32", ml_dtypes.bfloat16])
def test_pictures_have_the_right_pixels(channels, dtype, manager):
    generator = np.random.default_rng(channels)
    pixels = generator.integers(0, 256, (2, 5, 7, channels)).astype("uint8")
    given = pixels
    if dtype != "uint8":
        given = (pixels / 255).astype(dtype)
        pixels = np.rint(given.astype("float32") * 255).astype("uint8")
    found = written(manager, {"one": given[0], "several": given})
    squeeze = pixels[..., 0] if channels == 1 else pixels
    assert found == {
        "one": [(4, squeeze[0].tolist())],
        "several/0": [(4, squeeze[0].tolist())],
        "several/1": [(4, squeeze[1].tolist())],
    }


def test_floats_that_are_no_pixels_are_clipped(manager):
    values = np.array([-1.0, 0.0, 0.5, 1.0, 7.0, np.nan, np.inf, -np.inf])
    found = written(manager, {"x": values.reshape(1, 8, 1)})
    assert found["x"] == [(4, [[0, 0, 128, 255, 255, 0, 255, 0]])]


def test_of_many_pictures_the_first_ones(manager):
    with manager.summary_writer().as_default():
        summaries.image("x", np.zeros((5, 2, 2, 3)), max_images=2, step=1)
        summaries.image("none", np.zeros((0, 2, 2, 3)), step=1)
    manager.flush()
    assert sorted(read(manager.summary_dir)) == ["x/0", "x/1"]
    found = written(manager, {"many": np.zeros((20, 2, 2, 1), "uint8")})
    assert len([tag for tag in found if tag.startswith("many")]) == 8


@pytest.mark.parametrize(
    "array",
    [
        np.arange(10),
        np.zeros((4, 4, 2)),
        np.zeros((3, 3, 3), "int32"),  # neither uint8 nor floats
        np.array([True, False]),
        np.linspace(0, 1, 5).astype(ml_dtypes.bfloat16),
    ],
)
def test_other_arrays_are_histograms(array, manager):
    ((step, found),) = written(manager, {"x": array})["x"]
    numbers = array.astype("float64").ravel()
    minimum, maximum, count, total, squares, limits, buckets = found
    assert (step, count) == (4, numbers.size)
    assert (minimum, maximum) == (numbers.min(), numbers.max())
    assert (total, squares) == (numbers.sum(), (numbers**2).sum())
    assert sum(buckets) == numbers.size and len(limits) == len(buckets)


def test_the_buckets_of_a_histogram(manager):
    with manager.summary_writer().as_default():
        numbers = np.array([0.0, 1.0, 1.5, 4.0])
        summaries.histogram("x", numbers, step=2, bins=4)
    manager.flush()
    ((_, found),) = read(manager.summary_dir)["x"]
    assert found[5:] == ((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 0.0, 1.0))


@pytest.mark.parametrize(
    "numbers, count",
    [
        ([], 0),
        ([np.nan, np.inf], 0),
        ([1.0, np.nan, 2.0], 2),
        ([1e16, 1e16 + 2], 2),
        ([-1.7e308, 1.7e308], 2),
        ([5.0, 5.0], 2),
    ],
)
def test_histograms_of_odd_numbers(numbers, count, manager):
    ((_, found),) = written(manager, {"x": np.array(numbers)})["x"]
    assert found[2] == count
    assert sum(found[6]) == count


def drawing(**size):
    figure = matplotlib.figure.Figure(**(size or {"figsize": (2, 1)}))
    figure.add_subplot().plot([0, 1], [0, 1])
    return figure


def test_figures_are_drawn(manager):
    figure = drawing(figsize=(2, 1), dpi=50)
    figure.patch.set_facecolor((1.0, 0.0, 0.0))
    ((_, pixels),) = written(manager, {"x": figure})["x"]
    pixels = np.array(pixels)
    assert pixels.shape == (50, 100, 3)
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 2


def test_a_figure_is_closed_and_is_not_taken_twice(manager):
    from matplotlib import pyplot

    figure = pyplot.figure()
    manager.write_summaries({"x": figure})
    assert not pyplot.fignum_exists(figure.number)
    with pytest.raises(SummaryError, match=r"'y'.*given before.*a new one"):
        manager.write_summaries({"y": figure})
    manager.flush()
    assert pyplot.gcf() is not figure
    pyplot.close("all")


@pytest.mark.parametrize(
    "value, said",
    [
        (object(), "'x' is a object"),
        (None, "'x' is a NoneType"),
        ([1.0], "'x' is a list"),
        (1j, "'x' is a complex"),
        (np.array(["a"]), r"dtype <U1 and shape \(1,\)"),
        (np.array([1j]), "dtype complex128"),
        (np.array([object()]), "dtype object"),
        (b"bytes", "'x' is a bytes"),
    ],
)
def test_other_values_are_refused(value, said, manager):
    with pytest.raises(SummaryError, match=said) as caught:
        manager.write_summaries({"fine": 1.0, "x": value})
    assert "it must be a number or an array of shape []" in str(caught.value)
    assert "numpy.asarray, or leave it out" in str(caught.value)


def test_a_text_that_is_none_and_a_picture_without_pixels(manager):
    with pytest.raises(SummaryError, match="no Unicode text"):
        manager.write_summaries({"x": "\ud800"})
    with pytest.raises(SummaryError, match="at least one pixel"):
        manager.write_summaries({"x": np.zeros((0, 3, 3))})


@pytest.mark.parametrize("what", [np.zeros((2, 2, 3)), "figure"])
def test_without_pillow_the_remedy_is_named(what, manager, monkeypatch):
    value = drawing() if isinstance(what, str) else what
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(SummaryError, match=r"pip install 'legato\[plot\]'"):
        manager.write_summaries({"x": value})


@pytest.mark.parametrize(
    "function, wrong",
    [
        (summaries.scalar, "text"),
        (summaries.scalar, np.zeros(3)),
        (summaries.text, 3),
        (summaries.image, np.zeros((4, 4, 2))),
        (summaries.image, np.zeros((4, 4))),
        (summaries.histogram, "text"),
        (summaries.figure, np.zeros((4, 4, 3))),
    ],
)
def test_each_function_takes_its_own_kind(function, wrong, manager):
    with (
        manager.summary_writer().as_default(),
        pytest.raises(SummaryError, match="takes its own kind alone"),
    ):
        function("x", wrong, step=1)


# -- managers ----------------------------------------------------------------


def test_groups_are_directories(manager):
    manager.write_summaries(
        {
            "loss": 0.5,
            "train": {"iou": 0.75, "small": {"iou": 0.5}},
            "test": {"iou": 0.25},
            "empty": {},
        }
    )
    manager.flush()
    assert read_below(manager.summary_dir) == {
        ".": {"loss": [(4, 0.5)]},
        "test": {"iou": [(4, 0.25)]},
        "train": {"iou": [(4, 0.75)]},
        "train/small": {"iou": [(4, 0.5)]},
    }


def test_a_summary_function(tmp_path):
    calls = []

    def write(name, value, step):
        calls.append((name, value, step))
        if name.startswith("image/"):
            summaries.image(name, value, step)
        else:
            summaries.scalar(name, value, step=step)

    manager = SummaryManager(tmp_path, write, lambda: 6)
    picture = np.zeros((2, 2, 1), "uint8")
    manager.write_summaries({"image/x": picture, "group": {"y": 1.0}})
    manager.flush()
    assert calls == [("image/x", picture, 6), ("y", 1.0, 6)]
    assert read_below(tmp_path) == {
        ".": {"image/x": [(6, [[0, 0], [0, 0]])]},
        "group": {"y": [(6, 1.0)]},
    }


def test_global_steps(tmp_path):
    variable = keras.Variable(3, dtype="int64", trainable=False)
    steps = itertools.count(7)
    for step in (2, np.int64(1), variable, lambda: next(steps)):
        manager = SummaryManager(tmp_path, global_step=step)
        manager.write_summaries({"x": 1.0})
        variable.assign(9)
        manager.write_summaries({"x": 1.0})
        manager.close()
    found = [step for step, _ in read(tmp_path)["x"]]
    assert found == [2, 2, 1, 1, 9, 9, 7, 8]


@pytest.mark.parametrize("step", [-1, 1.5, "1", True, np.zeros(2), 2**63])
def test_what_is_no_step(step, tmp_path):
    with pytest.raises(ConfigError, match=r"global_step=.*must be a step"):
        SummaryManager(tmp_path, global_step=step)
    manager = SummaryManager(tmp_path, global_step=lambda: step)
    with pytest.raises(SummaryError, match=r"global_step=.*must be a step"):
        manager.write_summaries({"x": 1.0})


def test_without_a_step_it_is_that_of_the_run(tmp_path):
    manager = SummaryManager(tmp_path)
    with pytest.raises(SummaryError, match="global_step=None"):
        manager.write_summaries({"x": 1.0})
    with summaries.as_step(12):
        assert summaries.current_step() == 12
        manager.write_summaries({"x": 1.0})
        with manager.summary_writer("below").as_default():
            summaries.scalar("y", 2.0)
    assert summaries.current_step() is None
    manager.flush()
    assert read_below(tmp_path) == {
        ".": {"x": [(12, 1.0)]},
        "below": {"y": [(12, 2.0)]},
    }


def test_without_a_writer_or_a_step(manager):
    with pytest.raises(SummaryError, match="'x' has nowhere to go"):
        summaries.scalar("x", 1.0, step=1)
    with (
        manager.summary_writer().as_default(),
        pytest.raises(SummaryError, match="'x' has no step"),
    ):
        summaries.scalar("x", 1.0)


@pytest.mark.parametrize(
    "values, said",
    [
        ([1.0], r"summary_dict=\[1.0\]: it must be a dict"),
        (None, "summary_dict=None: it must be a dict"),
        ({3: 1.0}, "the name 3: names must be str"),
        ({"": 1.0}, "the name '': names must be str"),
        ({"../x": {"y": 1.0}}, "'../x' cannot be a directory"),
        ({"/x": {"y": 1.0}}, "'/x' cannot be a directory"),
        ({"a//b": {"y": 1.0}}, "'a//b' cannot be a directory"),
        ({".x": {"y": 1.0}}, "begin neither with a dot"),
        ({EVENTS: {"y": 1.0}}, "begin neither with a dot"),
        ({"x" * 300: {"y": 1.0}}, "at most 200 bytes"),
        ({"x\0": {"y": 1.0}}, "no null character"),
    ],
)
def test_names_and_dicts_that_are_none(values, said, manager):
    with pytest.raises(SummaryError, match=said):
        manager.write_summaries(values)


@pytest.mark.parametrize(
    "values",
    [
        {"top 1": 1.0, "top_1": 2.0},
        {"top 1": 1.0, "top:1": 2},
        {"/top 1": "text", "top_1": np.zeros((2, 3))},
    ],
)
def test_names_that_would_be_one_are_refused(values, manager):
    for number, (name, value) in enumerate(values.items()):
        manager.write_summaries({f"group {number}": {name: value}})
    with pytest.raises(SummaryError, match=r"'/?top 1' and 'top.1'.*Rename"):
        manager.write_summaries(values)


def test_a_name_of_slashes_is_none(manager):
    for value in (1.0, "text"):
        with pytest.raises(SummaryError, match=r"'//' has no name.*Rename"):
            manager.write_summaries({"//": value})


def test_bad_directories(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    for bad, said in (
        (file, "is there, and no directory"),
        (link, "is a symbolic link"),
        (None, "must be the path of a directory"),
        ("", "must be the path of a directory"),
        ("gs://bucket/x", "remote directory is not supported"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            SummaryManager(bad)
        assert "summary_dir=" in str(caught.value)
    with pytest.raises(ConfigError, match="summary_fn=3"):
        SummaryManager(tmp_path, 3)


def test_a_link_below_is_refused(tmp_path, manager):
    manager.summary_dir.mkdir()
    (manager.summary_dir / "x").symlink_to(tmp_path)
    with pytest.raises(RunDirError, match="symbolic link"):
        manager.write_summaries({"x": {"y": 1.0}})
    (manager.summary_dir / EVENTS).symlink_to(tmp_path / "victim")
    with pytest.raises(RunDirError, match="symbolic link"):
        manager.write_summaries({"y": 1.0})


def test_the_interface_is_abstract():
    assert issubclass(legato.SummaryManager, legato.SummaryManagerInterface)
    with pytest.raises(TypeError, match="flush, summary_writer, write_summ"):
        SummaryManagerInterface()
    assert legato.summaries is summaries


# -- the thread --------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch):
    """Histograms wait until they are let go."""
    from legato.summaries import values

    gate = threading.Event()
    real = values._histogram_value

    def wait(*arguments):
        assert gate.wait(10)
        return real(*arguments)

    monkeypatch.setattr(values, "_histogram_value", wait)
    return gate


def test_arrays_may_change_once_they_are_given(slow, manager):
    numbers, picture = np.zeros(5), np.zeros((2, 2, 1), "uint8")
    manager.write_summaries({"numbers": numbers, "picture": picture})
    numbers[:], picture[:] = 9, 9
    slow.set()
    manager.flush()
    found = read(manager.summary_dir)
    assert found["numbers"][0][1][1] == 0.0
    assert found["picture"] == [(4, [[0, 0], [0, 0]])]


def test_order_is_kept_and_flush_waits(slow, tmp_path):
    steps = itertools.count()
    manager = SummaryManager(tmp_path, global_step=lambda: next(steps))
    for _ in range(3):
        manager.write_summaries({"x": np.ones(3), "y": 1.0, "z": "text"})
    assert not read(tmp_path)
    threading.Timer(0.2, slow.set).start()
    manager.flush()
    found = read(tmp_path)
    assert [step for step, _ in found["x"]] == [0, 1, 2]
    assert [step for step, _ in found["y"]] == [0, 1, 2]
    assert [step for step, _ in found["z"]] == [0, 1, 2]
    assert manager.get_state() == {"": (tmp_path / EVENTS).stat().st_size}


def test_only_so_many_wait(slow, tmp_path):
    from legato.summaries import managers

    manager = SummaryManager(tmp_path, global_step=1)
    for _ in range(managers.MAX_WAITING):
        manager.write_summaries({"x": np.ones(3)})
    began = time.monotonic()
    threading.Timer(0.3, slow.set).start()
    manager.write_summaries({"x": np.ones(3)})
    assert time.monotonic() - began > 0.2
    manager.flush()
    assert len(read(tmp_path)["x"]) == managers.MAX_WAITING + 1


def test_no_thread_is_left(manager):
    manager.write_summaries({"x": np.ones(3)})
    manager.flush()
    until = time.monotonic() + 5
    while time.monotonic() < until:
        names = [thread.name for thread in threading.enumerate()]
        if "legato-summaries" not in names:
            return
        time.sleep(0.01)
    pytest.fail("the thread is still there")


def test_what_cannot_be_drawn_is_named_and_the_rest_is_there(manager):
    figure = drawing()
    figure.suptitle("$\\no{such}$")
    manager.write_summaries({"bad": figure, "good": np.ones(3)})
    with pytest.raises(SummaryError, match="'bad' of step 4 could not be made"):
        manager.flush()
    manager.flush()  # it is told once
    assert list(read(manager.summary_dir)) == ["good"]


def test_a_figure_is_let_go_when_it_is_drawn(manager):
    import weakref

    figure = drawing()
    alive = weakref.ref(figure)
    manager.write_summaries({"x": figure})
    del figure
    manager.flush()
    gc.collect()
    assert alive() is None


# -- files -------------------------------------------------------------------


def test_a_torn_event_is_cut_off_before_the_next(manager):
    written(manager, {"x": 1.0, "note": "text"})
    manager.close()
    path = manager.summary_dir / EVENTS
    whole = path.read_bytes()
    for cut in range(1, 40, 3):
        path.write_bytes(whole + whole[:cut])
        again = SummaryManager(manager.summary_dir, global_step=5)
        found = written(again, {"x": 2.0})
        again.close()
        assert found["x"] == [(4, 1.0), (5, 2.0)]
        assert path.read_bytes().startswith(whole)


def test_a_file_of_something_else_is_left_alone(manager):
    manager.summary_dir.mkdir()
    path = manager.summary_dir / EVENTS
    path.write_bytes(b"not events at all")
    with pytest.raises(DamagedError, match="at byte 0 begins no event"):
        manager.write_summaries({"x": 1.0})
    assert path.read_bytes() == b"not events at all"


def test_it_is_rewound_with_all_its_directories(manager):
    manager.write_summaries({"x": 1.0, "a": {"y": 1.0}})
    manager.flush()
    expected = read_below(manager.summary_dir)
    state = manager.get_state()
    manager.write_summaries({"x": 2.0, "a": {"y": 2.0}, "b/c": {"z": 2.0}})
    manager.write_summaries({"figure": drawing()})
    manager.set_state(state)
    assert read_below(manager.summary_dir) == expected
    assert manager.get_state() == state
    # A later process, to which only a killed one's files tell of "b/c".
    manager.write_summaries({"b/c": {"z": 2.0}})
    manager.close()
    later = SummaryManager(manager.summary_dir, global_step=4)
    later.set_state(state)
    assert read_below(manager.summary_dir) == expected
    later.set_state(None)
    assert read_below(manager.summary_dir) == {}
    later.close()


def test_short_files_and_states_that_are_none(manager):
    written(manager, {"x": 1.0, "a": {"y": 1.0}})
    state = manager.get_state()
    manager.close()
    path = manager.summary_dir / EVENTS
    os.truncate(path, path.stat().st_size - 1)
    short = SummaryManager(manager.summary_dir, global_step=5)
    with pytest.raises(DamagedError, match="records were removed"):
        short.set_state(state)
    short.close()
    for bad in ({"x": "y"}, [1], {"..": 1}, {"x": True}):
        with pytest.raises(RestoreError, match="log positions"):
            manager.set_state(bad)


def test_it_can_be_used_after_it_was_closed(manager):
    for number in (1.0, 2.0):
        manager.write_summaries({"x": number})
        manager.close()
    assert read(manager.summary_dir) == {"x": [(4, 1.0), (4, 2.0)]}


def test_a_claimed_manager_writes_files_of_its_own(manager):
    manager.write_summaries({"x": 1.0})
    manager.claim("-mine")
    manager.write_summaries({"x": 2.0})
    manager.set_state(None)
    manager.close()
    assert read(manager.summary_dir) == {"x": [(4, 1.0)]}


def test_numbers_need_no_protocol_buffers(tmp_path):
    """Their package imports PyTorch, where there is one: two seconds."""
    code = (
        "import sys\n"
        "from legato.sinks import RunLog\n"
        f"log = RunLog(__import__('pathlib').Path({str(tmp_path)!r}))\n"
        "log.write('train', 2, {'loss': 0.5})\n"
        "log.close()\n"
        "assert 'tensorboardX' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert read(tmp_path / "summaries/train") == {"loss": [(2, 0.5)]}
