"""How many steps one device call takes."""

import pytest

from legato.pace import Pace


@pytest.mark.parametrize("limit", [1, 63, 64, 65, 100, 129, 1000])
def test_calls_have_like_lengths(limit):
    pace = Pace(64)
    pace.max_steps = 64
    calls, left = [], limit
    while left:
        calls.append(pace.of(left))
        left -= calls[-1]
    assert len(calls) == -(-limit // 64)
    assert max(calls) <= 64
    assert max(calls) - min(calls) <= 1


def test_a_call_is_short_enough_for_signals():
    pace = Pace(1000)
    assert pace.of(1000) == 1
    pace.learn(1, seconds=0.01)
    assert pace.max_steps == 8  # one quick call may be chance
    pace.learn(8, seconds=0.08)
    assert pace.max_steps == 50  # half a second
    pace.learn(50, seconds=100)
    assert pace.of(1000) == 1


def test_calls_are_short_where_their_batches_are_made_meanwhile():
    pace = Pace(1000, alternates=True)
    pace.learn(8, seconds=0.08)
    assert pace.max_steps == 2
    # Not where the call mostly copies.
    pace = Pace(1000, alternates=True, num_bytes=10_000_000)
    pace.learn(8, seconds=0.08)
    assert pace.max_steps == 5
