"""What all tests share."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

# Before any test imports Keras, which reads it once.
os.environ.setdefault("KERAS_BACKEND", "jax")

# A shell without job control has what it starts in the background ignore
# Ctrl-C, and Python then leaves it so: the tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

_SHARED = "LEGATO_TESTS_SHARED"


def pytest_configure(config):
    """Make a folder that the processes of these tests share."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="legato-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ[_SHARED] = folder.name
    # For one another; not for the processes that are killed, nor for those
    # that are compared with them: these know nothing of it.
    from tests.processes import keep_compiled

    keep_compiled(f"{os.environ[_SHARED]}/compiled")


@pytest.fixture(scope="session")
def shared_folder():
    return Path(os.environ[_SHARED])


# What knows nothing of Keras is the same on every backend: once is enough.
collect_ignore = (
    []
    if os.environ["KERAS_BACKEND"] == "jax"
    else [
        "diff",
        "metrics/test_adapters.py",
        "metrics/test_coco.py",
        "storage",
        "test_architecture.py",
        "test_checkpoint.py",
        "test_config.py",
        "test_progress.py",
        "test_rng.py",
        "test_schedule.py",
        "test_sinks.py",
    ]
)
