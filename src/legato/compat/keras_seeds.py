"""Keras's global seed."""

import random
import sys

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random import seed_generator
from keras.src.utils import rng_utils


def set_random_seed(seed: int) -> None:
    """Do what `keras.utils.set_random_seed` does, without its imports.

    Where TensorFlow is installed, Keras imports it there to seed it, whatever
    the backend: that takes seconds. What is not imported yet needs no seed.
    """
    if "tensorflow" in sys.modules:
        keras.utils.set_random_seed(seed)
        return
    global_state.set_global_attribute(rng_utils.GLOBAL_RANDOM_SEED, seed)
    global_state.set_global_attribute(
        seed_generator.GLOBAL_SEED_GENERATOR, None
    )
    random.seed(seed)
    np.random.seed(seed)
    if keras.config.backend() == "torch":
        sys.modules["torch"].manual_seed(seed)
