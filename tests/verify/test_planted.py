"""Faults that were planted are found, and named rightly."""

from pathlib import Path

import keras
import pytest

from legato.verify import Target, verify
from legato.verify.children import Process
from tests.processes import compiled_by, context, keep_compiled
from tests.verify import planted


def _run(spec, output):
    import contextlib

    from legato.verify import child

    keep_compiled(compiled_by("one"))
    with (
        Path(output).open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        child.main(spec)


class Forked(Process):
    """A process forked from a server that has imported what is slow."""

    def __init__(self, spec, output):
        self._process = context().Process(target=_run, args=(spec, output))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        return self._process.exitcode

    def kill(self):
        self._process.kill()


def check(name, tmp_path, kills=2, seed=0):
    target = Target(
        function={"module": planted.__name__, "name": name, "file": None},
        backend=keras.config.backend(),
    )
    work = tmp_path / "work"
    return verify(target, kills=kills, seed=seed, work=work, start=Forked)


def causes(verdict):
    return "\n".join(each.what for each in verdict.causes)


def test_without_a_fault(tmp_path):
    verdict = check("sound", tmp_path, kills=4)
    assert verdict.is_exact, (verdict, causes(verdict))
    assert verdict.causes == []
    assert len(verdict.kills) >= 3
    kinds = {each.kind for each in verdict.comparison.compared}
    assert kinds >= {"checkpoint", "final", "log", "history"}
    assert verdict.comparison.num_bytes > 5000


def fault(name, *words):
    """One of plain Python, whatever the backend."""
    return pytest.param(name, list(words), marks=pytest.mark.any_backend)


@pytest.mark.parametrize(
    "name, words",
    [
        fault("uncapturable", "Rates.0", "rates", "get_state"),
        fault(
            "generator", "default_rng() without a seed", "batches (planted.p"
        ),
        fault("transform", "numpy", "jittered"),
        fault("clock", "time.time is called", "rate (planted.py"),
        # These are found in what the backend holds, or compiled.
        ("unseeded", ["seed of dropout", "before keras.utils.set_random_seed"]),
        ("reseeded", ["seed"]),
        ("counted", ["planted.COUNT", "Counting.train_step (planted.py"]),
    ],
)
def test_a_planted_fault(name, words, tmp_path):
    verdict = check(name, tmp_path)
    assert not verdict.is_exact
    told = f"{verdict.failure}\n{causes(verdict)}"
    for word in words:
        assert word in told, told
