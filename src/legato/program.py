"""How a run goes: when things are due, and how steps reach the device.

The latter is chosen when the run begins, and kept.
"""

import dataclasses
import warnings
from typing import Any

from legato import backends
from legato.backends import Compilation, LoopMode
from legato.checkpoint import Checkpoint
from legato.config import TrainerConfig
from legato.data import DataSource
from legato.errors import DamagedError, LegatoWarning
from legato.evaluation import MAX_CAPACITY, loop_capacity
from legato.schedule import Schedule
from legato.task import Task

# From here on some ten seconds of compilation are worth it.
_LONG_RUN_STEPS = 5000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What may change bits and is not in the code.

    Attributes:
        mode: how steps reach the device; None where the traced step decides.
        capacity: batches in one device call.
        compilation: whether to compile where that is a choice and `mode` is
            None.
    """

    mode: LoopMode | None
    capacity: int
    compilation: Compilation


def choose_program(
    config: TrainerConfig, source: DataSource, train_steps: int, saved: Any
) -> Program:
    """Take the choices of the run, or make those of a new one.

    Args:
        config: of the trainer.
        source: the training data.
        train_steps: length of the run.
        saved: the identity in the run's checkpoint; None for a new run.

    Raises:
        DamagedError: the checkpoint does not tell.
    """
    mode, capacity = None, loop_capacity(source)
    if saved is not None:
        mode, capacity = _saved_choices(saved)
        mode = _keep(mode, config)
    compilation: Compilation
    match config.torch_compile:
        case True:
            compilation = "always"
        case False:
            compilation = "never"
        case _:
            is_long = train_steps >= _LONG_RUN_STEPS
            compilation = "auto" if is_long else "replay"
    return Program(mode=mode, capacity=capacity, compilation=compilation)


def _saved_choices(saved: Any) -> tuple[LoopMode, int]:
    match saved:
        case {"program": {"mode": mode, "capacity": int(capacity)}} if (
            mode in backends.current().modes and 1 <= capacity <= MAX_CAPACITY
        ):
            return mode, capacity
    raise DamagedError(
        "The checkpoint does not say how its run's steps reach the device."
    )


def _keep(mode: LoopMode, config: TrainerConfig) -> LoopMode | None:
    modes = backends.current().modes
    if config.torch_compile == "auto" or "compiled" not in modes:
        return mode
    if config.torch_compile == (mode == "compiled"):
        return mode
    if config.resume == "override":
        return None
    warnings.warn(
        f"torch_compile={config.torch_compile}: the steps of this run were "
        f"{mode} from the beginning, and stay so to be exact. "
        'resume="override" changes it.',
        LegatoWarning,
        stacklevel=4,
    )
    return mode


def make_schedule(
    config: TrainerConfig,
    batches_per_epoch: int,
    *,
    validates: bool,
    skipped: tuple[tuple[int, int], ...] = (),
) -> Schedule:
    """The cadences of a run.

    Args:
        config: of the trainer.
        batches_per_epoch: of the training data.
        validates: whether there is anything to validate on.
        skipped: see `Schedule`.
    """
    per_epoch = config.steps_per_epoch or batches_per_epoch
    interval: Any = config.checkpoint_interval
    freq = config.validation_freq
    epochs = max(0, (config.epochs or 0) - config.initial_epoch)
    return Schedule(
        train_steps=config.train_steps or epochs * per_epoch,
        steps_per_epoch=per_epoch,
        validation_interval=config.validation_interval if validates else None,
        checkpoint_interval=None if config.checkpoint_seconds else interval,
        validation_freq=freq if isinstance(freq, int) else frozenset(freq),
        summary_interval=config.summary_interval,
        skipped=skipped,
    )


def choose_seed(
    task: Task, config: TrainerConfig, checkpoint: Checkpoint | None
) -> int:
    """The seed of the order of the data: that which the run began with.

    Raises:
        DamagedError: the one in the checkpoint is none.
    """
    seed = task.order_seed
    if seed is None:
        return config.seed
    if checkpoint is not None:
        seed = checkpoint.host.get("seed")
    if type(seed) is not int:
        raise DamagedError(f"The saved seed is {seed!r:.80}.")
    return seed
