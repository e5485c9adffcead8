"""Which Keras backend to use; decided before Keras is imported.

Keras reads `KERAS_BACKEND` once, when it is imported. Nothing here imports a
backend to see whether it is there: that would cost seconds.
"""

import importlib.util
import json
import os
import sys

from legato.errors import BackendError

BACKENDS = {
    "jax": 'pip install "legato[jax]"',
    "tensorflow": 'pip install "legato[tensorflow]"',
    "torch": 'pip install "legato[torch]"',
}
"""The backends, in order of preference, and how each is installed."""


def choose_backend(
    explicit: str | None = None, experiment: str | None = None
) -> str:
    """Returns the backend to use.

    Args:
        explicit: what the user asked for just now (`--backend`); goes before
            all else.
        experiment: what the experiment's config asks for; goes after the
            environment variable `KERAS_BACKEND`. Where nothing is asked for,
            the first installed of `BACKENDS` is taken.

    Raises:
        BackendError: if the backend is unknown, or is not installed.
    """
    environment = os.environ.get("KERAS_BACKEND") or None
    for name, asked_by in (
        (explicit, "--backend"),
        (environment, "the environment variable KERAS_BACKEND"),
        (experiment, "the experiment's 'backend'"),
    ):
        if name is None:
            continue
        if name not in BACKENDS:
            raise BackendError(
                f"{asked_by} asks for {name!r}: legato trains on "
                f"{', '.join(BACKENDS)}."
            )
        if not is_installed(name):
            raise BackendError(
                f"{asked_by} asks for {name}, which is not installed: "
                f"{BACKENDS[name]}"
            )
        return name
    for name in BACKENDS:
        if is_installed(name):
            return name
    raise BackendError(
        f"No Keras backend is installed. The default is JAX: {BACKENDS['jax']}"
    )


def activate_backend(name: str) -> None:
    """Makes Keras use a backend when it is imported.

    Raises:
        BackendError: if Keras was imported before with another one.
    """
    if "keras" in sys.modules:
        active = sys.modules["keras"].config.backend()
        if active != name:
            raise BackendError(
                f"Keras was imported with the backend {active} before {name} "
                "could be chosen: set the environment variable "
                f"KERAS_BACKEND={name} before Python starts."
            )
    os.environ["KERAS_BACKEND"] = name


def is_installed(name: str) -> bool:
    """Returns whether a backend's package can be found."""
    return importlib.util.find_spec(name) is not None


def default_backend() -> None:
    """Chooses a backend where the user has not; before Keras is imported.

    Keras itself falls back on TensorFlow, and writes that into its config
    file, whether or not it is installed.

    Raises:
        BackendError: if no backend is installed.
    """
    if "keras" in sys.modules or os.environ.get("KERAS_BACKEND"):
        return
    home = os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras")
    try:
        with open(os.path.join(home, "keras.json")) as file:
            configured = json.load(file).get("backend")
    except (OSError, ValueError, AttributeError):
        configured = None
    if configured not in BACKENDS or not is_installed(configured):
        configured = None
    os.environ["KERAS_BACKEND"] = choose_backend(experiment=configured)
