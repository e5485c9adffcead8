"""NumPy's masked arrays, which `numpy.asarray` takes the mask from."""

import numpy as np


def without_mask(array: np.ma.MaskedArray) -> np.ndarray:
    """NaN where a number is masked: not what lies below, which is often 0.

    (0 in pictures of uint8, `[..., H, W, C]`, which have no other.)
    """
    if not np.ma.is_masked(array):
        return array.data
    if array.dtype == np.uint8 and array.ndim > 2:
        return array.filled(0)
    if array.dtype.kind in "biuf":
        return np.where(array.mask, np.nan, array.data.astype(np.float64))
    return array.filled()
