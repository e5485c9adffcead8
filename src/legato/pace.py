"""How many steps one call of the device takes."""

_CALL_SECS = 0.5
"""A call lasts at most about so long, so that signals are honoured."""

_ALTERNATING_SECS = 0.02
"""One for which batches are made meanwhile: the device waits for those of the
first call of an epoch, and whoever makes the others for the last one."""

_COPIED_PER_SEC = 200e6
"""Bytes: each call copies all its operands, however few steps it takes, and it
is to be a small part of the call."""

_QUICK_SECS = 0.05


class Pace:
    """How many steps fit in one device call, learnt from those before.

    Args:
        capacity: the most that fit in any call.
        alternates: whether the thread that begins the calls makes batches
            while the device works.
        num_bytes: of the operands of a call.

    Attributes:
        max_steps: the most for the next call.
        is_quick: whether the last one was so short that what the host does
            after it counts; and the one after it can begin in vain.
    """

    def __init__(
        self, capacity: int, *, alternates: bool = False, num_bytes: int = 0
    ) -> None:
        self._capacity = capacity
        self._secs = _CALL_SECS
        if alternates:
            least = num_bytes / _COPIED_PER_SEC
            self._secs = min(max(_ALTERNATING_SECS, least), _CALL_SECS)
        self.max_steps = 1
        self.is_quick = False

    def of(self, limit: int) -> int:
        """How many of these steps the next call takes.

        Calls have like lengths: what a long one works on would not be ready
        when a short one before it ends.
        """
        num_calls = -(-limit // self.max_steps)
        return -(-limit // num_calls)

    def learn(self, num_steps: int, seconds: float) -> None:
        """Take the time of a call (of which the first also compiled)."""
        self.is_quick = seconds < _QUICK_SECS
        fitting = int(self._secs * num_steps / max(seconds, 1e-9))
        # Grown step by step: one quick call may be chance.
        self.max_steps = max(
            1, min(fitting, 8 * max(num_steps, 1), self._capacity)
        )
