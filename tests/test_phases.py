"""What the loop says that its time was spent on."""

import json
import time

import keras
import numpy as np
import pytest

import legato
from legato import storage
from legato.phases import COMPILE, DATA, DEVICE, LAUNCH, NAMES, Phases, between
from tests.linear import Linear
from tests.slow_source import SlowSource

STEPS = 12
SLEEP = 0.05
SLACK = 0.5
"""Seconds that a busy machine may take between two clocks; or half of all that
it takes."""

QUICK = SLEEP * STEPS / 2
"""Seconds that data take at most where nothing makes them slow."""


class Hand:
    """A clock that is set by hand, in nanoseconds."""

    def __init__(self):
        self.now = 5_000_000_000

    def __call__(self):
        return self.now


def test_phases_add_up():
    clock = Hand()
    phases = Phases(clock)
    start = phases.read()
    for phase, seconds in (
        (DATA, 1),
        (DEVICE, 2),
        (DATA, 4),
    ):
        phases.enter(phase)
        clock.now += seconds * 10**9
    spent = between(start, phases.read())
    assert tuple(spent) == NAMES
    assert {k: v for k, v in spent.items() if v} == {"data": 5, "device": 2}
    middle = phases.read()
    clock.now += 10**9  # the last one goes on
    spent = between(middle, phases.read())
    assert spent["data"] == sum(spent.values()) == 1


def test_a_phase_within_another():
    clock = Hand()
    phases = Phases(clock)
    start = phases.read()
    phases.enter(LAUNCH)
    with pytest.raises(ZeroDivisionError), phases.within(COMPILE):
        clock.now += 3 * 10**9
        raise ZeroDivisionError
    clock.now += 10**9
    spent = between(start, phases.read())
    assert (spent["compile"], spent["launch"]) == (3, 1)


class Slow(SlowSource):
    secs = SLEEP


class Timed(Linear):
    """Trains and validates on a few batches.

    Args:
        slow: the split whose data are slow to come.
        work: size of a matrix whose powers each step computes.
    """

    def __init__(self, slow=None, work=0):
        self.slow, self.work = slow, work

    def build_inputs(self, split):
        x = np.ones((2 * STEPS, 2), "float32")
        kind = Slow if split == self.slow else legato.ArraySource
        return kind((x, x[:, :1]), batch_size=4)

    def build_losses(self, labels, model_outputs, aux_losses=None):
        loss = keras.ops.mean((labels - model_outputs) ** 2)
        if self.work:
            # Of the loss, so that it is not computed once for all.
            square = keras.ops.ones((self.work, self.work)) * loss
            for _ in range(8):
                square = keras.ops.matmul(square, square) / self.work
                square = keras.ops.tanh(square)  # whatever the loss is
            loss += 1e-6 * keras.ops.mean(square)
        return loss


class Watch(keras.callbacks.Callback):
    """When training began and ended, by another clock."""

    def on_train_begin(self, logs=None):
        self.began = time.monotonic()

    def on_train_end(self, logs=None):
        self.seconds = time.monotonic() - self.began


