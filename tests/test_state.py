"""The clock and the names of arrays."""

import os
import subprocess
import sys

import keras
import pytest

from legato.errors import DamagedError
from legato.state import Clock, variable_paths
from legato.storage import strict_json


def test_the_clock_survives_its_json_with_its_order():
    clock = Clock(
        step=7,
        duties=("validation", "epoch_end"),
        epoch_logs={"z": 0.1, "a": float("inf")},
        epoch_begun=True,
    )
    other = Clock()
    other.load(strict_json.loads(strict_json.dumps(clock.to_json())))
    assert other == clock
    assert list(other.epoch_logs) == ["z", "a"]


@pytest.mark.parametrize(
    "change",
    [
        {"step": "7"},
        {"step": None},
        {"duties": ["dance"]},
        {"duties": 3},
        {"epoch_logs": [["a"]]},
        {"epoch_logs": [["a", "b"]]},
        {"epoch_begun": 1},
        {"surplus": 1},
    ],
)
def test_a_damaged_clock_is_refused_whole(change):
    clock = Clock()
    with pytest.raises(DamagedError, match="clock"):
        clock.load({**Clock(step=9).to_json(), **change})
    assert clock == Clock()


_PATHS = """
import sys, keras
for _ in range(int(sys.argv[1])):  # move Keras's automatic counters
    keras.Sequential([keras.layers.Dense(1)]).build((1, 1))
    keras.layers.Dropout(0.5), keras.Variable(0.0), keras.optimizers.Adam()
from legato.state import variable_paths
class Twice(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = [keras.layers.Dense(2), keras.layers.Dense(2)]
        self.own = keras.Variable(0.0)
        self.other = self.add_weight(shape=(2,), name="scale")
    def build(self, shape):
        for layer in self.inner: layer.build(shape)
    def call(self, x): return x
model = keras.Sequential([keras.layers.Input((2,)), Twice(),
    keras.layers.Dropout(0.1), keras.layers.BatchNormalization()])
optimizer = keras.optimizers.LossScaleOptimizer(
    keras.optimizers.Adam(use_ema=True))
optimizer.build(model.trainable_variables)
task = {"weight": keras.Variable(1.0), "size": 3,
    "noise": keras.random.SeedGenerator(1)}
stray = keras.Variable(2.0)
paths = variable_paths({"model": model, "optimizer": optimizer,
    "metrics": [keras.metrics.AUC()],
    "task": task}, [stray, model.variables[0]])
print(*paths, sep="\\n")
"""


@pytest.mark.any_backend
def test_names_do_not_depend_on_kerass_counters():
    first, second = (
        subprocess.run(
            [sys.executable, "-c", _PATHS, count],
            # The quickest to import.
            env={**os.environ, "KERAS_BACKEND": "jax"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for count in ("0", "3")
    )
    assert first == second
    assert len(first) == len(set(first))
    for name in (
        "model/1_twice/0_dense/kernel",
        "model/1_twice/1_dense/kernel",
        "model/2_dropout/seed_generator_state",
        "optimizer/inner_optimizer/momentum/model/1_twice/0_dense/kernel",
        "optimizer/dynamic_scale",
        "task/weight",
        "task/noise/seed_generator_state",
        "variable/unnamed",
    ):
        assert name in first, first


def test_every_variable_has_one_name():
    shared = keras.layers.Dense(1)
    shared.build((1, 1))
    paths = variable_paths({"a": [shared, shared], "b": {"again": shared}})
    assert list(paths) == ["a/0/kernel", "a/0/bias"]
