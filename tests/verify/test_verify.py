"""`legato verify` and `assert_resumes_exactly`, as users call them."""

import json
import random
import time

import keras
import numpy as np
import pytest

from legato.cli import main
from legato.diff import ArrayDifference, ValueDifference
from legato.errors import VerifyError
from legato.sinks import RunLog
from legato.testing import assert_resumes_exactly, explain
from legato.verify import Target, _validates, verify
from legato.verify.board import Board, Phase
from legato.verify.diagnosis import part_of
from legato.verify.watching import UNSEEDED, Calls, is_users, read_globals
from tests.verify import planted
from tests.verify.test_planted import Forked


@pytest.mark.any_backend
def test_the_command(tmp_path, capsys, monkeypatch):
    """New interpreters, as users have them."""
    monkeypatch.chdir(tmp_path)
    arguments = ["digits", "--kills", "1", "--steps", "20", "--json"]
    overrides = ["trainer.validation_interval=10"]
    backend = ["--backend", "jax"]  # the quickest to import
    keep = ["--keep", str(tmp_path / "kept")]
    status = main(["verify", *arguments, *overrides, *backend, *keep])
    report = json.loads(capsys.readouterr().out)
    assert status == 0, report
    assert report["exact"]
    assert report["last_step"] == 20
    assert report["bytes"] > 100_000
    assert not (tmp_path / "runs").exists()
    # What was kept can be looked at.
    kept = [str(tmp_path / "kept" / name) for name in ("peaceful", "killed")]
    assert main(["diff", *kept]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "no such experiment"),
        (["digits", "--kills", "0"], "kills=0: it must be 1 or more"),
        (["digits", "trainer.train_step=3"], "did you mean"),
        (["digits", "--steps", "0"], "train_steps"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    assert main(["verify", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


def test_too_short_a_run(tmp_path):
    def start(spec, output):
        return Forked(spec, output)

    target = Target(
        config="digits",
        overrides=("trainer.epochs=null", "trainer.train_steps=1"),
        backend=keras.config.backend(),
    )
    verdict = verify(target, kills=1, work=tmp_path / "work", start=start)
    assert not verdict.is_exact
    assert "1 steps: it must have 2 or more" in verdict.failure


def test_a_directory_that_is_not_empty(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(VerifyError, match="holds something"):
        verify(Target(config="digits"), work=tmp_path)


@pytest.mark.parametrize("train", [lambda run_dir: None, 3, Forked.wait])
def test_functions_that_no_process_can_import(train):
    if train is Forked.wait:
        train = _inner()
    with pytest.raises(VerifyError, match="one of a module"):
        assert_resumes_exactly(train)


def _inner():
    def train(run_dir):
        del run_dir

    return train


def elsewhere(run_dir):
    return planted.fit(planted.model(), run_dir.parent / "mine", batch_size=8)


@pytest.mark.any_backend
def test_a_function_that_trains_elsewhere(tmp_path):
    with pytest.raises(AssertionError, match="train where it is told"):
        assert_resumes_exactly(elsewhere, work=tmp_path / "work")


# -- parts --------------------------------------------------------------------


def test_the_board(tmp_path):
    with Board(tmp_path / "b") as ours, Board(tmp_path / "b") as theirs:
        assert ours.read() == (Phase.STARTING, 0, -1)
        theirs.write(Phase.SAVING, 12, 10)
        assert ours.read() == (Phase.SAVING, 12, 10)


def test_calls_from_users_code_are_noted_once():
    found = []
    calls = Calls(found.append)
    now = calls.watch("time.time", time.time)
    for _ in range(3):
        assert abs(now() - time.time()) < 1
    draw = calls.watch("random.random", random.random)
    sorted([1, 2], key=lambda each: draw())
    assert [each["name"] for each in found] == ["time.time", "random.random"]
    assert found[0]["function"].startswith("test_calls_from_users_code")
    assert found[0]["line"] > 1
    assert UNSEEDED.startswith("numpy.random.default_rng")


def test_what_is_the_users():
    assert is_users(__file__)
    assert not is_users(np.__file__)
    assert not is_users(random.__file__)
    assert not is_users(assert_resumes_exactly.__code__.co_filename)
    assert not is_users("<string>")


def test_globals_are_read_through_functions(monkeypatch):
    before = read_globals([planted.Counting()])
    assert before["tests.verify.planted.COUNT"]["value"] == "0"
    monkeypatch.setattr(planted, "COUNT", 5)
    now = read_globals([planted.Counting()])
    assert now["tests.verify.planted.COUNT"]["value"] == "5"
    assert not any("keras" in name for name in now)


@pytest.mark.parametrize(
    "path, words",
    [
        ("model/1_dense/kernel", "the model's kernel of 1_dense"),
        ("optimizer/learning_rate", "the learning rate"),
        ("callbacks.Rates.0.attributes.wait", "the callback Rates.0's wait"),
        ("data.batch", "the position in the data"),
        ("random.numpy.position", "a global generator"),
    ],
)
def test_parts_have_names(path, words):
    difference = ValueDifference(path=path, before=1, after=2)
    assert words in part_of(difference)


def test_what_is_wrong_is_explained():
    from legato.verify import Cause, FirstDifference, Verdict

    difference = ArrayDifference(
        path="model/kernel",
        dtype="float32",
        shape=(2,),
        differing=1,
        size=2,
        max_abs=0.5,
        max_ulp=3,
    )
    first = FirstDifference(
        step=7, after=6, name="step_00000007", differences=[difference]
    )
    cause = Cause(what="the clock", remedy="Do not.")
    text = explain(
        Verdict(
            is_exact=False,
            kills=[],
            first=first,
            is_repeatable=False,
            causes=[cause],
        )
    )
    assert "at step 7 (step 6 was the same)" in text
    assert "1 of 2 elements differ, by at most 0.5 (3 ULP)" in text
    assert text.endswith("Likely cause: the clock. Do not.")


def test_it_kills_in_validations_where_there_are_any(tmp_path):
    for kind in ("train", "validation"):
        log = RunLog(tmp_path, sinks=[])
        log.write(kind, 5, {"loss": 0.5})
        log.close()
        assert _validates(tmp_path) == (kind == "validation")