class SlowAtBatches(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        time.sleep(SLEEP)


class SlowAtEpochs(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        time.sleep(4 * SLEEP)


def train(folder, task, *callbacks, **changes):
    """Returns the records of `timing.jsonl`, and seconds by phase."""
    fields = {
        "train_steps": STEPS,
        "summary_interval": 4,
        "checkpoint_interval": 100,
        "validation_interval": None,
        "progress": "none",
    }
    watch = Watch()
    legato.Trainer(
        task,
        run_dir=folder,
        config=legato.TrainerConfig(**(fields | changes)),
        callbacks=[watch, *callbacks],
    ).train()
    lines = (folder / "timing.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    spent = {n: sum(r["phases"][n] for r in records) for n in NAMES}
    assert sum(record["steps"] for record in records) == STEPS
    for record in records:
        whole = sum(record["phases"].values())
        assert whole == pytest.approx(record["seconds"], abs=2e-5)
        assert record["steps_per_sec"] == pytest.approx(
            record["steps"] / record["seconds"], rel=0.01
        )
    slack = max(SLACK, watch.seconds / 2)
    assert watch.seconds - slack < sum(spent.values()) <= watch.seconds
    return records, spent


def train_quickly(folder, task, *callbacks, **changes):
    """Returns seconds by phase of a run whose data were quick to come.

    A busy machine may be late with them now and then.
    """
    for number in range(4):
        _, spent = train(folder / str(number), task, *callbacks, **changes)
        if spent["data"] < QUICK:
            break
    assert spent["data"] < QUICK
    return spent


def test_a_record_for_each_interval(tmp_path, monkeypatch):
    monkeypatch.setattr("legato.recorder.TIMING_SECONDS", 0.0)
    records, spent = train(tmp_path, Timed(), steps_per_loop=1)
    # Epochs end at 6 and 12, the last of which is a summary's too; after it
    # comes the last checkpoint.
    assert [(r["step"], r["steps"]) for r in records] == [
        (4, 4),
        (6, 2),
        (8, 2),
        (12, 4),
        (12, 0),
    ]
    assert spent["compile"] > 0
    assert records[-1]["phases"]["checkpoint"] > 0
    assert records[-1]["phases"]["validation"] == 0


def test_summaries_write_no_record_that_is_as_good_as_the_last(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("legato.recorder.TIMING_SECONDS", 1e6)
    records, _ = train(tmp_path, Timed(), steps_per_loop=1)
    assert [(r["step"], r["steps"]) for r in records] == [
        (6, 6),
        (12, 6),
        (12, 0),
    ]


def test_without_summaries(tmp_path):
    records, _ = train(tmp_path, Timed(), summary_interval=0)
    assert [record["step"] for record in records] == [6, 12, 12]


def test_slow_data(tmp_path):
    _, spent = train(tmp_path, Timed("train"), steps_per_loop=1)
    # A batch may be made while the first step compiles.
    assert spent["data"] >= (STEPS - 2) * SLEEP > QUICK
    train_quickly(tmp_path / "quick", Timed(), steps_per_loop=1)


def test_a_slow_callback(tmp_path):
    spent = train_quickly(tmp_path, Timed(), SlowAtBatches())
    assert spent["delivery"] >= STEPS * SLEEP


def test_a_slow_end_of_the_epoch(tmp_path):
    _, spent = train(tmp_path, Timed(), SlowAtEpochs())
    assert spent["delivery"] >= 8 * SLEEP


def test_a_slow_validation(tmp_path):
    slow = Timed("validation")
    spent = train_quickly(tmp_path, slow, validation_interval=6)
    # Of what is drawn ahead, the first comes while it is traced.
    assert spent["validation"] >= 8 * SLEEP


def test_a_slow_place_for_checkpoints(tmp_path, monkeypatch):
    def slow(*args, commit=storage.commit_directory, **kwargs):
        time.sleep(2 * SLEEP)
        return commit(*args, **kwargs)

    monkeypatch.setattr(storage, "commit_directory", slow)
    _, spent = train(tmp_path, Timed(), checkpoint_interval=1)
    # The first two need not wait, nor what trains while others are written.
    assert spent["checkpoint"] >= (STEPS - 3) * SLEEP


def test_a_slow_step(tmp_path):
    _, spent = train(tmp_path, Timed(work=512), steps_per_loop=1)
    working = spent["device"] + spent["launch"]
    others = sum(
        spent[name]
        for name in ("plan", "data", "transfer", "delivery", "checkpoint")
    )
    assert working > others
    if keras.config.backend() != "jax":  # the calls wait for their work
        assert spent["device"] > 10 * spent["launch"]
        assert spent["transfer"] > 0


def test_no_checkpoint_knows_of_it(tmp_path):
    train(tmp_path, Timed(), checkpoint_interval=4)
    hosts = list(tmp_path.glob("checkpoints/*/host.json"))
    assert len(hosts) == 3
    for path in hosts:
        assert '"phases"' not in path.read_text()
        assert "steps_per_sec" not in path.read_text()
