"""Kills every scenario many times, on a backend, and counts what differs.

    KERAS_BACKEND=jax python -m tests.soak.kills --kills 9
    KERAS_BACKEND=jax python -m tests.soak.kills --kills 5 --seed 3 garden/
    python -m tests.soak.kills --table

What is done is kept in a file, a line for each scenario and seed: begun again
with the same arguments, it goes on with what is missing. The tests do the same
with a few kills.
"""

import argparse
import collections
import json
import os
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).with_name("kills.jsonl")


def read_records() -> list[dict[str, Any]]:
    """What was done so far."""
    if not RECORDS.exists():
        return []
    return [json.loads(line) for line in RECORDS.read_text().splitlines()]


def kill_scenario(name: str, kills: int, seed: int) -> dict[str, Any]:
    """Trains a scenario in peace and through kills, and compares."""
    import keras

    from legato.checkpoint import load_checkpoint
    from tests.contracts import runs
    from tests.processes import SHARED

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[SHARED] = folder
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        runs.train(name, whole, keep_last=None)
        report = runs.train_with_kills(
            name,
            killed,
            kills=kills,
            until=load_checkpoint(whole / "final").step,
            seed=zlib.crc32(name.encode()) + seed,
            keep_last=None,
        )
        found, compared = runs.differences(whole, killed)
        aside = list((killed / "checkpoints").glob("damaged-*"))
    done = [moment for moment in report if moment != "too late"]
    return {
        "backend": keras.config.backend(),
        "scenario": name,
        "seed": seed,
        "asked": kills,
        "kills": len(done),
        "in_writes": sum(moment.startswith("writing") for moment in done),
        "bytes": compared,
        "differ": found,
        "lost": len(aside),
        "secs": round(time.monotonic() - began, 1),
    }


def table(records: list[dict[str, Any]]) -> str:
    """The sums by backend, and all that went wrong."""
    lines = [
        "| backend | set-ups | kills | in a checkpoint's write | bytes "
        "compared | differ | checkpoints lost |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for record in records:
        groups[record["backend"]].append(record)
        groups["all"].append(record)
    for backend in ("jax", "tensorflow", "torch", "all"):
        those = groups.get(backend, [])
        if those:
            sums = {
                name: sum(each[name] for each in those)
                for name in ("kills", "in_writes", "bytes", "lost")
            }
            setups = {(each["backend"], each["scenario"]) for each in those}
            differ = sum(bool(each["differ"]) for each in those)
            lines.append(
                f"| {backend} | {len(setups)} | {sums['kills']:,} | "
                f"{sums['in_writes']:,} | {sums['bytes']:,} | {differ} | "
                f"{sums['lost']} |"
            )
    lines += [
        f"{each['backend']}, {each['scenario']}, seed {each['seed']}: "
        f"{', '.join(each['differ'])}"
        for each in records
        if each["differ"] or each["lost"]
    ]
    return "\n".join(lines)


def main() -> int:
    """Kills what was not killed yet; prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "prefix", nargs="?", default="", help="of the names of scenarios"
    )
    parser.add_argument("--kills", type=int, default=9, help="of each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--table", action="store_true", help="only print what was done"
    )
    parser.add_argument(
        "--minutes", type=float, default=600, help="begin nothing after these"
    )
    arguments = parser.parse_args()
    if not arguments.table:
        os.environ.setdefault("KERAS_BACKEND", "jax")
        _kill_all(
            arguments.prefix,
            arguments.kills,
            arguments.seed,
            arguments.minutes,
        )
    records = read_records()
    print(table(records))
    return 1 if any(each["differ"] or each["lost"] for each in records) else 0


def _kill_all(prefix: str, kills: int, seed: int, minutes: float) -> None:
    from tests.contracts.fit_scenarios import FIT_SCENARIOS
    from tests.contracts.garden import GARDEN
    from tests.contracts.scenarios import SCENARIOS

    backend = os.environ["KERAS_BACKEND"]
    done = {
        (each["backend"], each["scenario"], each["seed"], each["asked"])
        for each in read_records()
    }
    until = time.monotonic() + 60 * minutes
    names = [
        *SCENARIOS,
        *(f"fit/{name}" for name in FIT_SCENARIOS),
        *(f"garden/{name}" for name in GARDEN),
    ]
    for name in names:
        is_done = (backend, name, seed, kills) in done
        if is_done or not name.startswith(prefix):
            continue
        if time.monotonic() > until:
            return
        record = kill_scenario(name, kills, seed)
        with RECORDS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"{backend} {name:24} {record['kills']:3} kills, "
            f"{record['bytes']:10,} bytes, "
            f"{', '.join(record['differ']) or 'none differ'}, "
            f"{record['secs']} s",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
