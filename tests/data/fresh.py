"""Run in a new process: resumes sources at positions, prints the batches.

    python -m tests.data.fresh POSITIONS.json

where the file maps names of sources to lists of [state file, count].
"""

import json
import random
import sys
from pathlib import Path

import keras
import numpy as np


def main(path):
    from tests.data import reading
    from tests.data.sources import KINDS

    keras.utils.set_random_seed(11)
    # Another process has drawn other things by now.
    random.seed()
    np.random.seed()
    found = {}
    for name, positions in json.loads(Path(path).read_text()).items():
        found[name] = []
        for state_path, count in positions:
            source = KINDS[name]()
            state = load(state_path)
            found[name].append(
                [
                    reading.digest(batch)
                    for batch in reading.read(source, count, state=state)
                ]
            )
    print("FOUND", json.dumps(found))


def load(path):
    from legato.data import join_arrays
    from legato.storage import strict_json

    with np.load(path) as arrays:
        arrays = dict(arrays)
    tree = strict_json.loads(arrays.pop("json").tobytes())
    return join_arrays(tree, arrays)


def save(path, state):
    from legato.data import split_arrays
    from legato.storage import strict_json

    tree, arrays = split_arrays(state)
    tree = np.frombuffer(strict_json.dumps(tree), np.uint8)
    np.savez(path, json=tree, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
