"""One experiment on two backends: the same losses, to rounding."""

import keras
import numpy as np

from tests.contracts import across, by_hand
from tests.contracts.scenarios import SCENARIOS


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


def test_losses_agree_across_backends(tmp_path):
    ours = {name: across.train(name, tmp_path / name) for name in across.NAMES}
    theirs = across.read_losses()
    # A scenario that was changed: run `tests.contracts.across` on the
    # reference once more.
    assert not differences(ours, theirs)
    if keras.config.backend() == across.REFERENCE:
        # It is itself held to the same experiments written by hand.
        written = {name: losses_by_hand(name) for name in across.NAMES}
        assert not differences(ours, written)
    for name, losses in ours.items():
        first, last = np.mean(losses[:5]), np.mean(losses[-5:])
        assert last < first, f"{name} has learned nothing"


def test_a_difference_is_found():
    ours = {name: [1.0] * across.STEPS for name in across.NAMES}
    theirs = {**ours, "nested": [1.0] * 19 + [1.0002]}
    assert differences(ours, theirs) == ["nested: 2.0e-04, first at step 20"]
