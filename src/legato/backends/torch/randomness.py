"""PyTorch's own generators: dropout draws from them.

Keras's layers ignore their SeedGenerators on PyTorch.
"""

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch


def get_random_state() -> dict[str, np.ndarray]:
    """The state of each device's generator: uint8 arrays by device."""
    state = {"cpu": torch.get_rng_state().numpy().copy()}
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state().numpy().copy()
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            state[f"cuda{i}"] = torch.cuda.get_rng_state(i).numpy().copy()
    return state


def set_random_state(state: Mapping[str, np.ndarray]) -> None:
    """Put back what `get_random_state` returned.

    Generators of devices that this machine does not have are left out: that
    the devices differ is named by the run's identity.
    """
    for name, array in state.items():
        tensor = torch.from_numpy(np.array(array, np.uint8))
        if name == "cpu":
            torch.set_rng_state(tensor)
        elif name == "mps":
            if torch.backends.mps.is_available():
                torch.mps.set_rng_state(tensor)
        elif int(name.removeprefix("cuda")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(tensor, int(name.removeprefix("cuda")))


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """What happens inside leaves the generators as they were."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)
