"""NumPy's masked arrays, which `numpy.asarray` takes the mask from."""

import numpy as np


def without_mask(array: np.ma.MaskedArray) -> np.ndarray:
    """NaN where a number is masked: not what lies below, which is often 0."""
    if array.dtype.kind in "biuf" and np.ma.is_masked(array):
        return array.astype(np.float64).filled(np.nan)
    return array.filled()
