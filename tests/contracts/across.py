"""Trains scenarios from weights that are the same on every backend.

    KERAS_BACKEND=jax python -m tests.contracts.across

writes their losses to `LOSSES`, for the other backends to be held to.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

import legato
from tests.contracts.by_hand import WITH_CALLBACKS
from tests.contracts.scenarios import SCENARIOS

LOSSES = Path(__file__).with_name("losses.json")
"""What the reference found: Keras has one backend in a process."""

REFERENCE = "jax"

STEPS = 20

# Each backend draws noise of its own, and two that round float16 differently
# are 1e-3 apart after one step. (Nor are weights spoilt by the same numbers.)
NAMES = sorted(
    {*SCENARIOS} - {"gan", "vae", "half_precision", "recovering", "board"}
)


def same_everywhere(model: Any) -> None:
    """Give a new model weights that NumPy draws, and turn dropout off."""
    random = np.random.default_rng(6)
    for variable in model.trainable_variables:
        inputs = int(np.prod(variable.shape[:-1]))
        values = random.normal(size=variable.shape) / np.sqrt(inputs)
        variable.assign(values.astype("float32"))
    for layer in model.layers:
        if isinstance(layer, layers.Dropout):
            layer.rate = 0.0
        elif isinstance(layer, layers.LSTM):
            layer.cell.dropout = 0.0


def train(name: str, run_dir: Path) -> list[float]:
    """Train a scenario; the loss of each step."""
    scenario = SCENARIOS[name]
    task = scenario.make_task()
    task.initialize = same_everywhere
    changes = {
        "train_steps": STEPS,
        "summary_interval": 1,
        "checkpoint_interval": 1000,
        # Only losses are compared, and everything else is to be compiled.
        "train_metrics_interval": 0,
        "validation_interval": None,
        "best_metric": None,
    }
    legato.Trainer(
        task,
        run_dir=run_dir,
        config=legato.TrainerConfig(**{**scenario.config, **changes}),
        callbacks=scenario.make_callbacks(task)
        if name in WITH_CALLBACKS
        else [],
    ).train()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [r["loss"] for r in records if r["kind"] == "train"]


def read_losses() -> dict[str, list[float]]:
    """By scenario."""
    return json.loads(LOSSES.read_text())


def main() -> None:
    assert keras.config.backend() == REFERENCE
    with tempfile.TemporaryDirectory() as directory:
        losses = {name: train(name, Path(directory, name)) for name in NAMES}
    lines = [f"{json.dumps(n)}: {json.dumps(v)}" for n, v in losses.items()]
    LOSSES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
