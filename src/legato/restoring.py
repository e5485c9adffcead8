"""Putting saved state back, all of it or none, and saying what was."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import rich.console
import rich.table

from legato import backends
from legato.checkpoint import Checkpoint, CheckpointStore
from legato.compat import keras_tracing
from legato.errors import (
    CheckpointError,
    ConfigError,
    DamagedError,
    RestoreError,
    RunDirError,
)
from legato.rng import get_host_state, set_host_state
from legato.state import average_paths, layer_paths, variable_paths
from legato.types import JSON, AuditEntry, AuditStatus


def check_resume(resume: str, run_dir: Path, steps: Sequence[int]) -> None:
    """Check that there is what `resume=` asks for.

    Args:
        resume: of the config.
        run_dir: the run directory.
        steps: of which there are checkpoints.

    Raises:
        RunDirError: there is not.
    """
    if resume == "must" and not steps:
        raise RunDirError(
            f'resume="must": there is no checkpoint in {run_dir}. Give the '
            'run_dir of a run, or resume="auto" to begin one.'
        )
    if resume == "never" and steps:
        raise RunDirError(
            f'resume="never": {run_dir} holds a run at step '
            f'{max(steps)}. Choose another run_dir, or resume="auto" to go on '
            "with it."
        )


def assign_arrays(
    variables: Mapping[str, keras.Variable],
    checkpoint: Checkpoint,
    *,
    lenient: Set[str] = frozenset(),
) -> list[AuditEntry]:
    """Put a checkpoint's arrays into variables, all of them or none.

    Args:
        variables: by path (see `state.variable_paths`).
        checkpoint: what was saved.
        lenient: paths, or first parts of paths, that may differ: a variable
            that does not fit keeps its value, and the audit says so.

    Raises:
        RestoreError: a variable is missing, new, or of another shape or
            dtype; the message names it.
    """
    roots = {_root(name) for name in variables}
    saved = {
        name: array
        for name, array in checkpoint.arrays.items()
        if _root(name) in roots
    }
    audit: list[AuditEntry] = []
    for name in dict.fromkeys((*variables, *saved)):
        if name not in variables:
            status, detail = AuditStatus.MISSING, "in the checkpoint only"
        elif name not in saved:
            status, detail = AuditStatus.NEW, "in the program only"
        else:
            old = f"{saved[name].dtype}{list(saved[name].shape)}"
            variable: Any = variables[name]
            # (`variable.dtype` would be what autocasting makes of it.)
            new = f"{variable._dtype}{list(variable.shape)}"
            status, detail = AuditStatus.RESTORED, ""
            if old != new:
                status = AuditStatus.IGNORED
                detail = f"{old} in the checkpoint, {new} in the program"
        audit.append(AuditEntry("arrays", name, status, detail))
    problems = [
        f"{entry.name}: {entry.detail}"
        for entry in audit
        if entry.detail and lenient.isdisjoint({entry.name, _root(entry.name)})
    ]
    if problems:
        more = len(problems) - 10
        raise RestoreError(
            f"The checkpoint of step {checkpoint.step} does not fit the "
            "program:\n  "
            + "\n  ".join(problems[:10])
            + (f"\n  ... and {more} more" if more > 0 else "")
            + "\nThe model, the optimizer or the Task changed since. Put it "
            "back, or train the new one in another run_dir."
        )
    fitting = [e.name for e in audit if e.status is AuditStatus.RESTORED]
    backends.current().write(
        [variables[name] for name in fitting],
        [saved[name] for name in fitting],
    )
    return audit


def model_arrays(
    checkpoint: Checkpoint, weights: str = "model"
) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint's model, by their paths.

    Args:
        checkpoint: which.
        weights: "model" for its own; "average" for the averages that its
            optimizer keeps, in the place of those that have one.

    Raises:
        CheckpointError: its optimizer keeps no averages.
    """
    arrays = {
        path: array
        for path, array in checkpoint.arrays.items()
        if path.startswith("model/")
    }
    if weights == "average":
        arrays |= averages(checkpoint)
    return arrays


def check_weights(weights: Any) -> None:
    """Refuse what is neither the model's own weights nor their averages.

    Raises:
        ConfigError: it is neither.
    """
    if weights not in ("model", "average"):
        raise ConfigError(
            f'weights={weights!r}: it must be "model" or "average".'
        )


