"""JAX computes with 32-bit integers."""

import numpy as np
import pytest

from legato.data import ArraySource
from legato.errors import DataError


def test_integers_that_would_be_cut_off_are_refused():
    with pytest.raises(DataError, match=r"int64.*int32"):
        ArraySource(np.array([2**40, 1]), 5)
