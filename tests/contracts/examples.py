"""A dataset of single examples, for worker processes: it needs no Keras."""

import numpy as np


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


def augment(example, rng):
    """Mirrors some features, and leaves others out."""
    features, label = example
    features = features * rng.choice([-1.0, 1.0], p=[0.1, 0.9], size=8)
    return features * (rng.random(8) > 0.1), label
