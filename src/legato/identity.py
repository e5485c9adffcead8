"""Who a run is: what its future depends on, and what must not change.

The identity is written with every checkpoint and compared when a run is
resumed. A difference is one of three things: it makes this another run
(`RestoreError`), it keeps resuming from being exact (`exact=` decides), or it
does not matter and is not in here.
"""

import hashlib
import json
import os
import platform
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from legato import backends, machine
from legato.compat import keras_saving
from legato.compat.keras_decay import exempt_from_decay
from legato.config import TrainerConfig
from legato.errors import RestoreError
from legato.losses import WeightedSum
from legato.metrics import label
from legato.task import Optimizers, Task
from legato.types import JSON, AuditEntry, AuditStatus
from legato.version import __version__

# Changed freely: they change neither bits nor what is logged.
_FREE = {
    "train_steps", "epochs", "keep_last", "keep_every", "checkpoint_timeout",
    "checkpoint_interval", "steps_per_loop", "exact", "resume", "max_time",
    "progress", "torch_compile", "best_metric", "best_mode", "nonfinite_loss",
    "check_numerics", "max_batch_shapes", "recovery_max_trials",
}  # fmt: skip


@keras_saving.without_tensorflow()
def describe_program(task: Task, optimizers: Optimizers) -> dict[str, JSON]:
    """What the Task and its optimizers are, before anything is trained.

    Args:
        task: the task, when all its parts are built.
        optimizers: what `build_optimizer` returned, not yet trained with.
    """
    bases = [base for base in type(task).__mro__ if not _is_engines_own(base)]
    attributes: dict[str, Any] = {}
    for holder in (*reversed(bases), task):
        attributes |= {
            name: described
            for name, value in vars(holder).items()
            if not name.startswith("__")
            and name != "order_seed"  # a resumed run takes its own
            and (described := _describe(value)) is not None
        }
    return {
        "task": {
            "class": type(task).__qualname__,
            "module": type(task).__module__,
            "attributes": attributes,
            "code_sha256": code_hash(type(task)),
        },
        "optimizer": _optimizer_config(optimizers),
        "definition": task.describe(),
    }


def make_identity(
    program: Mapping[str, JSON],
    config: TrainerConfig,
    data: Mapping[str, JSON],
    validation_data: Mapping[str, JSON] | None,
    metrics: Mapping[str, str],
) -> dict[str, JSON]:
    """Gather everything that a run's bits depend on.

    Args:
        program: what `describe_program` returned.
        config: of the trainer.
        data: the identity of the training data.
        validation_data: that of the validation split.
        metrics: see `legato.metrics.described`.

    Returns:
        All but "program", which is known only when the step is traced.
    """
    made = {
        "environment": _environment(),
        "config": {
            name: value
            for name, value in config.model_dump(mode="json").items()
            if name not in _FREE
        },
        **program,
        "metrics": dict(metrics),
        "data": dict(data),
        "validation_data": validation_data and dict(validation_data),
    }
    # As a checkpoint will give it back: tuples become lists, for example.
    return json.loads(json.dumps(made, default=str))


ORIGIN = "init_from"

_FIRST = "first_sha256"
_NO_FIRST = (
    "whether the first batch is still the same could not be compared, for it "
    "does not repeat"
)
_ANOTHER_FIRST = (
    "{}: the first batch is another one than when the run began (sha256 {}... "
    "-> {}...). Either the data changed, or something that makes them draws "
    "without a seed, anew in each process. Seed it: PyTorch's loaders, "
    "samplers and random_split take a generator "
    "(torch.Generator().manual_seed(1)), NumPy's and tf.data's take a seed. "
    "keras.utils.set_random_seed must come before the data are made, and seeds "
    "PyTorch only where that is the backend: call torch.manual_seed elsewhere"
)


def keep_origin(saved: Any, present: dict[str, JSON]) -> None:
    """What a run began with is read once, and remembered from there on.

    Args:
        saved: the identity in the checkpoint.
        present: that of the program; completed.
    """
    if isinstance(saved, dict) and ORIGIN in saved:
        present[ORIGIN] = saved[ORIGIN]


def rates_that_differ(saved: Any, present: dict[str, Any]) -> set[str]:
    """The optimizers ("" for a single one) with another learning rate."""
    found = set()
    for path, _, _ in _differences(
        saved.get("optimizer"), present["optimizer"], ()
    ):
        if "learning_rate" in path:
            several = "class" not in present["optimizer"]
            found.add(path[0] if several else "")
    return found


