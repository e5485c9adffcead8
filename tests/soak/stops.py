"""How long a run takes to end after SIGTERM, with everything saved.

    KERAS_BACKEND=jax python -m tests.soak.stops --times 5

The runs are those of `tests/contracts/test_signals.py`: each fsync takes 50 ms
there, and a checkpoint about ten of them.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path


def main() -> None:
    """Prints a line for each phase of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="in each phase")
    arguments = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from tests.contracts.test_signals import PHASES, stop

    print("| backend | phase | stops | median s | longest s |")
    print("|---|---|---|---|---|")
    for phase in PHASES:
        found = []
        for _ in range(arguments.times):
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                found.append(
                    stop(place / "run", place / "told", phase, "SIGTERM")
                )
        print(
            f"| {os.environ['KERAS_BACKEND']} | {phase} | {len(found)} | "
            f"{statistics.median(found):.2f} | {max(found):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
