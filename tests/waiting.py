"""To wait for what another thread or process does, however busy it all is."""

import time
from collections.abc import Callable
from typing import Any

ENOUGH_SECS = 60.0
"""No machine is so busy. Only what fails takes as long."""


def until(condition: Callable[[], Any], secs: float = ENOUGH_SECS) -> None:
    """Return as soon as a condition holds; it is an error if it never does."""
    late = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < late, "waited for in vain"
        time.sleep(0.002)
