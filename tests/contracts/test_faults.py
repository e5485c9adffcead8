"""Faults of the machine: training goes on, and the bits are the same."""

import errno
import json
import os
import resource
import warnings

import filelock
import keras
import numpy as np
import pytest

import legato
from legato.checkpoint import writer
from legato.errors import WorkerError
from legato.storage import FileSystem
from legato.workers.processes import Processes
from tests.contracts import runs
from tests.contracts.examples import FailsOnce, augment
from tests.contracts.fit_scenarios import compiled
from tests.contracts.rows import Rows
from tests.contracts.scenarios import Classifier
from tests.processes import Forked, compiled_by, context, keep_compiled

FROM, UNTIL = 4, 9
"""The steps between which nothing can be written."""


def fill_disk(is_full):
    """No file can grow: a limit of the process."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0 if is_full else hard, hard))


def failing(number, *calls):
    """These calls to the system fail."""
    real = {name: getattr(FileSystem, name) for name in calls}

    def fail(self, *arguments):
        if calls == ("open",):  # of which reading works, and finding none
            path, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR)
            if not writes or not (flags & os.O_CREAT or path.exists()):
                return real["open"](self, path, flags)
        raise OSError(number, os.strerror(number))

    def set_failing(fails):
        for name in calls:
            setattr(FileSystem, name, fail if fails else real[name])

    return set_failing


FAULTS = {
    "full": fill_disk,
    "read-only": failing(errno.EROFS, "open"),
    "fsync": failing(errno.EIO, "fsync"),
    "rename": failing(errno.EIO, "rename"),
    "mkdir": failing(errno.EDQUOT, "mkdir"),
    "none": lambda fails: None,
}


class Fault(keras.callbacks.Callback):
    """From one step to another the disk is not what it should be."""

    def __init__(self, name):
        super().__init__()
        self._name = name

    def get_state(self):
        return {}

    def set_state(self, state):
        del state

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        if step in (FROM, UNTIL):
            FAULTS[self._name](step == FROM)


def _train(run_dir, out, fault, compiled_programs):
    keep_compiled(compiled_programs)
    writer.RETRY_SECS = 0.5
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
            callbacks=[Fault(fault)],
            run_dir=run_dir,
        )
    told = [str(w.message) for w in caught if "legato" in str(w.category)]
    out.write_text(json.dumps([told, history.history]))


def train(run_dir, out, fault):
    programs = compiled_by("one" if fault == "none" else "other")
    process = context().Process(
        target=_train, args=(run_dir, out, fault, programs)
    )
    process.start()
    runs.finish(process)
    return json.loads(out.read_text())


def saved(run_dir):
    return {
        path.name: (path / "state.safetensors").read_bytes()
        for path in (run_dir / "checkpoints").glob("step_*")
    }


@pytest.mark.any_backend
@pytest.mark.parametrize("fault", sorted({*FAULTS} - {"none"}))
def test_nothing_can_be_written_for_a_while(fault, shared_folder, tmp_path):
    whole = shared_folder / "without_fault"
    with filelock.FileLock(f"{whole}.lock"):
        if not whole.exists():
            train(whole, whole.with_suffix(".json"), "none")
    silent, expected = json.loads(whole.with_suffix(".json").read_text())
    told, history = train(tmp_path / "run", tmp_path / "told.json", fault)
    assert history == expected
    assert not silent
    (message,) = told
    assert "could not be written" in message and "tried again" in message
    for file in ("metrics.jsonl", "final/state.safetensors"):
        ours, theirs = (
            (run / file).read_bytes() for run in (tmp_path / "run", whole)
        )
        assert ours == theirs, file
    # Some were superseded; what is there is right, and so is the last.
    ours, theirs = saved(tmp_path / "run"), saved(whole)
    assert ours.items() <= theirs.items()
    assert max(ours) == max(theirs)
    leftovers = os.listdir(tmp_path / "run" / "checkpoints")
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


@pytest.mark.any_backend
@pytest.mark.parametrize("how", ["raises", "is killed", "hangs"])
def test_a_worker_of_ours_fails(how, tmp_path, monkeypatch):
    flag = tmp_path / "flag"
    take = Processes.take

    def impatient(workers):
        # With the batch that hangs: others may be late on a busy machine.
        hangs = how == "hangs" and flag.exists()
        is_its_turn = workers._pending[0].job.batch == 3
        workers._timeout = 0.5 if hangs and is_its_turn else 60
        return take(workers)

    monkeypatch.setattr(Processes, "take", impatient)

    def train(name, dataset):
        source = legato.RandomAccessSource(
            dataset,
            4,
            transform=augment,
            shuffle=False,
            workers=1,
            processes=True,
        )

        class Task(Classifier):
            def build_inputs(self, split):
                return source if split == "train" else None

        trainer = legato.Trainer(
            Task(),
            run_dir=tmp_path / name,
            config=legato.TrainerConfig(
                train_steps=9, checkpoint_interval=9, progress="none"
            ),
        )
        trainer.train()
        return [w.tobytes() for w in trainer.model.get_weights()]

    flag.touch()
    with pytest.raises(WorkerError, match="batch 3 of epoch 0"):
        train("failed", FailsOnce(how, flag))
    # Also what no checkpoint was due for.
    assert [p.name for p in (tmp_path / "failed/checkpoints").iterdir()] == [
        "step_00000003"
    ]
    flag.unlink()
    resumed = train("failed", FailsOnce(how, flag))
    assert resumed == train("whole", FailsOnce(how, flag))


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


@pytest.mark.any_backend
def test_other_threads_are_named(tmp_path):
    made = compiled()()
    run_dir = tmp_path / "run"
    legato.fit(made.model, **made.data, epochs=2, verbose=0, run_dir=run_dir)
    for exact, status in (("strict", 3), ("off", 0)):
        process = Forked(
            resume_with_other_threads, run_dir, exact, side="other"
        )
        out, err = process.communicate()
        assert process.returncode == status, err
        if status:
            assert "threads" in out or "NPROC" in out
            assert 'exact="strict" refuses' in out
