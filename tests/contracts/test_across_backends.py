"""One experiment on two backends: the same losses, to rounding."""

import numpy as np

from tests.contracts import across


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
    # (Those of the reference, whose steps `test_steps` holds to steps written
    # by hand. A scenario that was changed: run `tests.contracts.across`.)
    assert not differences(ours, theirs)
    for name, losses in ours.items():
        first, last = np.mean(losses[:5]), np.mean(losses[-5:])
        assert last < first, f"{name} has learned nothing"


def test_a_difference_is_found():
    ours = {name: [1.0] * across.STEPS for name in across.NAMES}
    theirs = {**ours, "nested": [1.0] * 19 + [1.0002]}
    assert differences(ours, theirs) == ["nested: 2.0e-04, first at step 20"]
