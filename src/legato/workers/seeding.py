"""What user code draws from the global generators, as a function of a key."""

import random
import sys
from typing import Any

import numpy as np

from legato.rng import derive_seed


def begin(seed: int, *stream: int | str) -> None:
    """Set the global generators to the beginning of a stream.

    Those of PyTorch and Keras only if they are imported already; see
    `imported`. TensorFlow's cannot be put back, and are left alone.

    Args:
        seed: the run's seed.
        *stream: what it is for.
    """
    derived = derive_seed(seed, "data", *stream)
    random.seed(derived)
    np.random.seed([derived >> 32, derived & 0xFFFFFFFF])
    if "keras" in sys.modules:
        # (Not above: a worker process must do without Keras if it can.)
        from legato.compat import keras_data

        # Keras's own is made anew, from Python's, when it is asked for.
        keras_data.swap_global_seed_generator(None)
    for generator in torch_generators():
        generator.manual_seed(derived)


def imported() -> tuple[bool, ...]:
    """Which libraries with generators of their own are there by now.

    One that user code imports while it makes a batch was not set by `begin`:
    the batch must be made again.
    """
    return "keras" in sys.modules, bool(torch_generators())


def fingerprint() -> list[Any]:
    """Equal to that of another instant if nothing was drawn in between."""
    _, key, *rest = np.random.get_state(legacy=True)
    return [
        random.getstate(),
        np.asarray(key).tobytes(),
        rest,
        *(bytes(g.get_state().numpy()) for g in torch_generators()),
    ]


def torch_generators() -> list[Any]:
    """PyTorch's generators of the CPU, and of GPUs that are in use."""
    torch: Any = sys.modules.get("torch")
    # While it is being imported, it has none yet.
    if torch is None or not hasattr(torch, "default_generator"):
        return []
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators += torch.cuda.default_generators
    return generators
