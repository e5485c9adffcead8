"""One experiment on two backends: the same losses, to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.contracts import across, by_hand
from tests.contracts.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]

REFERENCE = "jax"


@pytest.fixture
def reference_losses(tmp_path):
    """Waits for what a process that began with the test found.

    It has as much to import and to compile as the test, and does it at the
    same time.
    """
    if keras.config.backend() == REFERENCE:
        # It is held to the same experiments written by hand.
        yield lambda: {name: losses_by_hand(name) for name in across.NAMES}
        return
    out = tmp_path / "reference.json"
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.contracts.across", str(out)],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": REFERENCE},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def wait():
        output, _ = child.communicate(timeout=300)
        assert child.returncode == 0, output
        report = json.loads(out.read_text())
        assert report["backend"] == REFERENCE
        return report["losses"]

    with child:
        yield wait
        child.kill()  # in case that the test failed before


def losses_by_hand(name):
    scenario = SCENARIOS[name]
    task = scenario.make_task()
    model, optimizer = task.build_model(), task.build_optimizer()
    across.same_everywhere(model)
    step = by_hand.HAND[name](task, model, optimizer)
    logs = by_hand.train(step, task, scenario.config["seed"], across.STEPS)
    return [float(each["loss"]) for each in logs]


def differences(ours, theirs):
    """The scenarios whose losses differ, and by how much."""
    found = []
    for name in across.NAMES:
        assert len(ours[name]) == len(theirs[name]) == across.STEPS
        error = np.abs(np.divide(ours[name], theirs[name]) - 1)
        if not np.all(error <= 1e-4):
            found.append(
                f"{name}: {np.max(error):.1e}, first at step "
                f"{np.argmax(~(error <= 1e-4)) + 1}"
            )
    return found


def test_losses_agree_across_backends(reference_losses, tmp_path):
    ours = {name: across.train(name, tmp_path / name) for name in across.NAMES}
    assert not differences(ours, reference_losses())
    for name, losses in ours.items():
        first, last = np.mean(losses[:5]), np.mean(losses[-5:])
        assert last < first, f"{name} has learned nothing"


def test_a_difference_is_found():
    ours = {name: [1.0] * across.STEPS for name in across.NAMES}
    theirs = {**ours, "nested": [1.0] * 19 + [1.0002]}
    assert differences(ours, theirs) == ["nested: 2.0e-04, first at step 20"]
