"""Models that leave legato: files that plain Keras reads."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from legato.checkpoint import Checkpoint, find_checkpoint
from legato.errors import ConfigError, RestoreError
from legato.restoring import (
    check_weights,
    model_arrays,
    read_averages,
    replaced,
)
from legato.state import variable_paths

FORMATS = {"keras": ".keras", "weights": ".weights.h5"}
"""What can be written, and how names of files end."""


def export(
    model: keras.Model | Mapping[str, keras.Model],
    path: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    which: str | int | None = None,
    weights: Literal["model", "average"] = "model",
    overwrite: bool = False,
) -> list[Path]:
    """Write a model with the weights of a checkpoint, for plain Keras.

    The file appears whole or not at all. It holds the model and its weights,
    not its optimizer. Seeds are the model's own.

    Args:
        model: a model of which all is built, or a dict of them, as
            `Task.build_model` returns it. It has its own values afterwards.
        path: where to: a name that ends in ".keras" (the model and its
            weights), or in ".weights.h5" (for `load_weights`). Of several
            models, each is written to `NAME.MODEL.keras` in the place of
            `NAME.keras`.
        checkpoint: a run directory, or that of one of its checkpoints, whose
            weights are written. None writes the model as it is.
        which: in a run directory: "latest" (the default), "best", or the
            number of a step.
        weights: "average" writes the averages of the weights that the
            optimizer keeps, in the place of those.
        overwrite: replace files that are there.

    Returns:
        The files.

    Raises:
        ConfigError: an argument is wrong, the model is not built, or a file
            is there.
        RunDirError: there is no such run.
        CheckpointError: there is no such checkpoint, it is damaged, or it
            holds no averages.
        RestoreError: the checkpoint does not fit the model.
        OSError: a file cannot be written.
    """
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    for name, each in models.items():
        if not isinstance(each, keras.Model):
            raise ConfigError(
                f"model={each!r:.80}: it must be a keras.Model, or a dict of "
                "them."
            )
        if not each.built:
            raise ConfigError(
                f"The model {name or each.name!r} is not built, so that it has "
                "no weights yet. Begin it with keras.Input, or call it once."
            )
    check_weights(weights)
    paths = {name: _place(Path(path), name) for name in models}
    for file in paths.values():
        if not overwrite and os.path.lexists(file):
            raise ConfigError(
                f"{file} is there already. Choose another name, or say "
                "overwrite=True (on the command line: --overwrite)."
            )
    named = variable_paths(
        {"model": models if isinstance(model, Mapping) else model}
    )
    arrays = _arrays(model, models, named, checkpoint, which, weights)
    with replaced(named, arrays):
        for name, each in models.items():
            _write(each, paths[name])
    return list(paths.values())


def _arrays(
    model: Any,
    models: Mapping[str, keras.Model],
    named: Mapping[str, keras.Variable],
    checkpoint: str | os.PathLike[str] | Checkpoint | None,
    which: str | int | None,
    weights: str,
) -> dict[str, np.ndarray]:
    """The values to write, by the paths of variables; none: as they are."""
    if checkpoint is None:
        if weights == "model":
            return {}
        found = [getattr(each, "optimizer", None) for each in models.values()]
        return read_averages(model, found)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = find_checkpoint(checkpoint, which)
    saved = model_arrays(checkpoint, weights)
    # (Not the seeds: backends differ in their type.)
    held = {id(v) for each in models.values() for v in each.weights}
    wanted = [path for path, variable in named.items() if id(variable) in held]
    problems = []
    for path in wanted:
        shape = tuple(named[path].shape)
        if path not in saved:
            problems.append(f"{path}: in the model only")
        elif saved[path].shape != shape:
            problems.append(
                f"{path}: {list(saved[path].shape)} in the checkpoint, "
                f"{list(shape)} in the model"
            )
    problems += [
        f"{path}: in the checkpoint only" for path in saved if path not in named
    ]
    if problems:
        raise RestoreError(
            f"The checkpoint {checkpoint.path} does not fit the model:\n  "
            + "\n  ".join(problems[:10])
            + f"\n  ... and {len(problems) - 10} more" * (len(problems) > 10)
        )
    return {path: saved[path] for path in wanted}


def _place(path: Path, model: str) -> Path:
    for suffix in FORMATS.values():
        stem = path.name.removesuffix(suffix)
        if stem and stem != path.name:
            return path.with_name(f"{stem}.{model}{suffix}") if model else path
    raise ConfigError(
        f"path={str(path)!r}: its name must end in "
        f"{' or '.join(FORMATS.values())}, which say what is written."
    )


def _write(model: keras.Model, path: Path) -> None:
    # Late: h5py takes a while.
    from legato.compat.keras_saving import without_training

    # (Keras goes by how a name ends.)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with without_training(model):
            if path.name.endswith(FORMATS["keras"]):
                model.save(temporary)
            else:
                model.save_weights(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
