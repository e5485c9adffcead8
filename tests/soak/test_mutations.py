"""A short form of what `mutations.py` does thousands of times."""

import random

import pytest

from tests.soak import mutations


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("original") / "run"
    run_dir.mkdir()
    mutations.train(run_dir)
    return run_dir


@pytest.mark.parametrize("kind", mutations.DAMAGES)
def test_damage_is_found_and_the_one_before_used(kind, run, tmp_path):
    for i in range(6):
        rng = random.Random(f"test {kind} {i}")
        assert not mutations.damage_once(run, tmp_path / "work", kind, rng)


def test_a_forgery_is_refused_or_taken(run, tmp_path):
    for i in range(12):
        rng = random.Random(f"test forgery {i}")
        what, problem = mutations.forge_once(run, tmp_path / "work", rng)
        assert not problem, (what, problem)


def test_the_search_can_fail(run, tmp_path, monkeypatch):
    monkeypatch.setitem(mutations.DAMAGES, "nothing", lambda *args: None)
    rng = random.Random(0)
    found = mutations.damage_once(run, tmp_path / "work", "nothing", rng)
    assert "not detected" in found
