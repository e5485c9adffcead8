"""The process that trains while it is watched: `python -m legato.verify.child`.

It trains as the user's own process would, with more checkpoints, all of which
are kept, and tells what it does and what it meets.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from legato.verify.board import Board
from legato.verify.watching import watch_calls


class Evidence:
    """What a process meets, a line of JSON each, written at once.

    Args:
        path: of the file, which is added to.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._fd = os.open(path, flags, 0o666)

    def __call__(self, record: dict[str, Any]) -> None:
        """Adds a record; it survives a kill."""
        os.write(self._fd, json.dumps(record, default=str).encode() + b"\n")


def main(spec_path: str) -> int:
    """Trains as the file says; returns an exit status."""
    spec = json.loads(Path(spec_path).read_text())
    evidence = Evidence(Path(spec["evidence"]))
    sys.path[:] = spec["path"]
    _note_warnings(evidence)
    watch_calls(evidence)
    if spec["backend"]:
        os.environ["KERAS_BACKEND"] = spec["backend"]
    if not spec["keeps_programs"]:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    with Board(Path(spec["board"])) as board:
        try:
            _train(spec, evidence, board)
        except Exception as error:
            evidence(
                {
                    "kind": "error",
                    "type": type(error).__name__,
                    "message": str(error),
                    "step": board.read().step,
                    "is_legatos": type(error).__module__ == "legato.errors",
                }
            )
            raise
    return 0


def _note_warnings(evidence: Evidence) -> None:
    def show(
        message: Warning | str, category: type[Warning], *args: Any, **more: Any
    ) -> None:
        if category.__module__ == "legato.errors":
            evidence(
                {
                    "kind": "warning",
                    "category": category.__name__,
                    "message": str(message),
                }
            )

    warnings.showwarning = show


def _train(spec: dict[str, Any], evidence: Evidence, board: Board) -> None:
    from legato.backend_choice import activate_backend, choose_backend

    run_dir = Path(spec["run_dir"])
    if spec["function"] is not None:
        activate_backend(choose_backend(spec["backend"]))
        function = _find_function(**spec["function"])
        with _observed(spec, evidence, board):
            history = function(run_dir)
    else:
        from legato.experiment import resolve, run_experiment

        experiment = resolve(spec["config"], spec["overrides"])
        activate_backend(choose_backend(spec["backend"], experiment.backend))
        with _observed(spec, evidence, board):
            history = run_experiment(experiment, run_dir=run_dir)
    logs = getattr(history, "history", None)
    if logs is not None:
        evidence({"kind": "history", "logs": [history.epoch, logs]})


def _find_function(module: str, name: str, file: str | None) -> Any:
    """A function of a module, which may be a script or a test."""
    if module in sys.modules:
        found: Any = sys.modules[module]
    elif file is not None and (
        module == "__main__" or importlib.util.find_spec(module) is None
    ):
        module = "__legato_main__" if module == "__main__" else module
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[module] = found
        spec.loader.exec_module(found)
    else:
        found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


@contextlib.contextmanager
def _observed(
    spec: dict[str, Any], evidence: Evidence, board: Board
) -> Iterator[None]:
    """While active, each run that is trained is watched."""
    from legato.trainer import Trainer
    from legato.verify.observing import ObservedSession

    before = Trainer.session_type
    Trainer.session_type = functools.partial(
        ObservedSession, spec, evidence, board
    )
    try:
        yield
    finally:
        Trainer.session_type = before


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
