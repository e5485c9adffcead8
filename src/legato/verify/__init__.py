"""Proof that a run can be killed: it is, and every bit is compared.

An experiment is trained once in peace, and once through SIGKILLs at random
instants, each time going on in a new process. Then all that both left behind
is compared. Where it differs, more runs find the first step and the reason.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from legato.checkpoint import FINAL, CheckpointStore, load_checkpoint
from legato.checkpoint.format import step_name
from legato.checkpoint.store import CHECKPOINTS
from legato.diff import RunComparison, compare_runs
from legato.diff.checkpoints import compare_values
from legato.errors import VerifyError
from legato.sinks import METRICS
from legato.verify.children import (
    Kill,
    Launch,
    Runs,
    Target,
    last_step,
    launch,
)
from legato.verify.diagnosis import (
    Cause,
    FirstDifference,
    find_causes,
    first_difference,
)

__all__ = [
    "Cause",
    "FirstDifference",
    "Kill",
    "Target",
    "Verdict",
    "verify",
]

_PEACEFUL, _KILLED = "peaceful", "killed"
_AGAIN, _RESUMED = "again", "resumed"
_MAX_FINE_STEPS = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of it.

    Attributes:
        is_exact: whether nothing differs, and nothing gives rise to doubt.
        kills: where processes were killed.
        last_step: of the run.
        comparison: of the run in peace and the killed one; None if one of
            them failed.
        failure: what failed; None if none did.
        first: where they part; None if they do not.
        is_repeatable: whether two runs in peace are the same; None if that
            was not tried.
        causes: the likely ones, the likeliest first.
    """

    is_exact: bool
    kills: list[Kill]
    last_step: int = 0
    comparison: RunComparison | None = None
    failure: str | None = None
    first: FirstDifference | None = None
    is_repeatable: bool | None = None
    causes: list[Cause] = dataclasses.field(default_factory=list)


def verify(
    target: Target,
    *,
    kills: int = 5,
    seed: int = 0,
    work: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    start: Launch = launch,
) -> Verdict:
    """Trains an experiment in peace and through kills, and compares.

    Args:
        target: what is run.
        kills: how many processes are killed.
        seed: of the instants.
        work: an empty directory for the runs, which stay there; None takes a
            temporary one.
        say: is told how it goes.
        start: starts a process; by default a new interpreter.

    Raises:
        VerifyError: an argument is wrong.
    """
    if kills < 1:
        raise VerifyError(f"kills={kills}: it must be 1 or more.")
    if work is None:
        with tempfile.TemporaryDirectory(prefix="legato-verify-") as folder:
            return verify(
                target,
                kills=kills,
                seed=seed,
                work=Path(folder),
                say=say,
                start=start,
            )
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise VerifyError(f"{work}: holds something. Give an empty directory.")
    runs = Runs(target, work.resolve(), start)
    done: list[Kill] = []
    try:
        say("training in peace")
        runs.train(_PEACEFUL)
        last = last_step(runs.path(_PEACEFUL))
        if last < 2:
            raise VerifyError(
                f"The run has {last} steps: it must have 2 or more to be "
                "killed in."
            )

        def on_kill(kill: Kill) -> None:
            done.append(kill)
            say(f"kill {len(done)} of {kills}: {describe_kill(kill)}")

        say("training through kills")
        runs.train_with_kills(
            _KILLED,
            kills=kills,
            last_step=last,
            validates=_validates(runs.path(_PEACEFUL)),
            seed=seed,
            on_kill=on_kill,
        )
    except VerifyError as error:
        return Verdict(
            is_exact=False,
            kills=done,
            failure=str(error),
            causes=_causes_of_failure(runs),
        )
    say("comparing")
    comparison = _compare(runs, _PEACEFUL, _KILLED)
    first = first_difference(comparison)
    causes = find_causes(
        None,
        [*runs.evidence(_PEACEFUL), *runs.evidence(_KILLED)],
        is_repeatable=None,
        batches_differ=None,
    )
    verdict = Verdict(
        is_exact=first is None and not causes,
        kills=done,
        last_step=last,
        comparison=comparison,
        first=first,
        causes=causes,
    )
    if first is None:
        return verdict
    return _diagnose(verdict, runs, first, say)


def describe_kill(kill: Kill) -> str:
    """Where a process was killed."""
    where = kill.phase.name.lower().replace("_", " ")
    if where in ("steps", "between"):
        where = {"steps": "in a device call", "between": "between calls"}[where]
    elif where in ("validation", "saving"):
        where = {"validation": "in validation", "saving": "while saving"}[where]
    text = f"{where}, after step {kill.step}"
    return f"{text}, in a checkpoint's write" if kill.is_writing else text


