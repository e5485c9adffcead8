"""What is in the directory of one checkpoint."""

import dataclasses
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from legato import storage
from legato.errors import DamagedError
from legato.storage import strict_json
from legato.types import JSON

STATE = "state.safetensors"
HOST = "host.json"
DATA = "data/"

_LOOKS = 5
_LOOK_SECS = 0.01

_Read = TypeVar("_Read")

_STEP_NAME = re.compile(r"step_(\d{8,18})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint in memory; every byte of it was checked.

    Attributes:
        step: completed training steps.
        run_id: the run that wrote it.
        best: whether it was the best so far when it was written.
        arrays: name -> array, sorted by name; writable.
        host: the state that is not arrays.
        data: name -> opaque bytes.
        path: where it was read from.
        sha256: the hash of its manifest, and so of everything in it.
    """

    step: int
    run_id: str
    best: bool
    arrays: dict[str, np.ndarray]
    host: dict[str, Any]
    data: dict[str, bytes]
    path: Path
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What the manifest of a checkpoint says about it."""

    step: int
    run_id: str
    best: bool
    layout: storage.TensorLayout
    sha256: str

    @staticmethod
    def encode(
        *, step: int, run_id: str, best: bool, layout: storage.TensorLayout
    ) -> dict[str, JSON]:
        """The form of it in a manifest."""
        return {
            "step": step,
            "run_id": run_id,
            "best": best,
            "arrays": layout.tree(),
        }


def step_name(step: int) -> str:
    """The name of the directory of a step's checkpoint."""
    return f"step_{step:08d}"


def parse_step(name: str) -> int | None:
    """The step whose checkpoint has this name; None if none has."""
    found = _STEP_NAME.fullmatch(name)
    if found is None:
        return None
    step = int(found[1])
    return step if name == step_name(step) else None  # one spelling only


def list_steps(directory: Path) -> list[int]:
    """The steps of the committed checkpoints in a directory, ascending.

    Raises:
        OSError: it cannot be listed.
    """
    found = map(parse_step, os.listdir(directory))
    return sorted(step for step in found if step is not None)


def load_checkpoint(
    path: str | os.PathLike[str], *, run_id: str | None = None
) -> Checkpoint:
    """Reads and checks a checkpoint; changes nothing on disk.

    Its writer may replace or remove it meanwhile; then it is read again.

    Args:
        path: its directory, such as `checkpoints/step_00000100` or `best`.
        run_id: the run that it must be of; None takes any.

    Raises:
        DamagedError: if it is not there, or not what was written, or not of
            that run, or not of the step that its name says.
        CheckpointError: if it cannot be read for another reason.
    """
    path = Path(path)
    return _look(path, lambda place: _load(path, place, run_id))


def read_about(path: Path, *, run_id: str | None = None) -> About:
    """Reads the manifest of a checkpoint alone; again as `load_checkpoint`.

    Raises:
        DamagedError: as `load_checkpoint`.
        CheckpointError: as `load_checkpoint`.
    """

    def read(place: Path) -> About:
        return _parse_about(storage.read_manifest(place), path, run_id)

    return _look(path, read)


def _look(path: Path, read: Callable[[Path], _Read]) -> _Read:
    """Reads a directory that its writer may replace or remove meanwhile."""
    looks = 0
    while True:
        place = storage.locate(path)
        before = place_identity(place)
        try:
            return read(place)
        except DamagedError:
            now = storage.locate(path)
            if before is not None and (place, before) != (
                now,
                place_identity(now),
            ):
                continue  # it was replaced while it was read
            # Missing may mean: looked for in both places just as it went from
            # one to the other. That does not happen time and again.
            looks += 1
            if before is not None or looks == _LOOKS:
                raise
            time.sleep(_LOOK_SECS)


def _load(path: Path, place: Path, run_id: str | None) -> Checkpoint:
    manifest, files = storage.read_directory(place)
    about = _parse_about(manifest, path, run_id)
    arrays = storage.read_tensors(
        files.pop(STATE), about.layout, name=str(path / STATE)
    )
    host = strict_json.loads(files.pop(HOST), name=str(path / HOST))
    if not isinstance(host, dict):
        raise DamagedError(f"{path / HOST}: not an object")
    return Checkpoint(
        step=about.step,
        run_id=about.run_id,
        best=about.best,
        arrays=arrays,
        host=host,
        data={k.removeprefix(DATA): bytes(v) for k, v in files.items()},
        path=path,
        sha256=about.sha256,
    )


def _parse_about(
    manifest: storage.Manifest, path: Path, run_id: str | None
) -> About:
    match manifest.about:
        case {
            "step": int(step),
            "run_id": str(found_run),
            "best": bool(best),
            "arrays": dict(tree),
        } if step >= 0:
            pass
        case _:
            raise DamagedError(f"{path}: its manifest is not a checkpoint's")
    for name in {STATE, HOST} - manifest.files.keys():
        raise DamagedError(f"{path}: its manifest does not list {name}")
    for name in manifest.files.keys() - {STATE, HOST}:
        if not name.startswith(DATA):
            raise DamagedError(f"{path}: its manifest lists {name}")
    named = parse_step(path.name)
    if named is not None and named != step:
        raise DamagedError(f"{path}: holds the checkpoint of step {step}")
    if run_id is not None and found_run != run_id:
        raise DamagedError(
            f"{path}: is of another run ({found_run[:80]!r}, not {run_id!r})"
        )
    return About(
        step=step,
        run_id=found_run,
        best=best,
        layout=storage.parse_tree(tree, name=str(path)),
        sha256=manifest.sha256,
    )


def place_identity(path: Path) -> tuple[int, int] | None:
    """Tells a directory from another that was at its place."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns  # inodes are used again
