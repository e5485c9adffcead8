"""Accuracy among the first k in a step: nothing is sorted on PyTorch."""

import keras
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from legato.backends.torch.layers import layers_of_step

CLASSES = 6


class Names(TorchDispatchMode):
    """Notes what runs."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def predictions(kind):
    """Rows `[200, CLASSES]`, of which many have equal or odd numbers."""
    rng = np.random.default_rng(0)
    found = rng.normal(size=(200, CLASSES)).astype("float32")
    if kind == "ties":
        return np.round(found)
    if kind == "odd":
        odd = rng.random(found.shape) < 0.3
        numbers = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0], found.shape)
        return np.where(odd, numbers, found).astype("float32")
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["random", "ties", "odd"])
@pytest.mark.parametrize("k", [1, 3, CLASSES])
def test_what_keras_finds_by_sorting(k, kind, dtype):
    values = keras.ops.cast(predictions(kind), dtype)
    targets = np.random.default_rng(1).integers(0, CLASSES, len(values))
    sorted_ = keras.ops.in_top_k(targets, values, k)
    with layers_of_step(), Names() as names:
        counted = keras.ops.in_top_k(targets, values, k)
    assert "aten::topk" not in names.seen
    assert counted.dtype == sorted_.dtype
    assert torch.equal(counted, sorted_)
    assert k == CLASSES or not torch.all(counted)


def test_what_keras_refuses_and_takes_besides():
    values = predictions("random")
    targets = np.zeros(len(values), "int32")
    with layers_of_step():
        with pytest.raises(RuntimeError, match="out of range"):
            keras.ops.in_top_k(targets, values, CLASSES + 1)
        found = keras.ops.in_top_k([1], [[0.1, 0.2]], 1)
    assert found.tolist() == [True]
