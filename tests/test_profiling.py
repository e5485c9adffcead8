"""What a step costs: figures by hand, and costs that are known to be large.

The artificial costs are far above what a busy machine adds by chance; what is
small is never compared with what is small.
"""

import importlib.metadata
import io
import json
import math
import random
import sys
import tempfile
import time

import keras
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import legato
from legato import cli
from legato.errors import ConfigError
from legato.phases import NAMES, between
from legato.profiling import (
    Cost,
    Estimate,
    Profile,
    chart,
    limits,
    measuring,
)
from legato.profiling.estimates import (
    differences,
    estimate,
    take_turns,
    timed,
)
from legato.profiling.measuring import interval_of, validation_interval
from legato.schedule import Schedule
from legato.training import TrainSteps
from tests.slow_source import SlowSource

EXAMPLES, BATCH = 200, 16  # 12 batches and a partial one


# -- figures ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "share"),
    [("1%", 0.01), ("0.01", 0.01), (0.01, 0.01), (" 2.5 % ", 0.025)],
)
def test_a_budget_is_a_share_or_per_cent(budget, share):
    assert float(limits.parse_budget(budget)) == share


@pytest.mark.parametrize(
    "budget",
    [
        "0",
        "-1",
        "abc",
        "1",
        "100%",
        "0%",
        "-1%",
        "nan",
        "inf%",
        "",
        "%",
        0,
        True,
    ],
)
def test_what_is_no_budget(budget):
    with pytest.raises(ConfigError) as caught:
        limits.parse_budget(budget)
    assert f"budget={budget!r}: it must be a share" in str(caught.value)
    assert 'such as 0.01, or "1%"' in str(caught.value)


@pytest.mark.parametrize(
    ("per_call", "per_step", "budget", "interval"),
    [
        (30.0, 1000.0, "1%", 3),
        (30.1, 1000.0, "1%", 4),
        (29.0, 100.0, 0.29, 1),  # in floats, a little more than 1
        (7.0, 100.0, 0.07, 1),
        (1e6, 100.0, "0.5%", 2_000_000),
        (0.0, 100.0, "1%", 1),
        (-5.0, 100.0, "1%", 1),
    ],
)
def test_an_interval_within_a_budget(per_call, per_step, budget, interval):
    share = limits.parse_budget(budget)
    assert limits.interval_within(per_call, per_step, share) == interval
    if interval > 1:
        assert per_call / interval <= float(share) * per_step
        assert per_call / (interval - 1) > float(share) * per_step


