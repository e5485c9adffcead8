"""Trains digits twice: once in peace, once killed in the middle.

Run by `make demo`. The second run is stopped by SIGKILL, which no program can
catch, and started again with the same command; then both are compared.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

RUNS = Path("runs")
KILL_AT_STEP = 1000


def main() -> int:
    """Returns 0 if both runs ended with the same bytes."""
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    peaceful, killed = RUNS / "demo-peaceful", RUNS / "demo-killed"
    for run_dir in (peaceful, killed):
        shutil.rmtree(run_dir, ignore_errors=True)

    def command(run_dir: Path, *extra: str) -> list[str]:
        legato = [sys.executable, "-m", "legato", "train", "digits"]
        return [*legato, "--run-dir", str(run_dir), *extra]

    title("1. legato train digits, left in peace")
    subprocess.run(command(peaceful), env=environment, check=True)

    title(f"2. the same again, killed with SIGKILL after step {KILL_AT_STEP}")
    # (A live bar that is killed would leave the terminal without a cursor.)
    plain = "--progress", "plain"
    process = subprocess.Popen(command(killed, *plain), env=environment)
    while newest_step(killed) < KILL_AT_STEP and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(f"\nkilled; its newest checkpoint is of step {newest_step(killed)}")

    title("3. the same command, run again")
    subprocess.run(command(killed, *plain), env=environment, check=True)

    title("4. both runs, compared")
    accuracy = validation_accuracy(peaceful)
    print(f"validation accuracy       {accuracy:.2%}")
    same = True
    for what in ("final/state.safetensors", "metrics.jsonl"):
        hashes = [sha256(run_dir / what) for run_dir in (peaceful, killed)]
        same &= hashes[0] == hashes[1]
        print(f"{what:26}left in peace  {hashes[0]}")
        print(f"{'':26}killed         {hashes[1]}")
    print("identical: every weight, every line" if same else "THEY DIFFER")
    return 0 if same and accuracy >= 0.97 else 1


def title(text: str) -> None:
    """Prints a heading."""
    print(f"\n== {text} ==", flush=True)


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    found = run_dir.glob("checkpoints/step_*")
    return max((int(path.name[5:]) for path in found), default=0)


def validation_accuracy(run_dir: Path) -> float:
    """That of the last validation."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found = [r["accuracy"] for r in records if r["kind"] == "validation"]
    return found[-1]


def sha256(path: Path) -> str:
    """The hash of a file, shortened for the eye."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


if __name__ == "__main__":
    sys.exit(main())
