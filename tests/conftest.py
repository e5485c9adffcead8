"""What all tests share."""

import gc
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import pytest

from tests.processes import ENOUGH

# Before any test imports Keras, which reads it once.
os.environ.setdefault("KERAS_BACKEND", "jax")

if os.environ["KERAS_BACKEND"] == "tensorflow":
    # Newer instructions compute half precision in another way than Eigen does,
    # with which compiled steps are compared.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")

# PyTorch's threads wait for one another at each operation, however small it
# is: for long, where others are at work. With as many processes as cores most
# of the time went there. (`runs` trains with several threads, as users do.)
if os.environ["KERAS_BACKEND"] == "torch":
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell without job control has what it starts in the background ignore
# Ctrl-C, and Python then leaves it so: the tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Make a folder that the processes of these tests share."""
    from tests.processes import SHARED, compiled_by, context, keep_compiled

    # Also for tests that start such processes in another way: the first one
    # starts the server, which preloads what it was told by then.
    context()
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="legato-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ[SHARED] = folder.name
        # Processes that are users' leave nothing in the user's cache.
        os.environ["XDG_CACHE_HOME"] = f"{folder.name}/cache"
    keep_compiled(compiled_by("one"))
    # Libraries make objects by the million: collections took a twentieth of
    # the time.
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def shared_folder():
    from tests.processes import SHARED

    return Path(os.environ[SHARED])


# Nobody need optimise what the tests' own process runs a few times: half of
# their time. Here it is done, as for users: these compare with other processes,
# or with what others compute, or measure times. (Processes that tests start are
# users', but where they say otherwise.)
_AS_USERS_COMPILE = {
    "test_across_backends.py",
    "test_phases.py",
    "test_profiling.py",
    "test_programs.py",
    "test_resuming.py",
    "test_summaries_in_calls.py",
    "test_unrolled.py",
    "test_xla.py",
}


def pytest_runtest_setup(item):
    """Choose how well what the test compiles is optimised."""
    from tests.processes import compile_quickly

    compile_quickly(item.path.name not in _AS_USERS_COMPILE)


def pytest_runtest_teardown(item):
    """End what a test that failed has left: the exit would wait for it."""
    for process in multiprocessing.active_children():
        if not process.daemon:
            process.kill()
            process.join()


def pytest_collection_modifyitems(config, items):
    """Leave single tests that know no backend to one."""
    if os.environ["KERAS_BACKEND"] == ENOUGH:
        return
    once = [each for each in items if each.get_closest_marker("any_backend")]
    config.hook.pytest_deselected(items=once)
    items[:] = [each for each in items if each not in once]


# The same for whole modules.
collect_ignore = (
    []
    if os.environ["KERAS_BACKEND"] == ENOUGH
    else [
        "callbacks/test_adapters.py",
        "cli/test_cli.py",
        "cli/test_evaluating.py",
        "data/test_attributes.py",
        "data/test_buckets.py",
        "data/test_costs.py",
        "data/test_holding.py",
        "data/test_hugging_face.py",
        "data/test_iterables.py",
        "data/test_random_access.py",
        "data/test_resuming.py",
        "data/test_table.py",
        "data/test_tf_state.py",
        "diff",
        "files",
        "metrics/test_adapters.py",
        "metrics/test_coco.py",
        "soak",
        "storage",
        "test_architecture.py",
        "test_checkpoint.py",
        "test_config.py",
        "test_progress.py",
        "test_rng.py",
        "test_schedule.py",
        "test_sinks.py",
        "workers",
    ]
)
