"""Layers of images in a step: without Keras's copies on PyTorch."""

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops
from torch.utils._python_dispatch import TorchDispatchMode

import legato
from legato.backends.torch.layers import layers_of_step
from legato.backends.torch.scope import StepScope

FLAT, DEEP, LINE = (9, 11, 4), (5, 6, 7, 4), (11, 4)

LAYERS = {
    "convolution": (FLAT, lambda: layers.Conv2D(8, 3)),
    "strides": (FLAT, lambda: layers.Conv2D(8, 3, strides=2)),
    "same": (FLAT, lambda: layers.Conv2D(8, (2, 3), padding="same")),
    "strides, same": (
        FLAT,
        lambda: layers.Conv2D(8, 4, strides=2, padding="same"),
    ),
    "dilated": (FLAT, lambda: layers.Conv2D(8, 3, dilation_rate=2)),
    "groups": (FLAT, lambda: layers.Conv2D(8, 3, groups=2)),
    "depthwise": (FLAT, lambda: layers.DepthwiseConv2D(3)),
    "separable": (FLAT, lambda: layers.SeparableConv2D(8, 3)),
    "transposed": (
        FLAT,
        lambda: layers.Conv2DTranspose(8, 3, strides=2, padding="same"),
    ),
    "in space": (DEEP, lambda: layers.Conv3D(8, 3, padding="same")),
    "on a line": (LINE, lambda: layers.Conv1D(8, 3, padding="causal")),
    "greatest": (FLAT, lambda: layers.MaxPooling2D()),
    "greatest, same": (
        FLAT,
        lambda: layers.MaxPooling2D(3, strides=2, padding="same"),
    ),
    "greatest in space": (DEEP, lambda: layers.MaxPooling3D()),
    "greatest on a line": (LINE, lambda: layers.MaxPooling1D()),
    "average": (FLAT, lambda: layers.AveragePooling2D(2)),
    "average, same": (
        FLAT,
        lambda: layers.AveragePooling2D(3, strides=2, padding="same"),
    ),
    "average in space": (DEEP, lambda: layers.AveragePooling3D(2)),
    "adaptive": (FLAT, lambda: layers.AdaptiveAveragePooling2D((3, 4))),
    "channels first": (
        FLAT,
        lambda: layers.Conv2D(8, 3, data_format="channels_first"),
    ),
}


def model_of(name):
    keras.utils.set_random_seed(1)
    shape, make = LAYERS[name]
    mixing = layers.Dense(4, activation="relu")  # whose gradient is looked at
    return keras.Sequential([layers.Input(shape), mixing, make()])


def differentiated(name):
    model = model_of(name)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, *LAYERS[name][0])).astype("float32")
    outputs = []

    def forward():
        outputs[:] = [model(ops.convert_to_tensor(x))]
        return ops.mean(ops.square(outputs[0]))

    _, gradients = legato.value_and_grad(forward, model.trainable_variables)
    return [t.detach().numpy() for t in (*outputs, *gradients)]


@pytest.mark.parametrize("name", LAYERS)
def test_what_keras_computes_with_copies(name, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "legato.backends.torch.layers._are_images", lambda inputs: False
        )
        wanted = differentiated(name)
    found = differentiated(name)
    assert found[0].tobytes() == wanted[0].tobytes()
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-6)


class Copies(TorchDispatchMode):
    """Counts copies of whole images."""

    def __init__(self, size):
        super().__init__()
        self._size = size
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.clone.default:
            self.count += result.numel() >= self._size
        return result


@pytest.mark.parametrize(
    "name", ["convolution", "greatest", "average", "in space", "transposed"]
)
def test_there_are_no_copies(name):
    model = model_of(name)
    x = torch.ones((3, *LAYERS[name][0]))
    copies = Copies(x.numel())
    with layers_of_step(), StepScope(), copies:
        model.layers[1](x)
    assert copies.count == 0


def test_images_of_images():
    """`vectorized_map` is PyTorch's vmap."""
    layer = layers.MaxPooling2D()
    x = torch.arange(2.0 * 3 * 4 * 4 * 2).reshape(2, 3, 4, 4, 2)
    with layers_of_step():
        found = ops.vectorized_map(layer, x)
    assert torch.equal(found, torch.stack([layer(x[0]), layer(x[1])]))