def test_an_estimate_by_hand():
    found = estimate([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert found.noise == pytest.approx(2 * 1.2533 / 1.349 * 2 / 5**0.5)
    assert not estimate([1.0, 3.0, 1.0, 3.0, -2.0]).is_told
    assert estimate([-3.0, -3.0, -3.1]).is_told  # less than nothing is told
    assert not estimate([3.0, 3.0, 3.0], least_noise=4.0).is_told


def test_too_few_samples_tell_nothing():
    assert not estimate([1000.0]).is_told
    assert not estimate([1000.0, 1000.0]).is_told
    assert estimate([1000.0] * 3).is_told
    assert timed([1000.0]).is_told  # by itself; it is no difference


def test_a_machine_that_slows_down_makes_nothing_dear():
    bare, other = [10.0, 20.0, 40.0], [11.0, 21.0, 41.0]
    assert differences(other, bare) == [1.0, 1.0, 1.0]


class Turns:
    """A clock that is moved on by those whose turn it is."""

    def __init__(self):
        self.seconds, self.log = 0.0, []

    def contestant(self, name, seconds):
        def measure():
            self.seconds += seconds
            self.log.append(name)
            return float(len(self.log))

        return measure

    def take(self, until, told_until=0.0, max_rounds=9, **seconds):
        contestants = {n: self.contestant(n, s) for n, s in seconds.items()}
        return take_turns(
            contestants,
            until=until,
            told_until=told_until,
            max_rounds=max_rounds,
            clock=lambda: self.seconds,
        )


def test_turns_are_taken_until_the_time_is_up():
    turns = Turns()
    assert turns.take(7.0, a=1.0, b=2.0) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert turns.log == ["a", "b", "a", "b"]  # a third round would end at 9
    assert len(Turns().take(1e9, max_rounds=3, a=1.0)["a"]) == 3


def test_one_round_is_always_taken():
    assert Turns().take(0.5, a=10.0, b=10.0) == {"a": [1.0], "b": [2.0]}


def test_rounds_that_tell_something_may_take_longer():
    assert len(Turns().take(0.5, told_until=99.0, a=10.0)["a"]) == 3
    assert len(Turns().take(0.5, told_until=20.0, a=10.0)["a"]) == 2


def test_intervals_in_the_mean():
    assert interval_of(legato.Every(50)) == 50
    assert interval_of(legato.Sample(0.02)) == 50

    def between(**changes):
        fields = {
            "train_steps": 100,
            "steps_per_epoch": 10,
            "validation_interval": "epoch",
            "checkpoint_interval": None,
            "summary_interval": 0,
        }
        return validation_interval(Schedule(**(fields | changes)), 0)

    assert between() == 10
    assert between(validation_interval=7) == 7
    assert between(validation_freq=3) == 30
    assert between(validation_freq=frozenset({1, 2, 9, 11})) == 100 / 3
    assert between(validation_freq=frozenset({11})) is None


# -- what is shown ----------------------------------------------------------


def exactly(microseconds, noise=0.0):
    return Estimate(
        median=microseconds,
        low=0.9 * microseconds,
        high=1.1 * microseconds,
        noise=noise,
    )


def cost(name, kind, microseconds, interval=1, noise=0.0, detail=""):
    return Cost(
        name=name,
        kind=kind,
        per_call=exactly(microseconds, noise),
        interval=interval,
        us_bare=200.0,
        detail=detail,
    )


def by_hand(**changes):
    fields = {
        "task": "Digits",
        "backend": "jax",
        "mode": "fused",
        "steps_per_call": 22,
        "rounds": 25,
        "seconds": 29.6,
        "bare": exactly(200.0),
        "costs": [
            cost("accuracy", "metric", 3.0),
            cost("auc", "metric", 40.0, 50),
            cost("rare", "metric", 1.0, noise=2.5),
            cost("never", "metric", 7.0, None),
            cost("data", "data", -8.0),
            cost("Sleeper", "callback", 2100.0, detail="of it 80 µs since"),
            cost("summaries", "summaries", 400.0, 100),
            cost("validation", "validation", 9000.0, 90, detail="of a part"),
            cost("checkpoints", "checkpoints", 1200.0, 1000),
        ],
        "notes": ["something was left out"],
    }
    return Profile(**(fields | changes))


def test_a_cost_by_hand():
    auc = by_hand()["auc"]
    assert auc.us_per_step == 0.8
    assert auc.share == 0.8 / 200
    assert (auc.low, auc.high) == pytest.approx((0.72, 0.88))
    assert by_hand()["never"].us_per_step == 0
    with pytest.raises(KeyError, match=r"'nobody' is none of the costs: .*auc"):
        by_hand()["nobody"]


def test_intervals_by_hand():
    assert by_hand().intervals("1%") == {
        "accuracy": 2,
        "auc": 20,
        "rare": 2,  # of 2.5 us: what the noise may hide
        "never": 4,
        "summaries": 200,
        "validation": 4500,
        "checkpoints": 600,
    }


def test_a_table_as_text():
    text = by_hand().table("1%")
    first, _, second = text.partition("each time")
    costs, each = (
        {row.strip().split("  ")[0]: row for row in part.splitlines()}
        for part in (first, second)
    )
    assert "the bare step takes 200 µs (180 µs to 220 µs)." in first
    assert "fused, 22 steps in a device call; " in first
    assert "25 rounds, in 30 s" in first
    assert "0.80" in costs["metric auc"] and "0.72 to 0.88" in first
    assert "below the noise of 2.50 µs" in costs["metric rare"]
    assert costs["metric never"].endswith("off")
    assert "-8.00" in costs["data"] and "█" not in costs["data"]
    assert costs["callback Sleeper"].count("█") == 24  # the dearest
    assert "for 1 % (2.00 µs a step)" in second
    assert "40.0 µs" in each["metric auc"] and "50 steps" in each["metric auc"]
    assert each["metric auc"].endswith("legato.Every(20)")
    assert "below 2.50 µs" in each["metric rare"]
    assert "never" in each["metric never"]
    assert each["checkpoints"].endswith("checkpoint_interval: 600")
    assert "validation: of a part." in second
    assert "Note: something was left out." in second
    assert "Nothing was set" in second
    assert all(len(line) <= 80 for line in text.splitlines())
    without = by_hand().table()
    assert "a step)" not in without and "Nothing was set" not in without
    assert "metric accuracy" not in without.partition("each time")[2]


def test_where_the_time_goes_as_text():
    phases = {"plan": 1.0, "data": 0.0, "device": 299.0}
    text = by_hand(loop_steps=1200, phases=phases).table()
    rows = {row.strip().split("  ")[0]: row for row in text.splitlines()}
    assert "in the loop, 1,200 steps" in rows
    assert rows["device"].split()[1:] == ["299", "99.7", "█" * 24]
    assert rows["plan"].split()[1:] == ["1.00", "0.33", "▏"]
    assert rows["data"].split()[1:] == ["0.00", "0.00"]
    assert rows["a step of the loop"].split()[-2:] == ["300", "100"]
    assert "in the loop" not in by_hand().table()


def test_one_round_and_no_costs():
    uncertain = cost("accuracy", "metric", 3.0, noise=float("inf"))
    text = by_hand(rounds=1, costs=[uncertain], notes=[]).table("1%")
    assert "once" in text
    assert "3.00 µs? Too few rounds" in text
    assert "legato.Every" not in text
    assert by_hand(costs=[uncertain]).intervals("1%") == {}
    assert "bare step" in by_hand(costs=[]).table()


def test_colours_where_there_are_any_and_ascii_where_there_is_no_more():
    terminal = io.StringIO()
    chart.show(by_hand(), Console(file=terminal, force_terminal=True), "1%")
    assert "\x1b[" in terminal.getvalue()
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as file:
        chart.show(by_hand(), Console(file=file, width=80), "1%")
        file.flush()
        text = raw.getvalue().decode("ascii")
    assert "200 us" in text and "#" * 24 in text


@pytest.mark.any_backend
@pytest.mark.parametrize("name", ["costs.png", "costs.svg", "costs.pdf"])
def test_a_picture(tmp_path, name):
    path = tmp_path / name
    by_hand().plot(path)
    by_hand(costs=[]).plot(tmp_path / f"none-{name}")
    if name.endswith(".png"):
        with Image.open(path) as picture:
            picture.load()
            assert picture.size[0] > 1000
            colours = picture.convert("RGB").getcolors(1 << 20)
            assert len(colours) > 20
    assert path.stat().st_size > 1000


def test_pictures_that_cannot_be(tmp_path, monkeypatch):
    for path in (None, 3):
        with pytest.raises(ConfigError, match=f"plot={path}: it must be"):
            by_hand().plot(path)
    with pytest.raises(ConfigError, match=r"must end in \.png, \.svg or \.pdf"):
        by_hand().plot(tmp_path / "costs.gif")
    with pytest.raises(ConfigError, match=r"there is no directory .*gone"):
        by_hand().plot(tmp_path / "gone" / "costs.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'legato\[plot\]'"):
        by_hand().plot(tmp_path / "costs.png")
    assert list(tmp_path.iterdir()) == []


# -- measured ---------------------------------------------------------------


class Dear(keras.metrics.Metric):
    """Ten milliseconds or so of arithmetic that lead to nothing."""

    def __init__(self, name="dear"):
        super().__init__(name=name)
        self.total = self.add_weight(name="total", initializer="zeros")

    def update_state(self, labels, outputs, sample_weight=None):
        # Of the outputs, so that it cannot be computed ahead.
        numbers = keras.ops.arange(384 * 384, dtype="float32") / 384**2
        square = keras.ops.reshape(numbers, (384, 384)) * (
            keras.ops.mean(outputs)
        )
        for _ in range(4):
            square = keras.ops.matmul(square, square) / 384.0
        self.total.assign_add(keras.ops.mean(square))

    def result(self):
        return self.total


class Small(legato.Task):
    """A small classifier that keeps its model, as a user may.

    Args:
        metrics: what `build_metrics` returns in training.
        source: the class of the data.
    """

    def __init__(self, metrics=(), source=legato.ArraySource):
        self.network = keras.Sequential(
            [
                keras.Input((8,)),
                keras.layers.Dense(16, activation="tanh"),
                keras.layers.Dropout(0.2),
                keras.layers.Dense(3),
            ]
        )
        self.cross_entropy = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True
        )
        self.metrics, self.source = metrics, source

    def build_model(self):
        return self.network

    def build_optimizer(self):
        return keras.optimizers.Adam()

    def build_inputs(self, split):
        random = np.random.default_rng(0)
        x = random.normal(size=(EXAMPLES, 8)).astype("float32")
        y = random.integers(0, 3, EXAMPLES).astype("int32")
        kind = self.source if split == "train" else legato.ArraySource
        return kind((x, y), batch_size=BATCH)

    def build_losses(self, labels, model_outputs, aux_losses=None):
        return self.cross_entropy(labels, model_outputs)

    def build_metrics(self, training):
        return self.metrics if training else []


class Sleeper(keras.callbacks.Callback):
    """Sleeps at each batch, and remembers it."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []

    def on_train_batch_end(self, batch, logs=None):
        self.calls += 1
        self.seen.append(logs["loss"])
        time.sleep(0.02)


class AtEpochs(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        assert logs["val_loss"] > 0
        time.sleep(0.03)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The only place for temporary files; a working directory beside it."""
    for name in ("temporary", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.fixture
def five_rounds(monkeypatch):
    """However long they take on a busy machine: enough to tell noise by."""

    def turns(contestants, **limits):
        never = dict.fromkeys(("until", "told_until"), math.inf)
        return take_turns(contestants, max_rounds=5, **never)

    monkeypatch.setattr(measuring, "take_turns", turns)


def config(**changes):
    fields = {
        "train_steps": 100,
        "checkpoint_interval": 50,
        "steps_per_loop": 4,  # so that what is dear lasts not too long
    }
    return legato.TrainerConfig(**(fields | changes))


def test_metrics_are_told_apart(temporary, five_rounds):
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    rare = Dear("rare")
    task = Small({accuracy: legato.Every(1), rare: legato.Every(4)})
    before = [np.array(w) for w in task.network.get_weights()]
    random.seed(1)
    np.random.seed(1)
    first = random.getstate(), np.random.get_state()[1].tolist()
    profile = legato.profile(
        task, config=config(validation_interval=None), seconds=4
    )
    assert (random.getstate(), np.random.get_state()[1].tolist()) == first
    for weight, kept in zip(task.network.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, kept)
    assert list(temporary.iterdir()) == []

    assert profile.task == "Small"
    assert profile.backend == keras.config.backend()
    assert profile.us_per_step > 0
    cheap, dear = profile["accuracy"], profile["rare"]
    both = profile["all metrics"]
    assert dear.interval == 4
    assert dear.per_call.median > 1000
    assert dear.per_call.median > cheap.per_call.median
    assert dear.us_per_step == pytest.approx(dear.per_call.median / 4)
    # Together, at their intervals: about a quarter of the dear one.
    assert both.us_per_step < 0.7 * dear.per_call.median
    assert profile.intervals("1%")["rare"] >= limits.interval_within(
        dear.per_call.median, profile.us_per_step, limits.parse_budget("1%")
    )
    kinds = {each.kind for each in profile.costs}
    assert "validation" not in kinds and "callback" not in kinds


def test_compilations_of_the_loop_are_their_own(temporary, monkeypatch):
    told = []
    run = TrainSteps.run

    def noting(steps, step, chunk):
        phases = steps._phases
        before = phases.read()
        began = time.perf_counter()
        logs = run(steps, step, chunk)
        told.append(
            (
                sys._getframe(1).f_globals["__name__"],
                time.perf_counter() - began,
                between(before, phases.read())["compile"],
            )
        )
        return logs

    monkeypatch.setattr(TrainSteps, "run", noting)
    profile = legato.profile(
        Small({}), config=config(validation_interval=None), seconds=1
    )
    in_loop = [each[1:] for each in told if each[0] == "legato.loop"]
    # The first call there has batches from the host, and is compiled again.
    seconds, compiling = in_loop[0]
    assert compiling > 0.5 * seconds
    assert profile.loop_steps > 0 and profile.phases["compile"] == 0


@pytest.mark.any_backend
def test_callbacks_and_data_are_told(temporary, five_rounds):
    log = temporary / "log.csv"
    log.write_text("of another run\n")
    sleeper = Sleeper()

    class OfItsOwn(Small):
        def build_callbacks(self):
            return [AtEpochs()]

    callbacks = [
        [sleeper],
        keras.callbacks.CSVLogger("log.csv"),
        keras.callbacks.ModelCheckpoint("best.keras", save_best_only=True),
    ]
    profile = legato.profile(
        OfItsOwn(source=SlowSource),
        config=config(train_metrics_interval=0, validation_interval=2),
        callbacks=callbacks,
        seconds=6,
    )
    assert (sleeper.calls, sleeper.seen) == (0, [])
    assert callbacks[1].filename == "log.csv"
    assert callbacks[2].filepath == "best.keras"
    assert log.read_text() == "of another run\n"
    assert list(temporary.iterdir()) == [log]

    assert profile["Sleeper"].us_per_step > 10_000
    epochs = profile["AtEpochs"]
    assert epochs.per_call.median >= 30_000
    assert epochs.interval == -(-EXAMPLES // BATCH)
    assert profile["CSVLogger"].kind == "callback"
    assert profile["data"].us_per_step > 4000
    for name, interval in (
        ("summaries", 100),
        ("validation", 2),
        ("checkpoints", 50),
    ):
        assert profile[name].interval == interval
        assert profile[name].is_told and profile[name].us_per_step > 0
    assert not [each for each in profile.costs if each.kind == "metric"]
    # All of it in the loop, where what is not waited for costs nothing.
    assert 0 < profile.loop_steps < 100
    assert profile.phases["delivery"] > 20_000
    assert profile.phases["device"] + profile.phases["launch"] > 0
    assert profile.phases["validation"] > 0


def test_plug_in_sinks_are_not_made(temporary, monkeypatch):
    made = []
    point = importlib.metadata.EntryPoint("tracker", "tracker:make", "")
    monkeypatch.setattr(type(point), "load", lambda self: made.append)
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point]
    )
    settings = config(sinks=["tracker", "csv"], validation_interval=None)
    profile = legato.profile(Small(), config=settings, seconds=0.1)
    assert profile["summaries"].kind == "summaries"
    assert made == []
    with pytest.raises(ConfigError, match="there is no sink 'trackr'"):
        legato.profile(Small(), config=settings.replace(sinks=["trackr"]))


class TakesApart(Small):
    """Its step needs its metrics by place."""

    def process_metrics(self, metrics, labels, model_outputs):
        first, second = metrics
        first.update_state(labels, model_outputs)
        second.update_state(labels, model_outputs)


class OneShot(legato.ArraySource):
    is_one_shot = True

    def iterate(self, *, seed, capacity):
        iterator = super().iterate(seed=seed, capacity=capacity)
        iterator.close = lambda: None
        return iterator


@pytest.mark.any_backend
def test_what_cannot_be_measured_is_said(temporary):
    task = TakesApart(
        [keras.metrics.SparseCategoricalAccuracy(name="accuracy"), Dear()],
        source=OneShot,
    )
    profile = legato.profile(
        task,
        config=config(train_metrics_interval=0, validation_interval=None),
        callbacks=[keras.callbacks.RemoteMonitor()],
        seconds=2,
    )
    notes = " ".join(profile.notes)
    assert "cannot do without some of its metrics" in notes
    assert "the data can be read only once" in notes
    assert "RemoteMonitor sends to a server" in notes
    assert profile["dear"].per_call.median > 1000
    # They are off, as the config says, and can be asked about all the same.
    assert profile["dear"].interval is None and profile["dear"].share == 0
    assert "data" not in [each.name for each in profile.costs]
    assert (profile.loop_steps, profile.phases) == (0, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "digits"}, "task='digits': it must be an object of"),
        ({"config": {}}, "config={}: it must be a legato.TrainerConfig"),
        ({"callbacks": [Sleeper]}, "make one of the class: `Sleeper()`"),
        ({"seconds": 0}, "seconds=0: it must be a number of seconds above 0"),
        ({"seconds": "5"}, "seconds='5': it must be"),
        ({"config": legato.TrainerConfig()}, "give train_steps or epochs"),
        (
            {"config": legato.TrainerConfig(epochs=2, initial_epoch=2)},
            "no step is trained",
        ),
    ],
)
def test_wrong_arguments(temporary, changes, message):
    arguments = {"task": Small(), "config": config()} | changes
    with pytest.raises(ConfigError) as caught:
        legato.profile(arguments.pop("task"), **arguments)
    assert message in str(caught.value)


