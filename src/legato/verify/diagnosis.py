"""Why two runs differ: the first difference, and what was met on the way."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from legato.diff import Difference, RunComparison

_GENERATORS = ("random.", "numpy.random.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cause:
    """A likely reason.

    Attributes:
        what: it is, with its place.
        remedy: what to do; empty where `what` says it.
    """

    what: str
    remedy: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstDifference:
    """Where two runs part.

    Attributes:
        step: the first checkpoint that differs, or the first line of a log;
            None if only what is written at the end differs.
        after: the last step that was the same; 0 if none was.
        name: of what differs there.
        differences: in it.
    """

    step: int | None
    after: int
    name: str
    differences: list[Difference]

    @property
    def where(self) -> str:
        """The first step that differs, and the last that does not."""
        at = "at the end" if self.step is None else f"at step {self.step}"
        return f"{at} (step {self.after} was the same)"

    @property
    def parts(self) -> list[str]:
        """The parts of the state that differ, in a person's words."""
        return list(dict.fromkeys(map(part_of, self.differences)))


def first_difference(comparison: RunComparison) -> FirstDifference | None:
    """Where two runs part; None if they do not.

    Checkpoints first: they hold causes, and logs their effects.
    """
    saved = [each for each in comparison.compared if each.kind == "checkpoint"]
    after = 0
    for each in saved:
        if each.differences:
            return FirstDifference(
                step=each.step,
                after=after,
                name=each.name,
                differences=each.differences,
            )
        after = each.step or 0
    for each in comparison.differing:
        return FirstDifference(
            step=each.step,
            after=after,
            name=each.name,
            differences=each.differences,
        )
    return None


def part_of(difference: Difference) -> str:
    """Which part of the state a difference is in, as a person names it."""
    path = difference.path.replace("/", ".")
    root, _, rest = path.partition(".")
    match root:
        case "model":
            return f"the model's {_of_model(rest)}"
        case "optimizer" if "learning_rate" in rest:
            return "the learning rate"
        case "optimizer":
            return f"the optimizer's {rest}"
        case "metrics":
            return f"the metric {rest}"
        case "task":
            return f"the task's {rest}"
        case "callbacks":
            return _of_callback(rest)
        case "data":
            return "the position in the data, or their order"
        case "clock":
            return f"the loop's {rest.split('.')[0]}"
        case "random":
            return "a global generator of random numbers"
        case _:
            return path


def _of_model(rest: str) -> str:
    layer, _, name = rest.rpartition(".")
    return f"{name} of {layer}" if layer else name


def _of_callback(rest: str) -> str:
    """`callbacks.Name.0.attributes.wait`, as it lies in a checkpoint."""
    words = [w for w in rest.split(".") if w not in ("format", "callbacks")]
    name = ".".join(words[:2])
    attribute = ".".join(
        w
        for w in words[2:]
        if w not in ("attributes", "adapter", "own", "root", "value", "items")
    )
    return f"the callback {name}'s {attribute or 'state'}"


def find_causes(
    first: FirstDifference | None,
    evidence: Iterable[dict[str, Any]],
    *,
    is_repeatable: bool | None,
    batches_differ: int | None,
) -> list[Cause]:
    """The likely reasons, the likeliest first.

    Args:
        first: where the runs part; None if they do not.
        evidence: what all processes met.
        is_repeatable: whether two runs that are left alone are the same; None
            if that was not tried.
        batches_differ: the first step whose batches differ; None if none do.
    """
    met = _unique(evidence)
    calls = [each for each in met if each["kind"] == "call"]
    draws = [c for c in calls if c["name"].startswith(_GENERATORS)]
    clocks = [c for c in calls if c not in draws]
    causes = [_of_global(each) for each in met if each["kind"] == "global"]
    if first is None:
        return causes
    causes += [
        Cause(what=each["message"].rstrip("."), remedy="")
        for each in met
        if each["kind"] == "warning" and each["category"] == "ExactnessWarning"
    ]
    if batches_differ is not None:
        causes += _of_data(batches_differ, draws)
    elif is_repeatable is False:
        causes += _of_seeds(first)
        causes += [_of_clock(each) for each in clocks]
        causes += [_of_draw(each) for each in draws]
        if not causes:
            causes.append(_UNREPEATABLE)
    callbacks = [p for p in first.parts if p.startswith("the callback ")]
    if is_repeatable is not False and callbacks:
        causes.append(_of_callback_state(callbacks))
    if is_repeatable is not False and not causes:
        causes += [_of_draw(each) for each in draws]
        causes += [_of_clock(each) for each in clocks]
    if not causes:
        causes.append(_UNKNOWN)
    return causes


