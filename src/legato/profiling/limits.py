"""Budgets and limits that are given, and what follows from them."""

import math
from fractions import Fraction

from legato.errors import ConfigError


def parse_budget(budget: str | float) -> Fraction:
    """The share that a text such as "1%" or a number such as 0.01 means.

    Raises:
        ConfigError: it is not above 0 and below 1.
    """
    text = str(budget).strip()
    number = text.removesuffix("%").strip()
    share = None
    try:
        # (A float by its shortest text: 0.01 means one hundredth.)
        if not isinstance(budget, bool) and math.isfinite(float(number)):
            share = Fraction(number) / (100 if text.endswith("%") else 1)
    except ValueError:
        pass
    if share is None or not 0 < share < 1:
        raise ConfigError(
            f"budget={budget!r}: it must be a share of the bare step above 0 "
            'and below 1, such as 0.01, or "1%".'
        )
    return share


def interval_within(
    us_per_call: float, us_per_step: float, budget: Fraction
) -> int:
    """The least interval at which something stays within a budget.

    Args:
        us_per_call: what it costs each time, in microseconds.
        us_per_step: what a step takes, in microseconds.
        budget: the share of a step that it may cost.

    Returns:
        A number of steps of at least 1.
    """
    allowed = budget * Fraction(us_per_step)
    return max(1, math.ceil(Fraction(us_per_call) / allowed))


def check_seconds(seconds: float) -> None:
    """Check a limit of time.

    Raises:
        ConfigError: it is not one.
    """
    is_number = isinstance(seconds, int | float)
    if isinstance(seconds, bool) or not is_number or not 0 < seconds < math.inf:
        raise ConfigError(
            f"seconds={seconds!r}: it must be a number of seconds above 0. "
            "Compilations, and one round of measuring, take what they take."
        )