def _validates(run_dir: Path) -> bool:
    with (run_dir / METRICS).open("rb") as file:
        return any(json.loads(x).get("kind") == "validation" for x in file)


def _compare(runs: Runs, a: str, b: str) -> RunComparison:
    """All that two runs left behind, and the histories that they returned."""
    from legato.diff import Compared

    comparison = compare_runs(runs.path(a), runs.path(b))
    histories = [
        [e["logs"] for e in runs.evidence(name) if e["kind"] == "history"][-1:]
        for name in (a, b)
    ]
    if all(histories):
        differences = list(
            compare_values(histories[0][0], histories[1][0], "history")
        )
        comparison.compared.append(
            Compared(
                name="history",
                kind="history",
                num_bytes=len(str(histories[0][0])),
                differences=[*differences],
            )
        )
    return comparison


def _causes_of_failure(runs: Runs) -> list[Cause]:
    evidence = [*runs.evidence(_PEACEFUL), *runs.evidence(_KILLED)]
    return [
        Cause(what=each["message"].rstrip("."), remedy="")
        for each in evidence
        if each["kind"] == "warning"
    ]


def _diagnose(
    verdict: Verdict,
    runs: Runs,
    first: FirstDifference,
    say: Callable[[str], None],
) -> Verdict:
    """Runs it again, step by step, to find the first one and the reason."""
    every = 1 if verdict.last_step <= _MAX_FINE_STEPS else None
    is_repeatable, batches = None, None
    try:
        say("they differ: training again in peace, looking closely")
        runs.train(_AGAIN, every=every, batches=True)
        again = _compare(runs, _PEACEFUL, _AGAIN)
        is_repeatable = not any(
            each.differences
            for each in again.compared
            if each.kind != "checkpoint" or _is_in_both(each.step, runs)
        )
        say("and once more" if not is_repeatable else "and from a checkpoint")
        if is_repeatable:
            _rewind_copy(runs, first)
        runs.train(_RESUMED, every=every, batches=True)
        fine = first_difference(_compare(runs, _AGAIN, _RESUMED))
        batches = _first_other_batch(runs, _AGAIN, _RESUMED)
        if fine is not None and fine.step is not None:
            first = fine
    except VerifyError as error:
        say(f"that failed: {error}")
    evidence = [
        record
        for name in (_PEACEFUL, _KILLED, _AGAIN, _RESUMED)
        for record in runs.evidence(name)
    ]
    if batches is not None and first.step is not None and batches > first.step:
        batches = None  # an effect
    return dataclasses.replace(
        verdict,
        is_exact=False,
        first=first,
        is_repeatable=is_repeatable,
        causes=find_causes(
            first,
            evidence,
            is_repeatable=is_repeatable,
            batches_differ=batches,
        ),
    )


def _is_in_both(step: int | None, runs: Runs) -> bool:
    """Runs that save more often have more checkpoints."""
    return all(
        (runs.path(name) / CHECKPOINTS / step_name(step or 0)).exists()
        for name in (_PEACEFUL, _AGAIN)
    )


def _rewind_copy(runs: Runs, first: FirstDifference) -> None:
    """A run as it was when the killed one resumed, before they parted."""
    source, target = runs.path(_AGAIN), runs.path(_RESUMED)
    shutil.copytree(source, target)
    shutil.rmtree(target / FINAL, ignore_errors=True)
    began = [
        record["step"]
        for record in runs.evidence(_KILLED)
        if record["kind"] == "began" and record["step"] <= first.after
    ]
    run_id = load_checkpoint(source / FINAL).run_id
    store = CheckpointStore(target, run_id=run_id, keep_last=None)
    steps = [s for s in store.steps() if s <= max(began, default=0)]
    # (Where it began anew, from any: the first.)
    store.rewind(steps[-1] if steps else store.steps()[0])
    for aside in (target / CHECKPOINTS).glob("aside-*"):
        shutil.rmtree(aside)


def _first_other_batch(runs: Runs, a: str, b: str) -> int | None:
    ours, theirs = (
        {
            record["step"]: record["sha256"]
            for record in runs.evidence(name)
            if record["kind"] == "batch"
        }
        for name in (a, b)
    )
    differing: list[Any] = [
        step
        for step, digest in theirs.items()
        if ours.get(step, digest) != digest
    ]
    return min(differing, default=None)
