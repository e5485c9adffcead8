"""What all tests share."""

import os
import signal

# Before any test imports Keras, which reads it once.
os.environ.setdefault("KERAS_BACKEND", "jax")

# A shell without job control has what it starts in the background ignore
# Ctrl-C, and Python then leaves it so: the tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

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
