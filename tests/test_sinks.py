"""What people read: JSON lines and TensorBoard's curves, and their rewind."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

from legato.errors import RestoreError, RunDirError
from legato.summaries import METRICS, RunLog


def curves(run_dir, split):
    events = EventAccumulator(str(run_dir / "summaries" / split))
    events.Reload()
    return {
        tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def records(run_dir):
    lines = (run_dir / METRICS).read_text().splitlines()
    return [json.loads(line) for line in lines]


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


def test_a_rewound_log_is_that_of_the_run_that_was_never_ahead(tmp_path):
    def write(log, steps):
        for step in steps:
            log.write("train", step, {"loss": float(step)})
            if step % 3 == 0:
                log.write("validation", step, {"loss": -float(step)})
            log.flush()

    whole = tmp_path / "whole"
    whole.mkdir()
    log = RunLog(whole)
    write(log, range(1, 9))
    expected = log.get_state()
    log.close()

    killed = tmp_path / "killed"
    killed.mkdir()
    log = RunLog(killed)
    write(log, [1, 2])
    state = log.get_state()  # before the first validation
    write(log, [3, 4, 5])
    log.write("train", 6, {"loss": 6.0})  # in memory when it is killed
    del log

    log = RunLog(killed)
    log.rewind(state)
    assert curves(killed, "validation") == {}
    write(log, range(3, 9))
    assert log.get_state() == expected
    log.close()
    for split in ("train", "validation"):
        assert curves(killed, split) == curves(whole, split) != {}
    assert (killed / METRICS).read_bytes() == (whole / METRICS).read_bytes()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    log = RunLog(tmp_path)
    log.write("train", 1, {"loss": 9.0})
    log.flush()
    log = RunLog(tmp_path)
    log.rewind(None)
    log.write("train", 1, {"loss": 1.0})
    log.close()
    assert curves(tmp_path, "train") == {"loss": [(1, 1.0)]}
    assert len(records(tmp_path)) == 1


def test_lost_lines_are_named_and_can_be_done_without(tmp_path):
    log = RunLog(tmp_path)
    log.write("train", 1, {"loss": 1.0})
    state = log.get_state()
    log.close()
    (tmp_path / METRICS).unlink()
    log = RunLog(tmp_path)
    with pytest.raises(RestoreError, match=r"metrics\.jsonl.*override"):
        log.rewind(state)
    log.rewind(state, lenient=True)
    log.close()


@pytest.mark.parametrize("state", [3, {"metrics.jsonl": "x"}, ["a"]])
def test_what_is_no_position_is_refused(tmp_path, state):
    log = RunLog(tmp_path)
    with pytest.raises(RestoreError, match="log positions"):
        log.rewind(state)
    log.close()


@pytest.mark.parametrize("name", ["summaries", "summaries/x"])
def test_a_link_among_the_summaries_is_refused(name, tmp_path):
    outside = tmp_path / "outside"
    run_dir = tmp_path / "run"
    (run_dir / "summaries").mkdir(parents=True)
    outside.mkdir()
    victim = outside / "events.out.tfevents.legato"
    victim.write_bytes(b"x" * 100)
    if name == "summaries":
        (run_dir / name).rmdir()
    (run_dir / name).symlink_to(outside)
    with pytest.raises(RunDirError, match="symbolic link"):
        RunLog(run_dir).rewind(None)
    assert victim.stat().st_size == 100
