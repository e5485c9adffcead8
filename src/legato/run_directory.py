"""A run directory: made, recognised, or refused."""

import json
import os
import re
import uuid
from pathlib import Path

from legato import storage
from legato.errors import DamagedError, RunDirError
from legato.storage import strict_json
from legato.version import __version__

RUN = "run.json"
CONFIG = "config.yaml"

_MAX_BYTES = 64 * 1024
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def is_run(run_dir: Path) -> bool:
    """Whether a run was begun there."""
    return os.path.lexists(run_dir / RUN)


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
        return find_run_id(run_dir)
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


def find_run_id(run_dir: Path) -> str:
    """The id of a run that is there.

    Raises:
        RunDirError: it is not the directory of a run.
    """
    path = run_dir / RUN
    try:
        raw = storage.read_file(path, max_bytes=_MAX_BYTES)
        record = strict_json.loads(raw, name=RUN)
    except (OSError, DamagedError) as error:
        raise RunDirError(
            f"{path} is not that of a run: "
            f"{error.strerror if isinstance(error, OSError) else error}. Give "
            "the directory of a run, or of one of its checkpoints; to begin a "
            "run, an empty or a new one."
        ) from error
    match record:
        case {"run_id": str(run_id)} if _RUN_ID.fullmatch(run_id):
            return run_id
    raise RunDirError(
        f"{path} is not that of a run: it holds no run_id. Give the directory "
        "of a run, or of one of its checkpoints; to begin a run, an empty or "
        "a new one."
    )
