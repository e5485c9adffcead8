"""What every backend's steps by hand look like from the outside."""

from collections.abc import Callable
from typing import Any

Step = Callable[[Any], dict[str, Any]]
"""Trains on one batch and returns its logs. The values before and after are
those of the Keras variables."""
