"""Kills every scenario many times and prints what differed.

    KERAS_BACKEND=jax python -m tests.contracts.soak --kills 10

The tests do the same with a few kills.
"""

import argparse
import sys
import tempfile
import zlib
from pathlib import Path

from legato.checkpoint import load_checkpoint
from tests.contracts import runs
from tests.contracts.scenarios import SCENARIOS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failed = kills = in_writes = total = 0
    print(f"{'scenario':16} kills  in a write  bytes compared  differ")
    for name in SCENARIOS:
        with tempfile.TemporaryDirectory() as folder:
            whole, killed = Path(folder, "whole"), Path(folder, "killed")
            runs.train(name, whole, keep_last=None)
            report = runs.train_with_kills(
                name,
                killed,
                kills=arguments.kills,
                until=load_checkpoint(whole / "final").step,
                seed=zlib.crc32(name.encode()) + arguments.seed,
                keep_last=None,
            )
            found, compared = runs.differences(whole, killed)
        done = [moment for moment in report if moment != "too late"]
        writing = sum(moment.startswith("writing") for moment in done)
        print(
            f"{name:16} {len(done):5}  {writing:10}  {compared:14,}  "
            f"{', '.join(found) or 0}",
            flush=True,
        )
        failed += bool(found)
        kills += len(done)
        in_writes += writing
        total += compared
    print(f"{'all':16} {kills:5}  {in_writes:10}  {total:14,}  {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
