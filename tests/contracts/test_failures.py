"""Failures of the machine under training: what is left, and what is said."""

import numpy as np
import pytest

import legato
from legato.backends.jax.loop import JaxLoop
from tests.contracts.scenarios import Classifier


def trainer(run_dir):
    config = legato.TrainerConfig(
        train_steps=30, checkpoint_interval=5, progress="none"
    )
    return legato.Trainer(Classifier(), run_dir=run_dir, config=config)


@pytest.fixture
def failing_device(monkeypatch):
    """The device runs out of memory at the sixth call.

    It has taken its inputs by then: their arrays are deleted, as JAX leaves
    them when a donated call fails.
    """
    calls = [0]
    real = JaxLoop.__call__

    def call(self, step, num_steps, operands):
        calls[0] += 1
        if calls[0] == 6:
            for variable in self.updated:
                variable._value.delete()
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return real(self, step, num_steps, operands)

    monkeypatch.setattr(JaxLoop, "__call__", call)


def test_after_a_failed_device_call_the_model_is_valid(
    tmp_path, failing_device, monkeypatch
):
    failed = trainer(tmp_path / "run")
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED") as caught:
        failed.train()
    assert "newest checkpoint" in "".join(caught.value.__notes__)
    assert np.isfinite(failed.model.predict(np.ones((2, 8)), verbose=0)).all()

    monkeypatch.undo()
    trainer(tmp_path / "run").train()
    trainer(tmp_path / "whole").train()
    for file in ("final/state.safetensors", "metrics.jsonl"):
        run, whole = (
            (tmp_path / name / file).read_bytes() for name in ("run", "whole")
        )
        assert run == whole
