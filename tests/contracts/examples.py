"""A dataset of single examples, for worker processes: it needs no Keras."""

import time

import numpy as np

from tests.workers import datasets


class Examples:
    """Features and a class; noisy, from the global generator of NumPy."""

    def __init__(self, split):
        train = split == "train"
        random = np.random.default_rng(1 if train else 2)
        self.features = random.normal(size=(150 if train else 45, 8))

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        features = self.features[index]
        sums = [features[0], features[1] + features[2], features[3]]
        noise = 0.05 * np.random.normal(size=8)
        return features + noise, int(np.argmax(sums))


class FailsOnce(Examples):
    """As long as a file is there, one example is none."""

    def __init__(self, how, flag):
        super().__init__("validation")
        self.fail = datasets.BAD[how]
        self.flag = flag

    def __getitem__(self, index):
        if index == 14 and self.flag.exists():
            self.fail(None)
        return super().__getitem__(index)


def augment(example, rng):
    """Mirrors some features, and leaves others out."""
    features, label = example
    features = features * rng.choice([-1.0, 1.0], p=[0.1, 0.9], size=8)
    return features * (rng.random(8) > 0.1), label


class Hangs:
    """One of its examples never comes, while there is a certain file.

    Args:
        told: that file, which tells that the example is waited for.
        at: which example.
    """

    def __init__(self, told, at):
        self.told = told
        self.at = at

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == self.at and self.told.exists():
            self.told.write_text("hangs")
            time.sleep(600)
        x = np.random.default_rng(index).normal(size=8).astype("float32")
        return x, index % 3
