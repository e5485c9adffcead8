"""What Grain's worker processes import: they start the sooner without Keras."""

import os
import signal
import time

import grain
import numpy as np


def noise(x, generator):
    return np.float32(x + generator.random())


def dataset(*, workers=0, function=None):
    data = grain.MapDataset.range(23).shuffle(seed=1)
    data = data.seed(3).random_map(noise)
    if function is not None:
        data = data.map(function)
    data = data.batch(5).to_iter_dataset()
    if workers:
        data = data.mp_prefetch(grain.MultiprocessingOptions(workers))
    return data


def fail(x):
    if x > 20:
        raise ValueError(f"example {int(x)} is bad")
    return x


def die(x):
    if x > 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def hang(x):
    if x > 20:
        time.sleep(1000)
    return x
