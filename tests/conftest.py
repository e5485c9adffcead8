"""What all tests share."""

import os

# Before any test imports Keras, which reads it once.
os.environ.setdefault("KERAS_BACKEND", "jax")

# What knows nothing of Keras is the same on every backend: once is enough.
collect_ignore = (
    []
    if os.environ["KERAS_BACKEND"] == "jax"
    else [
        "diff",
        "storage",
        "test_architecture.py",
        "test_checkpoint.py",
        "test_config.py",
        "test_progress.py",
        "test_rng.py",
        "test_schedule.py",
    ]
)
