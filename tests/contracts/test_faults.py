"""Faults of the machine: training goes on, and the bits are the same."""

import json
import multiprocessing
import os
import resource
import warnings

import keras

from tests.contracts import runs
from tests.contracts.fit_scenarios import compiled

FULL_FROM, FULL_UNTIL = 4, 9


class FullDisk(keras.callbacks.Callback):
    """From one step to another no file can grow (a limit of the process)."""

    def get_state(self):
        return {}

    def set_state(self, state):
        del state

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step == FULL_FROM:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        elif step == FULL_UNTIL:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def _train(run_dir, out, full):
    import legato

    made = compiled()()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = legato.fit(
            made.model,
            **made.data,
            epochs=4,
            verbose=0,
            checkpoint_interval=2,
            keep_last=None,
            callbacks=[FullDisk()] if full else [Idle()],
            run_dir=run_dir,
        )
    told = [str(w.message) for w in caught if "legato" in str(w.category)]
    out.write_text(json.dumps([told, history.history]))


class Idle(FullDisk):
    """The same hooks, and no fault."""

    def on_train_batch_end(self, batch, logs=None):
        del batch, logs


def train(run_dir, out, full):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.contracts.preloaded"])
    process = context.Process(target=_train, args=(run_dir, out, full))
    process.start()
    runs.finish(process)
    return json.loads(out.read_text())


def saved(run_dir):
    return {
        path.name: (path / "state.safetensors").read_bytes()
        for path in (run_dir / "checkpoints").glob("step_*")
    }


def test_a_disk_that_is_full_for_a_while(tmp_path):
    told, history = train(tmp_path / "full", tmp_path / "a", True)
    silent, expected = train(tmp_path / "whole", tmp_path / "b", False)
    assert history == expected
    assert not silent
    (message,) = told
    assert "could not be written" in message and "tried again" in message
    for file in ("metrics.jsonl", "final/state.safetensors"):
        ours, theirs = (
            (tmp_path / run / file).read_bytes() for run in ("full", "whole")
        )
        assert ours == theirs, file
    # Some were superseded; what is there is right, and so is the last.
    ours, theirs = saved(tmp_path / "full"), saved(tmp_path / "whole")
    assert ours.items() <= theirs.items()
    assert max(ours) == max(theirs)
    leftovers = [n for n in os.listdir(tmp_path / "full/checkpoints")]
    assert not [name for name in leftovers if name.startswith(".")]
