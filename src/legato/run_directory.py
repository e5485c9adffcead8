"""A run directory: made, recognised, or refused."""

import json
import uuid
from pathlib import Path

from legato import storage
from legato.errors import RunDirError
from legato.version import __version__

RUN = "run.json"
CONFIG = "config.yaml"


def is_run(run_dir: Path) -> bool:
    """Whether a run was begun there."""
    return (run_dir / RUN).exists()


def prepare_run_directory(run_dir: Path) -> None:
    """Make the directory, or see that it is empty or a run's.

    To be done before it is locked, which leaves a file in it.

    Raises:
        RunDirError: it cannot be made, or holds something else.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in run_dir.iterdir()}
    except OSError as error:
        raise RunDirError(
            f"run_dir={str(run_dir)!r} cannot be used as a directory: "
            f"{error}. Choose another one."
        ) from error
    if RUN in found:
        return
    # A process killed at its start leaves a lock and temporary files. (Not a
    # config: one that is there is the user's, and would be overwritten.)
    strange = sorted(
        name for name in found if name != "lock" and not name.startswith(".")
    )
    if strange:
        raise RunDirError(
            f"run_dir={str(run_dir)!r} holds something else than a run "
            f"({', '.join(strange[:3])}). Choose an empty or a new directory."
        )


def read_run_id(run_dir: Path) -> str:
    """The run's id, which its checkpoints carry; made for a new run.

    To be done while holding the lock: two processes that begin together must
    not both make one.

    Raises:
        RunDirError: it cannot be written, or is damaged.
    """
    if is_run(run_dir):
        return _read_id(run_dir / RUN)
    run_id = str(uuid.uuid4())
    record = json.dumps({"run_id": run_id, "legato": __version__})
    try:
        storage.write_file(run_dir / RUN, record.encode() + b"\n")
    except OSError as error:
        raise RunDirError(
            f"run_dir={str(run_dir)!r} cannot be written: {error}. Choose "
            "another one."
        ) from error
    return run_id


def _read_id(path: Path) -> str:
    try:
        return str(uuid.UUID(json.loads(path.read_bytes())["run_id"]))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise RunDirError(
            f"{path} is not that of a run: {error!r}. If the directory holds "
            "nothing of value, choose another run_dir."
        ) from error
