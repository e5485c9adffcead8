"""Measures one model on one backend, in this process."""

import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence

import keras
import keras_ways
from problems import Problem
from turns import Contestant, Train

PACKAGES = {
    "jax": ("jax", "optax"),
    "tensorflow": ("tensorflow-cpu",),
    "torch": ("torch", "pytorch-lightning", "accelerate"),
}
STEPS_PER_EXECUTION = (8, 32, 128)


def _fits(problem: Problem) -> dict[str, Train]:
    """`model.fit` as it comes, and in the ways that may be its best."""
    backend = keras.config.backend()
    fits = {"fit": keras_ways.model_fit(problem)}
    if backend == "torch":  # it takes one step at a time in any case
        return fits
    for count in STEPS_PER_EXECUTION:
        if problem.steps % count == 0:
            name = f"fit, {count} steps per execution"
            fits[name] = keras_ways.model_fit(
                problem, steps_per_execution=count
            )
    if backend == "tensorflow":  # which it compiles by XLA as it comes
        fits["fit, no XLA"] = keras_ways.model_fit(problem, jit_compile=False)
        fits["fit, no XLA, 32 steps per execution"] = keras_ways.model_fit(
            problem, jit_compile=False, steps_per_execution=32
        )
    return fits


def contestants(problem: Problem) -> dict[str, Train]:
    """All that train this model on this backend."""
    found = {"legato": keras_ways.legato_fit(problem), **_fits(problem)}
    match keras.config.backend():
        case "jax":
            import in_jax

            found["by hand"] = in_jax.by_hand(problem)
            found["limit, in calls"] = in_jax.limit_in_calls(problem)
            found["limit, in a loop"] = in_jax.limit_in_loop(problem)
        case "tensorflow":
            import in_tensorflow as tf

            found["by hand"] = tf.by_hand(problem)
            found["limit, in calls"] = tf.limit_in_calls(problem, xla=False)
            found["limit, in a loop"] = tf.limit_in_loop(problem, xla=False)
            found["limit, in calls, XLA"] = tf.limit_in_calls(problem, xla=True)
            found["limit, in a loop, XLA"] = tf.limit_in_loop(problem, xla=True)
        case _:
            import in_torch

            found["by hand"] = in_torch.by_hand(problem, compiled=False)
            found["torch.compile"] = in_torch.by_hand(problem, compiled=True)
            found["Lightning"] = in_torch.lightning(problem)
            found["Accelerate"] = in_torch.accelerate(problem)
            found["limit"] = in_torch.limit(problem)
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(
    problem: Problem, names: Sequence[str], rounds: int, seconds: float
) -> dict:
    """Steps per second of each, round after round, and what was measured.

    Args:
        problem: what is trained.
        names: of the contestants beside legato; none for all.
        rounds: how often each has its turn.
        seconds: of a turn, at least.

    Raises:
        SystemExit: the contestants do not do the same work.
    """
    trains = contestants(problem)
    if unknown := set(names) - set(trains):
        raise SystemExit(
            f"{', '.join(sorted(unknown))}: none of {', '.join(trains)}"
        )
    chosen = [
        Contestant(name, train, problem.steps)
        for name, train in trains.items()
        if not names or name in ("legato", *names)
    ]
    for each in chosen:
        _say(f"{problem.name}: {each.name} compiles")
        each.turn(0)
        each.turn(seconds)  # what begins later has begun then
    _check(chosen, problem)
    rates: dict[str, list[float]] = {each.name: [] for each in chosen}
    for number in range(rounds):
        _say(f"{problem.name}: round {number + 1} of {rounds}")
        for each in chosen:
            rates[each.name].append(each.turn(seconds))
    for each in chosen:
        each.end()
    return {
        "backend": keras.config.backend(),
        "model": problem.name,
        "shapes": problem.shapes,
        "steps": problem.steps,
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "versions": _versions(),
        "rounds": rounds,
        "seconds": seconds,
        "losses": {each.name: each.losses[0] for each in chosen},
        "rates": rates,
    }


def _check(chosen: Sequence[Contestant], problem: Problem) -> None:
    """Those that do not have the same first epoch do something else."""
    expected = chosen[0].losses[0]
    for each in chosen:
        apart = abs(each.losses[0] / expected - 1)
        if not apart <= problem.tolerance:
            raise SystemExit(
                f"{problem.name}: the mean loss of the first epoch is "
                f"{each.losses[0]:.6f} of {each.name}, and {expected:.6f} of "
                f"{chosen[0].name}: they do not do the same work."
            )


def _machine() -> str:
    model = platform.machine()
    cpu = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    cpu = f", {line.split(':', 1)[1].strip()}"
                    break
    return f"{len(os.sched_getaffinity(0))} CPUs ({model}{cpu})"


def _versions() -> dict[str, str]:
    packages = ("keras", *PACKAGES[keras.config.backend()])
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
