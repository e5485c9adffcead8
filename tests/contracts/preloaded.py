"""Imported by the server that children are forked from, and by nothing else.

All that is slow to import, in the order of what needs what.
"""

import gc

import sklearn.datasets
import tensorboardX  # imports PyTorch, where that is installed
import tensorflow  # which keras.utils.set_random_seed imports

import legato.fitting
import legato.trainer
from tests.contracts import fit_scenarios, scenarios

__all__ = [
    "fit_scenarios",
    "legato",
    "scenarios",
    "sklearn",
    "tensorboardX",
    "tensorflow",
]

# A collection in a child would otherwise touch, and so copy, all of it.
gc.freeze()