def averages(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The averages in a checkpoint, by the paths of the model's variables.

    None before the first update of their optimizer (which a
    `LossScaleOptimizer` may put off): then they are nothing yet.

    Raises:
        CheckpointError: its optimizer keeps no averages.
    """
    places = average_paths(checkpoint.arrays)
    if not places:
        raise CheckpointError(
            f"{checkpoint.path}: holds no averages of the weights: its run's "
            "optimizer keeps none. Train with use_ema=True (in a config: "
            "optimizer.ema_momentum), or take the model's own."
        )
    return _begun(places, checkpoint.arrays)


def _begun(
    places: Mapping[str, str], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Those averages whose optimizer has made an update.

    Args:
        places: see `average_paths`.
        arrays: by path.
    """
    return {
        path: arrays[place]
        for path, place in places.items()
        if np.any(arrays[_counter(path, place)])
    }


def _counter(path: str, place: str) -> str:
    """Where the optimizer counts the updates that are in an average."""
    return f"{place.removesuffix(f'average/{path}')}iteration"


class Held(NamedTuple):
    """Whose values the variables hold: of which step, and in words."""

    step: int | None
    words: str = ""

    def __str__(self) -> str:
        return self.words or f"step {self.step}"


def hold_valid(
    variables: Mapping[str, keras.Variable],
    store: CheckpointStore,
    step: int,
    lenient: Set[str],
) -> Held:
    """After a failure: values in all variables, and word of whose.

    Args:
        variables: by name.
        store: the run's checkpoints.
        step: of which they hold the values, if none was lost.
        lenient: see `assign_arrays`.
    """
    if backends.current().lost_variables(list(variables.values())):
        # A device call had taken its inputs when it failed.
        return _assign_newest(variables, store, lenient)
    return Held(step)


def _assign_newest(
    variables: Mapping[str, keras.Variable],
    store: CheckpointStore,
    lenient: Set[str],
) -> Held:
    """Put the newest checkpoint's arrays into variables; say whose they are."""
    try:
        store.wait()
        checkpoint = store.restore()
    except CheckpointError as problem:
        return Held(None, f"nothing valid ({problem})")
    if checkpoint is None:
        return Held(None, "nothing valid, for there is no checkpoint yet")
    assign_arrays(variables, checkpoint, lenient=lenient)
    step = checkpoint.step
    return Held(step, f"step {step}, the newest checkpoint")


def set_rates(
    names: Iterable[str],
    optimizers: Mapping[str, keras.optimizers.Optimizer],
    rates: Mapping[str, float],
) -> None:
    """Give optimizers their program's learning rates again.

    A schedule is no variable, and was the program's all along.

    Args:
        names: of the optimizers.
        optimizers: by name.
        rates: by name.
    """
    for name in names:
        optimizer = optimizers[name]
        if isinstance(optimizer.learning_rate, keras.Variable):
            optimizer.learning_rate = rates[name]


def by_root(
    arrays: Mapping[str, np.ndarray],
) -> dict[str, dict[str, np.ndarray]]:
    """Arrays by the first part of their paths, and by the rest."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for path, array in arrays.items():
        root, _, name = path.partition("/")
        found.setdefault(root, {})[name] = array
    return found


def _root(path: str) -> str:
    return path.partition("/")[0]


def get_frozen(
    roots: Mapping[str, Any], variables: Mapping[str, keras.Variable]
) -> dict[str, JSON]:
    """Which layers and variables are not trainable."""
    return {
        "layers": [k for k, v in layer_paths(roots).items() if not v.trainable],
        "variables": [
            path
            for path, variable in variables.items()
            if path.startswith("model/") and not variable.trainable
        ],
    }


def set_frozen(
    saved: JSON,
    roots: Mapping[str, Any],
    variables: Mapping[str, keras.Variable],
) -> None:
    """Put back what `get_frozen` returned; steps are traced again then.

    Raises:
        DamagedError: it is not that.
    """
    match saved:
        case {"layers": list(layers), "variables": list(frozen)} if all(
            isinstance(path, str) for path in (*layers, *frozen)
        ):
            pass
        case _:
            raise DamagedError("The saved trainable flags are damaged.")
    # Parents come first, and set their children's.
    for path, layer in layer_paths(roots).items():
        if layer.trainable != (path not in layers):
            layer.trainable = path not in layers
    for path, variable in variables.items():
        if path.startswith("model/"):
            try:
                variable.trainable = path not in frozen
            except RuntimeError as error:  # PyTorch's, of integers
                raise DamagedError(
                    f"The saved trainable flags are damaged: {path} cannot be "
                    f"trained: {error}"
                ) from error


@contextlib.contextmanager
def kept(variables: Sequence[keras.Variable]) -> Iterator[None]:
    """What happens inside leaves the values of these as they were."""
    backend = backends.current()
    values = [np.array(a, copy=True) for a in backend.read(variables)]
    try:
        yield
    finally:
        backend.write(variables, values)


@contextlib.contextmanager
def replaced(
    variables: Mapping[str, keras.Variable], arrays: Mapping[str, np.ndarray]
) -> Iterator[None]:
    """What happens inside sees other values; afterwards all is as it was.

    No checkpoint may be written inside. (A kill there loses nothing then.)

    Args:
        variables: by path.
        arrays: the other values, by path; of some variables.
    """
    chosen = [variables[path] for path in arrays]
    with kept(chosen):
        backends.current().write(chosen, list(arrays.values()))
        yield


def read_averages(model: Any, optimizer: Any) -> dict[str, np.ndarray]:
    """The averages that optimizers keep of a model's variables.

    Args:
        model: a model, or a dict of them.
        optimizer: an optimizer, or a dict of them, that has been used.

    Returns:
        By the paths of the model's variables.

    Raises:
        ConfigError: no optimizer keeps any.
    """
    variables = variable_paths({"model": model, "optimizer": optimizer})
    places = average_paths(variables)
    if not places:
        raise ConfigError(
            'weights="average": no optimizer keeps averages of the weights. '
            "Make one with use_ema=True (in a config: optimizer.ema_momentum)."
        )
    wanted = {*places.values(), *(_counter(*pair) for pair in places.items())}
    chosen = [path for path in variables if path in wanted]
    values = backends.current().read([variables[path] for path in chosen])
    return _begun(places, dict(zip(chosen, map(np.array, values), strict=True)))


def averaged(
    weights: str,
    model: Any,
    optimizer: Any,
    checkpoint: Checkpoint | None = None,
) -> contextlib.AbstractContextManager[None]:
    """Around measuring: the model has the weights that are asked for.

    Args:
        weights: "model" for its own; "average" for averages of them.
        model: a model, or a dict of them.
        optimizer: theirs, likewise.
        checkpoint: whose averages; None takes the optimizer's.

    Raises:
        CheckpointError: the checkpoint holds no averages.
        ConfigError: `weights` is neither, or no optimizer keeps averages.
    """
    check_weights(weights)
    if weights == "model":
        return contextlib.nullcontext()
    if checkpoint is None:
        arrays = read_averages(model, optimizer)
    else:
        arrays = averages(checkpoint)
    return replaced(variable_paths({"model": model}), arrays)


def get_random_state() -> tuple[JSON, dict[str, np.ndarray]]:
    """Every global generator: Python's, NumPy's, Keras's, the backend's."""
    backend = backends.current()
    state, arrays = get_host_state()
    for name, array in backend.get_random_state().items():
        arrays[f"backend.{name}"] = array
    unseeded = keras_tracing.global_seed_state()
    if unseeded is not None:
        arrays["keras"] = np.array(backend.read([unseeded])[0])
    return state, arrays


def set_random_state(state: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Put back what `get_random_state` returned.

    Raises:
        DamagedError: it is not that.
    """
    set_host_state(state, arrays)
    prefix = "backend."
    backend = backends.current()
    backend.set_random_state(
        {
            name.removeprefix(prefix): array
            for name, array in arrays.items()
            if name.startswith(prefix)
        }
    )
    if "keras" in arrays:
        unseeded = keras_tracing.make_global_seed_state()
        backend.write([unseeded], [arrays["keras"]])


def audit_table(title: str, audit: Sequence[AuditEntry]) -> str:
    """A line for each part of the state, naming all that was not restored."""
    table = rich.table.Table(box=None, pad_edge=False)
    for column in ("part", "restored", "otherwise"):
        table.add_column(column)
    for part in dict.fromkeys(entry.part for entry in audit):
        entries = [entry for entry in audit if entry.part == part]
        others = [e for e in entries if e.status is not AuditStatus.RESTORED]
        shown = [
            f"{e.name} {e.status}".strip() + (f" ({e.detail})" * bool(e.detail))
            for e in others[:5]
        ]
        if len(others) > len(shown):
            shown.append(f"and {len(others) - len(shown)} more")
        restored = len(entries) - len(others)
        table.add_row(part, str(restored), "; ".join(shown) or "-")
    console = rich.console.Console(width=100)
    with console.capture() as captured:
        console.print(title, highlight=False)
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