def reset_metrics(
    metrics: Iterable[keras.metrics.Metric],
    saved: Any,
    present: dict[str, Any],
    paths: Mapping[str, keras.metrics.Metric],
    audit: Sequence[AuditEntry],
) -> list[str]:
    """Reset metrics that were taken over other steps, or are others, now.

    Args:
        metrics: the training metrics, as they were restored.
        saved: the identity in the checkpoint.
        present: that of the program.
        paths: all metrics, by the paths of their variables.
        audit: what became of each.

    Returns:
        Those that `compare` did not tell of, a sentence each.
    """
    before, now = saved.get("metrics", {}), present["metrics"]
    statuses: dict[int, set[bool]] = {}
    for entry in audit:
        if entry.name in paths:
            is_restored = entry.status is AuditStatus.RESTORED
            statuses.setdefault(id(paths[entry.name]), set()).add(is_restored)
    own = {id(metric): label(metric) for metric in metrics}
    told = []
    for key, metric in {id(each): each for each in paths.values()}.items():
        name = own.get(key)
        if name is not None and before.get(name) != now.get(name):
            metric.reset_state()
        elif False in statuses.get(key, ()) and (
            # (Of others, what is new as a whole measured nothing before.)
            name is not None or True in statuses[key]
        ):
            metric.reset_state()
            told.append(
                f"metrics.{name or metric.name}: its variables are others, so "
                "that it begins anew"
            )
    return told


def compare(
    saved: Any, present: dict[str, JSON], *, override: bool
) -> list[str]:
    """Compare a checkpoint's identity with the program's.

    Args:
        saved: the identity in the checkpoint.
        present: that of the program.
        override: take the program's optimizer and task where they differ.

    Returns:
        What keeps resuming from being exact, a sentence each.

    Raises:
        RestoreError: this is another run; the message names each value.
    """
    if not isinstance(saved, dict):
        raise RestoreError("The checkpoint holds no identity of its run.")
    serious, mild = [], []
    for path, before, after in _differences(saved, present, ()):
        sentence = f"{'.'.join(path)}: {before!r} -> {after!r}"
        top = path[0]
        if path[-1] == _FIRST and None in (before, after):
            # Of data that do not repeat there is none; to find that out may
            # be luck, so that it makes no other run.
            mild.append(f"{'.'.join(path[:-1])}: {_NO_FIRST}")
            continue
        if path[-1] == _FIRST:
            sentence = _ANOTHER_FIRST.format(
                ".".join(path[:-1]), f"{before!s:.12}", f"{after!s:.12}"
            )
        if top == "data" or path in (
            ("config", "seed"),
            ("config", "initial_epoch"),
            ("config", "steps_per_epoch"),
            ("environment", "backend"),
        ):
            serious.append(sentence)
        elif path == ("task", "code_sha256"):
            mild.append("the code of the Task changed")
        elif path == ("task", "module"):
            pass  # a script that was moved is the same program
        elif top in ("definition", "optimizer", "task"):
            (mild if override else serious).append(sentence)
        elif top != "program":
            mild.append(sentence)
    if serious:
        listed = "\n  ".join(serious)
        raise RestoreError(
            "This program is not the run that the checkpoint is of "
            f"(checkpoint -> program):\n  {listed}\nPut the old values back, "
            "use another run_dir, or, if only the optimizer, the learning "
            'rate or the task differ, resume="override" to go on with the new '
            "ones."
        )
    return mild


