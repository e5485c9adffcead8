"""Datasets that `data.py` measures; worker processes import this, not that."""

import time

import numpy as np


class Waits:
    """Examples of the MLP that come as from a disk or over a network.

    Args:
        x: features.
        y: labels.
        secs: how long a batch is waited for.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, secs: float) -> None:
        self.x, self.y, self.secs = x, y, secs

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: list[int]) -> list:
        time.sleep(self.secs)
        return [(self.x[i], self.y[i]) for i in indices]

    def __getitem__(self, index: int) -> tuple:
        return self.__getitems__([index])[0]


class Vast:
    """A thousand million examples that take no memory."""

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> np.ndarray:
        return np.full(64, index % 1000, "float32")


class Large:
    """Examples of 100 kB."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> np.ndarray:
        return np.full(25_000, index, "float32")


class Pictures:
    """The images of a folder, for PyTorch's loader.

    Args:
        paths: of the images.
        labels: of their classes.
        size: what they are resized to.
    """

    def __init__(self, paths: list[str], labels: np.ndarray, size: int) -> None:
        self.paths, self.labels, self.size = paths, labels, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple:
        from PIL import Image

        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB").resize(
                (self.size, self.size), Image.Resampling.BILINEAR
            )
        return np.asarray(image), int(self.labels[index])
