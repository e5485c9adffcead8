"""Failures of the machine under training: what is left, and what is said."""

import itertools
import re

import keras
import numpy as np
import pytest

import legato
from legato.checkpoint import CheckpointStore
from legato.run_directory import read_run_id
from legato.state import variable_paths
from tests.contracts.scenarios import Classifier


class Stepped(Classifier):
    """Its results say at which step they were measured."""

    def aggregate_logs(self, state, step_logs):
        return True

    def reduce_aggregated_logs(self, aggregated_logs, global_step):
        return {"at": float(global_step)}


def trainer(run_dir):
    config = legato.TrainerConfig(
        train_steps=30,
        checkpoint_interval=5,
        validation_interval=None,
        progress="none",
    )
    return legato.Trainer(Stepped(), run_dir=run_dir, config=config)


FAILURE = "RESOURCE_EXHAUSTED: Out of memory"


def fail_on_jax(monkeypatch):
    """The sixth call fails when it has taken its inputs.

    Their arrays are deleted by then, as JAX leaves them when a donated call
    fails.
    """

    from legato.backends.jax.loop import JaxLoop

    calls = itertools.count(1)
    real = JaxLoop.__call__

    def call(self, step, num_steps, operands):
        if next(calls) == 6:
            for variable in self.updated:
                variable._value.delete()
            raise RuntimeError(FAILURE)
        return real(self, step, num_steps, operands)

    monkeypatch.setattr(JaxLoop, "__call__", call)


def fail_on_tensorflow(monkeypatch):
    """The sixth call fails when it has changed all variables."""
    from legato.backends.tensorflow.loop import TensorFlowLoop

    calls = itertools.count(1)
    real = TensorFlowLoop._make_loop

    def make_loop(self, *arguments, **options):
        run = real(self, *arguments, **options)

        def call(*inputs):
            out = run(*inputs)
            if next(calls) == 6:
                raise RuntimeError(FAILURE)
            return out

        return call

    monkeypatch.setattr(TensorFlowLoop, "_make_loop", make_loop)


def fail_on_torch(monkeypatch):
    """The 17th step fails when it has changed the weights, but not counted."""
    from legato.backends.torch import loop

    calls = itertools.count(1)
    real = loop.to_row

    def to_row(logs):
        if next(calls) == 17:
            raise RuntimeError(FAILURE)
        return real(logs)

    monkeypatch.setattr(loop, "to_row", to_row)


@pytest.fixture
def failing_device(monkeypatch):
    """The device runs out of memory in mid-run."""
    fail = {
        "jax": fail_on_jax,
        "tensorflow": fail_on_tensorflow,
        "torch": fail_on_torch,
    }
    fail[keras.config.backend()](monkeypatch)


def test_after_a_failed_device_call_the_model_is_valid(
    tmp_path, failing_device, monkeypatch
):
    failed = trainer(tmp_path / "run")
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED") as caught:
        failed.train()
    note = "".join(caught.value.__notes__)
    held = re.search(r"hold step (\d+), the newest checkpoint", note)
    assert held, note
    saved = CheckpointStore(
        tmp_path / "run", run_id=read_run_id(tmp_path / "run")
    ).restore()
    assert saved.step == int(held[1])
    variables = variable_paths({"model": failed.model})
    assert variables
    for path, variable in variables.items():
        value = keras.ops.convert_to_numpy(variable)
        np.testing.assert_array_equal(value, saved.arrays[path])
    assert np.isfinite(failed.model.predict(np.ones((2, 8)), verbose=0)).all()
    assert failed.evaluate()["at"] == saved.step

    monkeypatch.undo()
    trainer(tmp_path / "run").train()
    trainer(tmp_path / "whole").train()
    for file in ("final/state.safetensors", "metrics.jsonl"):
        run, whole = (
            (tmp_path / name / file).read_bytes() for name in ("run", "whole")
        )
        assert run == whole