_UNREPEATABLE = Cause(
    what=(
        "two runs that are left alone differ as well, so it is not the kill: "
        "something that is no part of code, config and data decides"
    ),
    remedy=(
        "Look for the order of a set or of files in a directory, hash(), "
        "threads of your own, or a library that seeds itself from the system."
    ),
)
_UNKNOWN = Cause(
    what=(
        "something decides about the run that is in no checkpoint: what your "
        "code keeps beside variables, callbacks and the data source"
    ),
    remedy=(
        "Keep it in a keras.Variable on the Task, in an attribute of a "
        "callback, or in the state of the data source."
    ),
)


def _unique(evidence: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    seen: dict[str, dict[str, Any]] = {}
    for each in evidence:
        key = (
            f"{each.get('kind')}|{each.get('name')}|{each.get('message')}|"
            f"{each.get('file')}|{each.get('line')}"
        )
        seen.setdefault(key, each)
    return list(seen.values())


def _place(record: dict[str, Any]) -> str:
    return (
        f"{record['function']} ({Path(record['file']).name}:{record['line']})"
    )


def _of_global(record: dict[str, Any]) -> Cause:
    return Cause(
        what=(
            f"the global variable {record['name']}, which {_place(record)} "
            f"uses, changed from {record['before']:.40} to "
            f"{record['value']:.40} while the run went on; it is in no "
            "checkpoint, and a compiled step holds what it was when it was "
            "traced"
        ),
        remedy=(
            "Make it a keras.Variable on the Task, or an attribute of a "
            "callback."
        ),
    )


def _of_call(record: dict[str, Any], why: str, remedy: str) -> Cause:
    what = f"{record['name']} is called in {_place(record)}: {why}"
    return Cause(what=what, remedy=remedy)


def _of_clock(record: dict[str, Any]) -> Cause:
    return _of_call(
        record,
        "what it returns is another thing in each run",
        "Let nothing that decides about training depend on it: count steps "
        "instead of seconds.",
    )


def _of_draw(record: dict[str, Any]) -> Cause:
    return _of_call(
        record,
        "it draws from a generator that is not part of the run",
        "Draw from a generator with a seed that is kept in a callback or in "
        "the data source, or keyed by the epoch and the index.",
    )


def _of_data(step: int, draws: list[dict[str, Any]]) -> list[Cause]:
    what = f"the batch of step {step} holds other data"
    if not draws:
        return [
            Cause(
                what=f"{what}: the source does not go on where it was",
                remedy=(
                    "Give it get_state and set_state, or use data that can be "
                    "read at any index."
                ),
            )
        ]
    return [
        Cause(
            what=(
                f"{what}, and {each['name']} is called in {_place(each)}, "
                "which draws from a generator that is not part of the run"
            ),
            remedy=(
                "Draw from numpy.random.default_rng((seed, epoch, index)), so "
                "that each example has its own numbers whenever it is read."
            ),
        )
        for each in draws
    ]


def _of_seeds(first: FirstDifference) -> list[Cause]:
    """A layer without a seed takes one from Python's generator."""
    layers = [
        each.path.split("/")[-2].lstrip("0123456789_")
        for each in first.differences
        if each.path.endswith("/seed_generator_state")
    ]
    if not layers or first.after:
        return []
    return [
        Cause(
            what=(
                f"the seed of {', '.join(dict.fromkeys(layers))} is another "
                "one in each process: it was made without a seed, and before "
                "keras.utils.set_random_seed was called"
            ),
            remedy=(
                "Call keras.utils.set_random_seed(...) before anything of the "
                "model is made, or give the layer its seed."
            ),
        )
    ]


def _of_callback_state(parts: list[str]) -> Cause:
    return Cause(
        what=f"{', '.join(parts[:3])} is not what it was before the kill",
        remedy=(
            "Define get_state and set_state on the callback, or keep what "
            "counts in attributes that can be saved."
        ),
    )
