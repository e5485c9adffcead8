"""Datasets for worker processes, which import nothing slow."""

import ctypes
import os
import random
import signal
import time

import numpy as np

from legato.workers import Recipe, stack


class Numbers:
    """23 examples, or as many as one wants."""

    def __init__(self, length=23):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"x": np.full(3, index, "float32"), "y": index}


class Draws(Numbers):
    """Draws from the global generators, as many datasets do."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        noise = np.random.rand() + random.random()
        return {**example, "x": example["x"] + np.float32(noise)}


class DrawsFromTorch(Numbers):
    """Imports it when it is needed, and not before."""

    def __getitem__(self, index):
        import torch

        return {"x": torch.rand(3), "y": index}


class Counts(Numbers):
    """Changes itself: what it gives depends on what it gave."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __getitem__(self, index):
        self.count += 1
        return {"x": np.full(3, self.count), "y": index}


class AtOnce(Numbers):
    """Gives whole batches, and nothing else."""

    def __getitem__(self, index):
        raise AssertionError("one by one")

    def __getitems__(self, indices):
        return [Numbers.__getitem__(self, i) for i in indices]


class Bad(Numbers):
    """Something is wrong with one example, if it is not in the first batch.

    (Which is made when the source is, to learn its layout.)
    """

    def __init__(self, how, bad=7):
        super().__init__()
        self.how = how
        self.bad = bad

    def __getitem__(self, index):
        example = super().__getitem__(index)
        return BAD[self.how](example) if index == self.bad else example


def _raise(example):
    raise OSError("the file is not there")


def _kill(example):
    os.kill(os.getpid(), signal.SIGKILL)


def _segfault(example):
    ctypes.string_at(0)


def _exit(example):
    os._exit(3)


def _hang(example):
    time.sleep(1000)


def _hang_in_c(example):
    # With Python's lock: no other thread of the process runs any more.
    ctypes.PyDLL(None).sleep(1000)


BAD = {
    "raises": _raise,
    "is killed": _kill,
    "segfaults": _segfault,
    "exits": _exit,
    "hangs": _hang,
    "hangs in C": _hang_in_c,
    "has another shape": lambda e: {**e, "x": e["x"][:2]},
    "has another dtype": lambda e: {**e, "x": e["x"].astype("int16")},
    "has other keys": lambda e: {"x": e["x"]},
    "is none": lambda e: {**e, "y": None},
}


def augment(example, rng):
    return {**example, "x": example["x"] + rng.normal(size=3)}


def recipe(dataset, transform=None, collate=stack):
    return Recipe(dataset, transform, collate, "the dataset")
