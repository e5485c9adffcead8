"""For the user's own tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from legato.errors import VerifyError
from legato.verify import Target, Verdict, verify


def assert_resumes_exactly(
    train: Callable[[Path], Any],
    *,
    kills: int = 3,
    seed: int = 0,
    backend: str | None = None,
    work: Path | None = None,
) -> Verdict:
    """Asserts that what a function trains can be killed at any instant.

    It is called in new processes: once it is left in peace, and `kills` times
    it is killed at a random instant; then everything that was trained is
    compared, byte for byte::

        def train(run_dir):
            model = make_model()
            return legato.fit(model, x, y, epochs=3, run_dir=run_dir)

        def test_training_resumes_exactly():
            assert_resumes_exactly(train)

    Args:
        train: a function of a module (no lambda, none within another), which
            trains in the run directory that it is given, by `legato.fit` or a
            `Trainer`.
        kills: how many processes are killed.
        seed: of the instants.
        backend: the Keras backend; None takes that of this process, if Keras
            was imported, or lets each process choose.
        work: an empty directory for the runs, which stay there; None takes a
            temporary one.

    Returns:
        What was found: how much was compared, and where it was killed.

    Raises:
        AssertionError: something differs; the message says what and why.
        VerifyError: an argument is wrong.
    """
    verdict = verify(
        Target(function=_name(train), backend=backend or _backend()),
        kills=kills,
        seed=seed,
        work=work,
    )
    if not verdict.is_exact:
        raise AssertionError(explain(verdict))
    return verdict


def explain(verdict: Verdict) -> str:
    """What is wrong, in sentences."""
    lines = []
    if verdict.failure is not None:
        lines.append(verdict.failure)
    if verdict.first is not None:
        first = verdict.first
        lines.append(
            f"The killed run differs first {first.where}, in "
            f"{', '.join(first.parts[:4])}."
        )
        lines += [f"  {d.path}: {d}" for d in first.differences[:8]]
        if verdict.is_repeatable is False:
            lines.append("Two runs in peace differ too.")
    for cause in verdict.causes[:3]:
        lines.append(f"Likely cause: {cause.what}. {cause.remedy}".rstrip())
    return "\n".join(lines)


def _name(train: Any) -> dict[str, str | None]:
    import inspect

    name = getattr(train, "__qualname__", None)
    module = getattr(train, "__module__", None)
    if not callable(train) or not name or not module or "<" in name:
        raise VerifyError(
            f"train={train!r}: it must be a function that a new process can "
            "import: one of a module, no lambda, none within a function."
        )
    return {
        "module": module,
        "name": name,
        "file": inspect.getsourcefile(inspect.unwrap(train)),
    }


def _backend() -> str | None:
    import os
    import sys

    keras: Any = sys.modules.get("keras")
    if keras is not None:
        return keras.config.backend()
    return os.environ.get("KERAS_BACKEND")
