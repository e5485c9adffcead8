"""The same models as PyTorch modules, with the weights of the Keras models.

Who writes PyTorch by hand writes such modules: a Keras layer's call costs more
than the small operations in it, so it would be no fair peer.
"""

import keras
import numpy as np
import torch
from problems import RESIDUAL
from torch import nn


def build(model: keras.Model) -> nn.Module:
    """A module that computes what the Keras model does."""
    layers = [
        layer
        for layer in model.layers
        if layer.weights or isinstance(layer, keras.layers.Dropout)
    ]
    if any(isinstance(e, keras.layers.MultiHeadAttention) for e in layers):
        return _Transformer(layers)
    if isinstance(layers[0], keras.layers.LSTM):
        return _Lstm(*layers)
    if isinstance(layers[0], keras.layers.Conv2D):
        return _Cnn(*layers)
    if len(layers) > 3:
        return _Residual(layers)
    hidden, dropout, head = layers
    return nn.Sequential(
        _linear(hidden), nn.ReLU(), nn.Dropout(dropout.rate), _linear(head)
    )


def _tensor(value: keras.Variable | np.ndarray) -> torch.Tensor:
    array = keras.ops.convert_to_numpy(value)
    return torch.tensor(np.ascontiguousarray(array))


def _linear(layer: keras.layers.Dense) -> nn.Linear:
    module = nn.Linear(*layer.kernel.shape)
    with torch.no_grad():
        module.weight.copy_(_tensor(layer.kernel).T)
        module.bias.copy_(_tensor(layer.bias))
    return module


class _Residual(nn.Module):
    def __init__(self, layers: list[keras.layers.Dense]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(_linear, layers[:-1]))
        self.head = _linear(layers[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + RESIDUAL * torch.tanh(block(x))
        return self.head(x)


class _Cnn(nn.Module):
    """Its input has the channels last, as the data come."""

    def __init__(self, first, second, head) -> None:
        super().__init__()
        self.first, self.second = map(self._convolution, (first, second))
        self.head = _linear(head)

    @staticmethod
    def _convolution(layer: keras.layers.Conv2D) -> nn.Conv2d:
        kernel = _tensor(layer.kernel).permute(3, 2, 0, 1)
        outputs, inputs, *size = kernel.shape
        module = nn.Conv2d(inputs, outputs, tuple(size))
        with torch.no_grad():
            module.weight.copy_(kernel)
            module.bias.copy_(_tensor(layer.bias))
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x.permute(0, 3, 1, 2)))
        x = nn.functional.max_pool2d(x, 2)
        x = torch.relu(self.second(x))
        return self.head(x.mean((2, 3)))


class _Lstm(nn.Module):
    """PyTorch adds two biases, of which Keras has one: the other is fixed."""

    def __init__(self, lstm, head) -> None:
        super().__init__()
        features = lstm.cell.kernel.shape[0]
        self.lstm = nn.LSTM(features, lstm.units, batch_first=True)
        self.head = _linear(head)
        with torch.no_grad():
            self.lstm.weight_ih_l0.copy_(_tensor(lstm.cell.kernel).T)
            self.lstm.weight_hh_l0.copy_(_tensor(lstm.cell.recurrent_kernel).T)
            self.lstm.bias_ih_l0.copy_(_tensor(lstm.cell.bias))
            self.lstm.bias_hh_l0.zero_()
        self.lstm.bias_hh_l0.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class _Transformer(nn.Module):
    def __init__(self, layers: list[keras.layers.Layer]) -> None:
        super().__init__()
        *blocks, head = layers
        self.blocks = nn.ModuleList(
            _Block(*blocks[first : first + 5])
            for first in range(0, len(blocks), 5)
        )
        self.head = _linear(head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class _Block(nn.Module):
    def __init__(self, before, attention, after, wide, narrow) -> None:
        super().__init__()
        self.before, self.after = self._norm(before), self._norm(after)
        self.wide, self.narrow = _linear(wide), _linear(narrow)
        width = before.gamma.shape[0]
        heads = attention.num_heads
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        parts = [
            attention.query_dense,
            attention.key_dense,
            attention.value_dense,
        ]
        kernels = [_tensor(p.kernel).reshape(width, width).T for p in parts]
        biases = [_tensor(p.bias).reshape(width) for p in parts]
        output = attention.output_dense
        with torch.no_grad():
            self.attention.in_proj_weight.copy_(torch.cat(kernels))
            self.attention.in_proj_bias.copy_(torch.cat(biases))
            self.attention.out_proj.weight.copy_(
                _tensor(output.kernel).reshape(width, width).T
            )
            self.attention.out_proj.bias.copy_(_tensor(output.bias))

    @staticmethod
    def _norm(layer: keras.layers.LayerNormalization) -> nn.LayerNorm:
        return nn.LayerNorm(layer.gamma.shape[0], eps=layer.epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.narrow(torch.relu(self.wide(self.after(x))))
