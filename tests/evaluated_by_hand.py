"""What evaluating must give, computed with NumPy from a checkpoint's bytes.

For `tests.contracts.scenarios.Classifier`.
"""

import numpy as np
from safetensors.numpy import load_file

from tests.contracts.scenarios import classes_data


def classifier(checkpoint):
    """Results by name; those of a checkpoint's directory."""
    arrays = {
        name: array.astype("float64")
        for name, array in load_file(checkpoint / "state.safetensors").items()
        if name.startswith("model/")
    }
    features, labels = classes_data("validation")
    kernels = sorted(name for name in arrays if name.endswith("kernel"))
    biases = sorted(name for name in arrays if name.endswith("bias"))
    first, second = (
        (arrays[kernel], arrays[bias])
        for kernel, bias in zip(kernels, biases, strict=True)
    )
    hidden = np.tanh(features @ first[0] + first[1])
    logits = hidden @ second[0] + second[1]
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    right = logits[np.arange(len(labels)), labels]
    rank = (logits > right[:, None]).sum(axis=1)
    return {
        "loss": -log_p[np.arange(len(labels)), labels].mean(),
        "accuracy": (rank == 0).mean(),
        "top2": (rank < 2).mean(),
        "spread": (logits.max(axis=1) - logits.min(axis=1)).mean(),
    }