def _differences(
    a: Any, b: Any, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _differences(a.get(key), b.get(key), (*path, key))
    elif json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
        # (In which NaN equals itself.)
        yield path, a, b


def _environment() -> dict[str, JSON]:
    return {
        "python": platform.python_version(),
        "legato": __version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "backend": backends.current().name,
        **backends.current().fingerprint(),
        "cpu": machine.cpu(),
        "cpus": machine.usable_cpus(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""),
        "floatx": keras.config.floatx(),
        "dtype_policy": keras.config.dtype_policy().name,
    }


def _optimizer_config(optimizers: Optimizers) -> JSON:
    if isinstance(optimizers, dict):
        return {k: _optimizer_config(v) for k, v in optimizers.items()}
    name = type(optimizers).__name__
    config: Any
    try:
        config = _without_names(optimizers.get_config())
    except NotImplementedError:
        # A schedule of the user's own, which `get_config` writes out.
        rate = getattr(optimizers, "_learning_rate", None)
        config = {"learning_rate": type(rate).__name__}
    exempt = exempt_from_decay(optimizers)
    if exempt:
        config["exclude_from_weight_decay"] = exempt
    return {"class": name, **config}


def _without_names(config: Any) -> Any:
    """Automatic names differ between processes and mean nothing."""
    if isinstance(config, dict):
        return {k: _without_names(v) for k, v in config.items() if k != "name"}
    return config


def describe_value(value: Any) -> JSON:
    """Anything a model is compiled with, or made of, to compare by.

    What two processes might write differently, as addresses and automatic
    names, is left out.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {
            str(key): describe_value(each)
            for key, each in value.items()
            if key not in _MEAN_NOTHING
        }
    if isinstance(value, list | tuple):
        return [describe_value(each) for each in value]
    if isinstance(value, keras.layers.Layer | keras.losses.Loss):
        try:
            config = describe_value(value.get_config())
        except Exception:
            config = None  # a class of the user's without one
        return {"class": type(value).__name__, "config": config}
    return getattr(value, "__qualname__", type(value).__qualname__)


# Keras counts names up in each process, and draws some seeds; the rest says
# how a model is stored. How layers are connected is named by these names.
_MEAN_NOTHING = (
    "build_config", "inbound_nodes", "input_layers", "module", "name",
    "output_layers", "registered_name", "seed", "shared_object_id",
)  # fmt: skip


def _describe(value: Any) -> Any:
    """A value to compare by; None for what cannot be compared."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and len(value) <= 100:
        parts = [_describe(v) for v in value]
        return None if any(p is None for p in parts) else parts
    if isinstance(value, keras.losses.Loss):
        config = _without_names(value.get_config())
        return {"class": type(value).__name__, **config}
    if isinstance(value, WeightedSum):
        # In pairs, because a part may have any name.
        named = {"parts": value.parts, "weights": value.weights}
        return {
            "class": type(value).__name__,
            **{
                key: [[name, describe_value(each)] for name, each in by.items()]
                for key, by in named.items()
            },
        }
    return None


def _is_engines_own(cls: type) -> bool:
    """Whether a class is no part of a user's program."""
    return cls is object or cls.__module__ in (
        "legato.task",
        "legato.compiled",
    )


def code_hash(cls: type) -> str:
    """A hash of what a class's methods do; comments do not count."""
    digest = hashlib.sha256()
    for base in cls.__mro__:
        if _is_engines_own(base) or _is_librarys(base):
            continue
        for name, value in sorted(vars(base).items()):
            if isinstance(value, property):
                value = value.fget
            function = getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType):
                defaults = function.__defaults__, function.__kwdefaults__
                digest.update(f"{name}{_stable(defaults)}".encode())
                _hash_code(digest, function.__code__)
    return f"{sys.version_info[0]}.{sys.version_info[1]}:{digest.hexdigest()}"


def _is_librarys(cls: type) -> bool:
    """Whether a class is Keras's or its backend's: versions tell of these."""
    package = cls.__module__.partition(".")[0]
    return package in ("keras", "torch", "tensorflow", "abc")


def _hash_code(digest: Any, code: types.CodeType) -> None:
    digest.update(code.co_code)
    digest.update(repr(code.co_names).encode())
    # The first constant is the docstring, or None in its place; from Python
    # 3.13 on there is nothing in its place, and a flag tells.
    has_place = sys.version_info < (3, 13) or code.co_flags & 0x4000000
    for number, constant in enumerate(code.co_consts):
        if isinstance(constant, types.CodeType):
            _hash_code(digest, constant)
        elif number or not has_place:
            digest.update(_stable(constant).encode())


def _stable(value: Any) -> str:
    """A `repr` that is the same in every process.

    Sets are in order, and objects that would show their address show their
    class.
    """
    match value:
        case frozenset() | set():
            return f"{{{', '.join(sorted(map(_stable, value)))}}}"
        case tuple() | list():
            return f"({', '.join(map(_stable, value))})"
        case dict():
            pairs = (f"{_stable(k)}: {_stable(v)}" for k, v in value.items())
            return f"{{{', '.join(pairs)}}}"
        case None | bool() | int() | float() | complex() | str() | bytes():
            return repr(value)
        case _:
            return type(value).__qualname__ if value is not ... else "..."
