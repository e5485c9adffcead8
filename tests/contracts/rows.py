"""Data for worker processes, which import nothing that is slow."""

import os
import signal

import numpy as np


class Rows:
    """For a DataLoader; its worker is killed while a file is there."""

    def __init__(self, flag):
        self._flag = flag

    def __len__(self):
        return 96

    def __getitem__(self, index):
        # (Not among the first, which are tried before training.)
        if index == 90 and self._flag.exists():
            os.kill(os.getpid(), signal.SIGKILL)  # for want of memory, say
        features = np.random.default_rng(index).normal(size=4)
        return features.astype("float32"), features.sum().astype("float32")
