"""NumPy arrays as PyTorch tensors and back, bit for bit."""

from typing import Any

import keras
import ml_dtypes
import numpy as np
import torch

# NumPy knows these only through ml_dtypes, which PyTorch does not know: they
# go through integers of their size.
_AS_INTEGERS: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}

_WIDENED = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}
"""What is computed with in place of what PyTorch hardly has."""


def to_numpy(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    """A host array; on a CPU a view where that is possible.

    Args:
        tensor: any tensor.
        dtype: what Keras calls its dtype.
    """
    tensor = tensor.detach()
    if tensor.dtype in _AS_INTEGERS:
        integer, exact = _AS_INTEGERS[tensor.dtype]
        return tensor.contiguous().view(integer).cpu().numpy().view(exact)
    # (`astype`: Keras keeps a uint32 in an int64, for example.)
    return tensor.cpu().numpy().astype(dtype, copy=False)


def to_tensor(
    array: np.ndarray | torch.Tensor, device: torch.device
) -> torch.Tensor:
    """A tensor on the device, of the dtype that Keras would choose.

    A tensor has been one already.
    """
    if isinstance(array, torch.Tensor):
        return array.to(device)
    array = np.asarray(array)
    for kept, (integer, exact) in _AS_INTEGERS.items():
        if array.dtype == np.dtype(exact):
            bits = array.view(_NUMPY[integer])
            return torch.from_numpy(_own(bits)).view(kept).to(device)
    widened = array.astype(canonical_dtype(array.dtype), copy=False)
    return torch.from_numpy(_own(widened)).to(device)


def to_tensors(nested: Any) -> Any:
    """Nested arrays as tensors on Keras's device; None stays None."""
    device = current_device()
    return keras.tree.map_structure(
        lambda a: None if a is None else to_tensor(a, device), nested
    )


def current_device() -> torch.device:
    """Where Keras puts its tensors."""
    tensor: Any = keras.ops.zeros(())
    return tensor.device


_NUMPY: dict[torch.dtype, Any] = {torch.int16: np.int16, torch.uint8: np.uint8}


def _own(array: np.ndarray) -> np.ndarray:
    """An array that PyTorch takes: writable, without negative strides."""
    if array.flags.writeable and array.flags.c_contiguous:
        return array
    return np.array(array, order="C")


def canonical_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of NumPy that stands for what Keras makes of `dtype`."""
    return np.dtype(_WIDENED.get(dtype.name, dtype))
