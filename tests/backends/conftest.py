"""Each backend's own tests run where it is the one in use."""

import keras

collect_ignore = [
    name
    for name in ("jax", "tensorflow", "torch")
    if name != keras.config.backend()
]
