"""What a training step costs, and what everything else adds to it.

Nothing here imports Keras before there is something to measure.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from legato.profiling.estimates import Estimate
from legato.profiling.limits import check_seconds
from legato.profiling.report import Cost, Profile

if TYPE_CHECKING:
    import keras

    from legato.config import TrainerConfig
    from legato.task import Task

__all__ = ["Cost", "Estimate", "Profile", "profile"]

SECONDS = 30.0
"""How long it takes where nothing else is asked for."""


def profile(
    task: "Task",
    *,
    config: "TrainerConfig",
    callbacks: "Sequence[keras.callbacks.Callback]" = (),
    seconds: float = SECONDS,
    say: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Measure what each part of training costs.

    The engine's own parts are run, on batches of the task's data: the bare
    step, without metrics, again and again on the same batches; with each
    metric by itself, and all as they are configured; with the data as they
    come; with each callback; and what summaries, checkpoints and validation
    take when they are due. All have their turn, round after round, and what
    is reported is the median of the differences within a round.

    Nothing is trained: the values of all variables, and the global random
    generators, are afterwards what they were, no run directory is touched,
    and nothing is left behind. Callbacks of your own are called as in
    training, and what they write, they write; where Keras's callbacks write
    files, they do so in a temporary directory.

    Args:
        task: whose training is measured.
        config: how it would be trained: its length, metrics and intervals.
        callbacks: Keras callbacks, which are measured one at a time, as are
            those of the Task.
        seconds: about how long to take. Compilations, and one round of
            measuring, take what they take.
        say: is told how it goes.

    Raises:
        ConfigError: an argument is wrong, or the Task builds something else
            than it must.
        StepError: the step broke its contract.
    """
    check_seconds(seconds)
    from legato.profiling.measuring import measure

    return measure(task, config, callbacks, seconds, say)
