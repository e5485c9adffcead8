"""Real processes that train, are killed, and are compared byte for byte."""

import contextlib
import json
import os
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

from legato.checkpoint import load_checkpoint
from legato.diff.checkpoints import compare_checkpoints
from legato.storage import strict_json
from tests.processes import (
    Side,
    compile_quickly,
    compiled_by,
    context,
    keep_compiled,
    use_several_threads,
)

# Files of a run directory that may differ between two runs of one
# experiment: wall-clock figures, the run's id, and who holds the lock.
# Checkpoints' manifests hold the run's id, and are covered by what they hash.


def train_here(name: str, run_dir: Path, overrides: dict[str, Any]) -> None:
    """Train a scenario to the end, and leave its history behind."""
    with warnings.catch_warnings():
        # Seen by whoever runs the tests; not what is tested here.
        warnings.simplefilter("ignore")
        kind, _, rest = name.rpartition("/")
        if kind == "fit":
            from tests.contracts.fit_scenarios import FIT_SCENARIOS

            history = FIT_SCENARIOS[rest].train(run_dir, overrides)
        else:
            # The task is made before the seed is set, as a user's would be:
            # its own generators must have seeds.
            trainer = _scenario(kind, rest).trainer(
                str(run_dir), **{"progress": "none", **overrides}
            )
            history = trainer.train()
    out = run_dir / "history.json"
    out.write_text(json.dumps([history.epoch, history.history]))


def _scenario(kind: str, name: str) -> Any:
    if kind == "garden":
        from tests.contracts.garden import GARDEN

        return GARDEN[name]
    from tests.contracts.scenarios import SCENARIOS

    return SCENARIOS[name]


def _train(
    name: str,
    run_dir: str,
    overrides: dict[str, Any],
    compiled: str | None,
    quickly: bool,
) -> None:
    """The child."""
    keep_compiled(compiled)
    compile_quickly(quickly)
    if not name.startswith("fit/"):
        use_several_threads()
    train_here(name, Path(run_dir), overrides)


def start(
    name: str,
    run_dir: Path,
    *,
    side: Side,
    quickly: bool = False,
    **overrides: Any,
) -> Any:
    """Begin to train a scenario in a new process.

    Args:
        name: of the scenario.
        run_dir: where it trains.
        side: of the comparison that the run is for.
        quickly: whether to compile quickly, and not as for users.
        **overrides: of the scenario's config.
    """
    # A user's process does not begin with pytest's random state either.
    process = context().Process(
        target=_train,
        args=(name, str(run_dir), overrides, compiled_by(side), quickly),
    )
    process.start()
    return process


def finish(process: Any, limit_secs: float = 240) -> None:
    """Wait for a process; it must succeed."""
    process.join(limit_secs)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, f"the run ended with {process.exitcode}"


def train(
    name: str, run_dir: Path, *, side: Side = "one", **overrides: Any
) -> None:
    """Train to the end without a kill."""
    finish(start(name, run_dir, side=side, **overrides))


def train_with_kills(
    name: str,
    run_dir: Path,
    *,
    kills: int,
    until: int,
    seed: int,
    side: Side = "other",
    **overrides: Any,
) -> list[str]:
    """Train to the end through SIGKILLs at random instants.

    A process is killed a random moment after it committed the checkpoint of a
    random step; every other one, which the seed decides, while it writes the
    next.

    Args:
        name: of the scenario.
        run_dir: where it trains.
        kills: how many processes are killed.
        until: the run's last step.
        seed: of the instants.
        side: of the comparison that the run is for.
        **overrides: of the scenario's config, and more for `start`.

    Returns:
        At which step each was killed, for the test's report.
    """
    instants = random.Random(seed)
    checkpoints = run_dir / "checkpoints"
    report = []
    for number in range(kills):
        process = start(name, run_dir, side=side, **overrides)
        # In the first half of what is left, or the run might end before.
        first = min(_newest(checkpoints) + 1, until - 1)
        target = instants.randint(first, (first + until) // 2)
        while process.exitcode is None and _newest(checkpoints) < target:
            time.sleep(0.001)
        moment = "after"
        if (number + seed) % 2:
            before = _temporary(checkpoints)  # of one killed earlier
            moment = "writing after"
            while process.exitcode is None and not (
                _temporary(checkpoints) - before
            ):
                time.sleep(0.0002)  # not to take the core that it needs
        else:
            time.sleep(instants.uniform(0, 0.01))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        step = _newest(checkpoints)
        report.append(f"{moment} {step}" if killed else "too late")
    finish(start(name, run_dir, side=side, **overrides))
    return report


def _newest(checkpoints: Path) -> int:
    with contextlib.suppress(OSError):
        names = os.listdir(checkpoints)
        return max((int(n[5:]) for n in names if n[:5] == "step_"), default=0)
    return 0


def _temporary(checkpoints: Path) -> set[str]:
    with contextlib.suppress(OSError):
        return {n for n in os.listdir(checkpoints) if n[0] == "."}
    return set()


def differences(
    a: Path, b: Path, *, common_only: bool = False
) -> tuple[list[str], int]:
    """Compare two finished runs of one experiment.

    Args:
        a: the directory of a run.
        b: that of another.
        common_only: of the checkpoints, compare those that both have.

    Returns:
        What differs, and the number of bytes that were compared.
    """
    found: list[str] = []
    compared = 0

    def compare(what: str, left: bytes | None, right: bytes | None) -> None:
        nonlocal compared
        compared += len(left or b"")
        if left is None or left != right:
            found.append(what)

    ours, theirs = _checkpoints(a), _checkpoints(b)
    if common_only:
        ours = theirs = [name for name in ours if name in theirs]
    if ours != theirs or not ours:
        found.append(f"checkpoints {ours} and {theirs}")
    places = [f"checkpoints/{name}" for name in ours if name in theirs]
    if (a / "best").exists() or (b / "best").exists():
        places.append("best")
    places.append("final")
    for place in places:
        for file in ("state.safetensors", "host.json"):
            left, right = (_read(run / place / file) for run in (a, b))
            if left != right and b"data/opaque_" in (left or b""):
                # What tf.data's threads held is in it: all but that.
                saved = [load_checkpoint(run / place) for run in (a, b)]
                if not compare_checkpoints(*saved):
                    right = left
            compare(f"{place}/{file}", left, right)
    files = ["metrics.jsonl", "history.json"]
    more = ("log.csv", "recovery.json", "summaries.csv")
    files += [f for f in more if (a / f).exists()]
    for file in files:
        compare(file, _read(a / file), _read(b / file))
    # (Imports TensorBoard: not for the processes that train.)
    from tests.summary_files import read_below

    for folder in ("summaries", "board"):
        left, right = (read_below(run / folder) for run in (a, b))
        for path in sorted({*left, *right}):
            compare(
                f"{folder}/{path}",
                json.dumps(left.get(path)).encode(),
                json.dumps(right.get(path)).encode(),
            )
    return found, compared


def _checkpoints(run: Path) -> list[str]:
    names = (p.name for p in (run / "checkpoints").iterdir())
    return sorted(n for n in names if n.startswith("step_"))


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def host_state(run: Path, step: int) -> Any:
    """The JSON state of a checkpoint."""
    path = run / "checkpoints" / f"step_{step:08d}" / "host.json"
    return strict_json.loads(path.read_bytes())