def test_a_step_that_is_wrong_is_the_users(temporary):
    class Wrong(Small):
        def build_losses(self, labels, model_outputs, aux_losses=None):
            raise ZeroDivisionError("in the user's code")

    with pytest.raises(ZeroDivisionError, match="in the user's code"):
        legato.profile(Wrong([Dear()]), config=config())


@pytest.mark.any_backend
def test_the_command(temporary, capsys):
    command = [
        "profile",
        "digits",
        "trainer.train_steps=200",
        "--seconds=2",
        "--budget=1%",
        "--plot=costs.png",
    ]
    assert cli.main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["task"] == "Digits"
    names = [each["name"] for each in report["costs"]]
    assert names[:3] == ["accuracy", "logs", "data"]
    assert report["loop_steps"] > 0
    assert tuple(report["phases"]) == NAMES
    named = report["intervals"].keys() - {"accuracy"}  # if it can be told
    assert named == {"summaries", "validation", "checkpoints"}
    assert "legato: measuring" in err and "drawn: costs.png" in err
    with Image.open("costs.png") as picture:
        picture.verify()
    assert [path.name for path in temporary.iterdir()] == ["costs.png"]


@pytest.mark.any_backend
def test_the_command_as_text(temporary, capsys):
    command = ["profile", "digits", "trainer.train_steps=200", "--seconds=1"]
    assert cli.main([*command, "--budget=0.02"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Digits on {keras.config.backend()}: ")
    assert "metric accuracy" in out and "checkpoint_interval:" in out
    assert "a step of the loop" in out
    assert "\x1b" not in out
    assert list(temporary.iterdir()) == []
