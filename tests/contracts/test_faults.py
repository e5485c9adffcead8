"""Faults of the machine: training goes on, and the bits are the same."""

import json
import os
import resource
import warnings

import keras
import numpy as np
import pytest

import legato
from tests.contracts import runs
from tests.contracts.fit_scenarios import compiled
from tests.contracts.rows import Rows
from tests.processes import Forked, context

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
    process = context().Process(target=_train, args=(run_dir, out, full))
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


class Batches(keras.utils.PyDataset):
    """In worker threads; fails in the second epoch while a file is there."""

    def __init__(self, flag):
        super().__init__(workers=2, max_queue_size=3)
        self._flag = flag

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 4 and self._flag.exists():
            raise OSError("the share is gone")
        random = np.random.default_rng(index)
        features = random.normal(size=(8, 4)).astype("float32")
        return features, features.sum(axis=1, keepdims=True)


def loader(flag):
    import torch

    return torch.utils.data.DataLoader(
        Rows(flag),
        batch_size=8,
        num_workers=1,
        multiprocessing_context="forkserver",
    )


@pytest.mark.parametrize(
    "make, error, said",
    [
        (Batches, OSError, "the share is gone"),
        # PyTorch's own words, of which there are several.
        (loader, (RuntimeError, OSError), "worker|Connection"),
    ],
    ids=["thread", "killed process"],
)
def test_a_data_worker_fails(make, error, said, tmp_path):
    flag = tmp_path / "flag"

    def train(name):
        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [keras.layers.Input((4,)), keras.layers.Dense(1)]
        )
        model.compile("sgd", "mse")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            legato.fit(
                model,
                make(flag),
                epochs=2,
                verbose=0,
                checkpoint_interval=1,
                run_dir=tmp_path / name,
            )
        return [weight.tobytes() for weight in model.get_weights()]

    flag.touch()
    with pytest.raises(error, match=said) as caught:
        train("failed")
    assert "goes on from the newest checkpoint" in caught.value.__notes__[-1]
    flag.unlink()
    assert train("failed") == train("whole")


def test_memory_runs_out_in_a_hook(tmp_path):
    class Full(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1 and not (tmp_path / "freed").exists():
                raise MemoryError("cannot allocate 10 TiB")

    def train(name):
        made = compiled()()
        legato.fit(
            made.model,
            **made.data,
            epochs=3,
            verbose=0,
            checkpoint_interval=2,
            callbacks=[Full()],
            run_dir=tmp_path / name,
        )
        return [weight.tobytes() for weight in made.model.get_weights()]

    with pytest.raises(MemoryError, match="10 TiB") as caught:
        train("failed")
    assert "goes on from the newest checkpoint" in caught.value.__notes__[-1]
    (tmp_path / "freed").touch()
    assert train("failed") == train("whole")


def other_threads():
    match keras.config.backend():
        case "torch":
            import torch

            torch.set_num_threads(torch.get_num_threads() + 1)
        case "tensorflow":
            import tensorflow as tf

            tf.config.threading.set_intra_op_parallelism_threads(3)
        case "jax":
            os.environ["NPROC"] = "3"


def resume_with_other_threads(run_dir, exact):
    other_threads()
    made = compiled()()
    try:
        legato.fit(
            made.model,
            **made.data,
            epochs=4,
            verbose=0,
            exact=exact,
            run_dir=run_dir,
        )
    except legato.errors.ExactnessError as error:
        print(error)
        return 3
    return 0


def test_other_threads_are_named(tmp_path):
    made = compiled()()
    run_dir = tmp_path / "run"
    legato.fit(made.model, **made.data, epochs=2, verbose=0, run_dir=run_dir)
    for exact, status in (("strict", 3), ("off", 0)):
        process = Forked(resume_with_other_threads, run_dir, exact)
        out, err = process.communicate()
        assert process.returncode == status, err
        if status:
            assert "threads" in out or "NPROC" in out
            assert 'exact="strict" refuses' in out
