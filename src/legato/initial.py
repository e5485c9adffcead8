"""The weights that a run begins with, where it takes them from others.

Only a run that begins is given them: from its first checkpoint on it needs
what they were taken from no more.
"""

import fnmatch
import hashlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy as np

from legato import backends, storage
from legato.checkpoint import find_checkpoint
from legato.config import InitConfig
from legato.errors import ConfigError, DamagedError, RestoreError
from legato.restoring import audit_table, model_arrays
from legato.state import variable_paths
from legato.types import JSON, AuditEntry, AuditStatus

_H5 = (".keras", ".h5", ".hdf5")
_SAFETENSORS = ".safetensors"
_SHOWN = 10


class _Found(NamedTuple):
    """What a source holds.

    Attributes:
        arrays: by the path of the model's variable; those that fit.
        shapes: of all that there is, likewise; what the model does not have,
            by its name in the source.
        identity: what tells this source from another.
    """

    arrays: Mapping[str, np.ndarray]
    shapes: Mapping[str, tuple[int, ...]]
    identity: dict[str, JSON]


def initialize(
    model: Any, config: InitConfig, announce: Callable[[str], None]
) -> dict[str, JSON]:
    """Give a model's variables the values of others, all of them or none.

    Seeds are not among them: a run's randomness is that of its own seed.

    Args:
        model: a model, or a dict of them, of which all is built.
        config: where from, and which.
        announce: told what became of each variable.

    Returns:
        What identifies the source.

    Raises:
        ConfigError: there is no such source, or it is of no known kind.
        RunDirError: there is no such run.
        CheckpointError: there is no such checkpoint, or it is damaged.
        RestoreError: a variable that is to be taken is not there or has
            another shape; or nothing is to be taken.
    """
    models = model.values() if isinstance(model, dict) else [model]
    weights = {id(v) for each in models for v in each.weights}
    variables = {
        path: variable
        for path, variable in variable_paths({"model": model}).items()
        if id(variable) in weights
    }
    path = Path(config.path).expanduser()
    if path.suffix in _H5:
        found = _read_h5(path, model, variables)
    elif path.suffix == _SAFETENSORS:
        found = _read_safetensors(path, variables)
    else:
        found = _read_checkpoint(path, config)
    audit, taken = _match(variables, found, config)
    backends.current().write(
        [variables[name] for name in taken], list(taken.values())
    )
    title = f"Begun with the weights in {config.path}:"
    announce(audit_table(title, audit))
    return found.identity


def _match(
    variables: Mapping[str, keras.Variable], found: _Found, config: InitConfig
) -> tuple[list[AuditEntry], dict[str, np.ndarray]]:
    audit, problems = [], []
    taken: dict[str, np.ndarray] = {}
    for name, variable in variables.items():
        status, detail = AuditStatus.RESTORED, ""
        shape = tuple(variable.shape)
        if not _matches(name, config.include):
            status, detail = AuditStatus.IGNORED, "not in include"
        elif _matches(name, config.exclude):
            status, detail = AuditStatus.IGNORED, "in exclude"
        elif name not in found.shapes:
            status, detail = AuditStatus.NEW, "in the model only"
        elif found.shapes[name] != shape:
            status = AuditStatus.NEW
            detail = (
                f"{list(found.shapes[name])} in the source, {list(shape)} in "
                "the model"
            )
        else:
            cast, detail = _cast(found.arrays[name], variable)
            if cast is None:
                status = AuditStatus.NEW
            else:
                taken[name] = cast
        audit.append(AuditEntry("weights", name, status, detail))
        if status is AuditStatus.NEW:
            problems.append(f"{name}: {detail}")
    others = [name for name in found.shapes if name not in variables]
    audit += [
        AuditEntry("weights", name, AuditStatus.MISSING, "in the source only")
        for name in others
    ]
    if not problems and taken:
        return audit, taken
    example = (
        problems[0].partition(":")[0].rpartition("/")[0] if problems else ""
    )
    if not taken:
        held = ", ".join(sorted(found.shapes)[:_SHOWN])
        problems.append(f"none is taken; the source holds: {held or 'none'}")
    more = len(problems) - _SHOWN
    raise RestoreError(
        f"init_from: the weights in {config.path} do not fit the model:\n  "
        + "\n  ".join(problems[:_SHOWN])
        + (f"\n  ... and {more} more" if more > 0 else "")
        + "\nWhat is to begin anew, name in init_from.exclude, such as "
        f'["{example or "model"}/*"].'
    )


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _cast(array: np.ndarray, variable: Any) -> tuple[np.ndarray | None, str]:
    """An array in the variable's dtype, and what was done, or forbids it."""
    wanted = np.dtype(
        ml_dtypes.bfloat16 if variable._dtype == "bfloat16" else variable._dtype
    )
    if array.dtype == wanted:
        return array, ""
    words = f"{array.dtype} in the source, {wanted} in the model"
    both = (array.dtype, wanted)
    if all(d.kind == "f" or d == ml_dtypes.bfloat16 for d in both):
        return array.astype(wanted), words
    return None, words


def _read_checkpoint(path: Path, config: InitConfig) -> _Found:
    if path.is_file():
        raise ConfigError(
            f"init_from: {path} is of no known kind: give the directory of a "
            "run or of a checkpoint, or a .keras, .weights.h5 or .safetensors "
            "file."
        )
    which = config.checkpoint
    found = find_checkpoint(path, None if which == "latest" else which)
    arrays = model_arrays(found, config.weights)
    return _Found(
        arrays,
        {name: array.shape for name, array in arrays.items()},
        {"step": found.step, "sha256": found.sha256},
    )


def _read_h5(
    path: Path, model: Any, variables: Mapping[str, keras.Variable]
) -> _Found:
    # Late: h5py takes a while.
    from legato.compat.keras_saving import read_weights, saved_names

    if isinstance(model, dict):
        raise ConfigError(
            f"init_from: {path} holds one model, and the Task has several "
            f"({', '.join(model)}). Give a run's directory or a .safetensors "
            "file."
        )
    identity = _identity(path)
    paths = {id(variable): name for name, variable in variables.items()}
    names = {
        name: paths[id(variable)]
        for name, variable in saved_names(model).items()
    }
    wanted = {
        name: tuple(variables[path].shape) for name, path in names.items()
    }
    try:
        arrays, shapes = read_weights(path, wanted)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error
    return _Found(
        {names[name]: array for name, array in arrays.items()},
        {names.get(name, name): shape for name, shape in shapes.items()},
        identity,
    )


def _read_safetensors(
    path: Path, variables: Mapping[str, keras.Variable]
) -> _Found:
    identity = _identity(path)
    try:
        arrays = storage.read_safetensors(path.read_bytes(), name=str(path))
    except (OSError, DamagedError) as error:
        raise _unreadable(path, error) from error
    named = {
        f"model/{name}" if f"model/{name}" in variables else name: array
        for name, array in arrays.items()
        if not name.startswith(("optimizer/", "metrics/", "random/", "data/"))
    }
    return _Found(
        named, {name: array.shape for name, array in named.items()}, identity
    )


def _identity(path: Path) -> dict[str, JSON]:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise ConfigError(
            f"init_from: {path} cannot be read: {error.strerror}."
        ) from error
    return {"sha256": digest.hexdigest()}


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"init_from: {path} is not what its name says: {error}.")
