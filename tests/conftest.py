"""What all tests share."""

import os

# Before any test imports Keras, which reads it once.
os.environ.setdefault("KERAS_BACKEND", "jax")
