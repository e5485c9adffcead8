"""A model whose state, with Adam's, is 100 MB; and a run of it or of the MLP.

    python large.py legato|fit mlp|large [CHECKPOINT_INTERVAL]

trains for a while, and prints the most memory that the process had, in MB.
"""

import sys
import tempfile
from pathlib import Path

import keras
import model
import numpy as np

BATCH = 16
STEPS = 60
_LAYERS, _WIDTH = 8, 1020


def build_model() -> keras.Model:
    """8.3 million weights in 18 variables: 100 MB with two moments of each."""
    layers = [
        keras.layers.Dense(_WIDTH, activation="relu") for _ in range(_LAYERS)
    ]
    return keras.Sequential(
        [keras.Input((_WIDTH,)), *layers, keras.layers.Dense(10)]
    )


def make_data(
    steps: int, batch_size: int = BATCH
) -> tuple[np.ndarray, np.ndarray]:
    """Noise, of so many batches."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps * batch_size, _WIDTH)).astype("float32")
    return x, rng.integers(0, 10, len(x)).astype("int32")


def compiled(network: keras.Model) -> keras.Model:
    """With Adam and one metric."""
    network.compile(
        optimizer=keras.optimizers.Adam(1e-4),
        loss=model.build_loss(),
        metrics=["accuracy"],
    )
    return network


def _most_memory() -> int:
    """Kilobytes of this process; Linux alone tells.

    (`getrusage` has also what the process that started it had by then.)
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak)


def main() -> None:
    """Train, and tell the memory."""
    way, name, *rest = sys.argv[1:]
    arguments = {"verbose": 0, "shuffle": False}
    if name == "large":
        network, (x, y) = build_model(), make_data(STEPS)
        arguments |= {"epochs": 2, "batch_size": BATCH}
    else:
        network, (x, y) = model.build_model(), model.make_data(32 * 1024)
        arguments |= {"epochs": 3, "batch_size": model.BATCH}
    compiled(network)
    if way == "fit":
        network.fit(x, y, **arguments)
    else:
        import legato

        if rest:
            arguments["checkpoint_interval"] = int(rest[0])
        with tempfile.TemporaryDirectory() as run_dir:
            legato.fit(network, x, y, run_dir=run_dir, **arguments)
    print(_most_memory() / 1e3)


if __name__ == "__main__":
    main()
