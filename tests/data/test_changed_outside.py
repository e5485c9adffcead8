"""What callbacks change in the data: kept, or named, when a run is resumed."""

import os
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

import legato
from legato.data import RandomAccessSource, fit_source
from tests.data.reading import assert_equal, read, take
from tests.data.sources import X, Y

BATCHES, EPOCHS = 4, 3


class Loader:
    """Batches in an order and of a level that others set."""

    def __init__(self):
        self.epoch, self.level, self.passes = 0, 0.0, 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        self.passes += 1
        order = np.random.default_rng(self.epoch).permutation(20)
        for i in range(BATCHES):
            rows = order[5 * i : 5 * i + 5]
            yield X[rows] * (1 + self.level) + self.passes, Y[rows]


class Numbered:
    """The same of single examples."""

    def __init__(self):
        self.epoch, self.level, self.reads = 0, 0.0, 0

    def __len__(self):
        return 5 * BATCHES

    def __getitem__(self, index):
        self.reads += 1
        return X[index] * (1 + self.level) + self.epoch, Y[index]


class Batched(keras.utils.PyDataset):
    """The same of batches."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.epoch, self.level = 0, 0.0

    def __len__(self):
        return BATCHES

    def __getitem__(self, index):
        order = np.random.default_rng(self.epoch).permutation(20)
        rows = order[5 * index : 5 * index + 5]
        return X[rows] * (1 + self.level), Y[rows]


def torch_loader():
    """With the sampler that needs `set_epoch`."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from torch.utils.data.distributed import DistributedSampler

    data = TensorDataset(torch.from_numpy(X[:20]), torch.from_numpy(Y[:20]))
    sampler = DistributedSampler(data, num_replicas=1, rank=0, seed=3)
    return DataLoader(data, batch_size=5, sampler=sampler), sampler


MAKERS = {
    "iterable": lambda: (Loader(),) * 2,
    "torch": torch_loader,
    "py": lambda: (Batched(),) * 2,
    "numbers": lambda: (Numbered(),) * 2,
}


class EpochOf(keras.callbacks.Callback):
    """Tells the data of each epoch, as samplers want it."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def on_epoch_begin(self, epoch, logs=None):
        self.data.epoch = 3 + epoch


class LevelOf(EpochOf):
    """Changes them in the middle of an epoch, relative to what they were."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            self.data.level += 0.5


class Unsaved:
    """What is saved with the callback is not what brings it back."""

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


class EpochOfUnsaved(Unsaved, EpochOf):
    pass


class LevelOfUnsaved(Unsaved, LevelOf):
    pass


class Stop(keras.callbacks.Callback):
    """Ends the process's part of the run after a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def get_state(self):
        return {}  # each process counts its own

    def set_state(self, state):
        pass

    def on_train_batch_end(self, batch, logs=None):
        self.step -= 1
        if self.step == 0:
            raise KeyError("stopped")


def train(folder, kind, callback, *, stop=None, interval=1):
    keras.utils.set_random_seed(7)
    data, told = MAKERS[kind]()
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e-4), "mse")
    callbacks = [callback(told)] + ([Stop(stop)] if stop else [])
    arguments = {"batch_size": 5, "shuffle": False}
    legato.fit(
        model,
        data,
        epochs=EPOCHS,
        callbacks=callbacks,
        verbose=0,
        run_dir=folder,
        checkpoint_interval=interval,
        exact="strict",
        **(arguments if kind == "numbers" else {}),
    )
    return np.concatenate([w.ravel() for w in model.get_weights()])


@pytest.mark.parametrize("callback", [EpochOf, LevelOf])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_run_that_is_resumed_has_it(kind, callback, tmp_path):
    if kind == "torch" and callback is LevelOf:
        pytest.skip("a sampler has no level")
    if kind != "numbers":
        callback = {EpochOf: EpochOfUnsaved, LevelOf: LevelOfUnsaved}[callback]
    whole = train(tmp_path / "whole", kind, callback)
    # In mid-epoch, before and after the change, and at epochs' ends.
    for stop, interval in [(3, 1), (4, 1), (5, 1), (7, 1), (7, "epoch")]:
        folder = tmp_path / f"{stop} {interval}"
        for again in (stop, 3):  # the second time perhaps at an epoch's end
            with pytest.raises(KeyError):
                train(folder, kind, callback, stop=again, interval=interval)
        found = train(folder, kind, callback)
        assert found.tobytes() == whole.tobytes(), (stop, interval)


def test_it_makes_a_difference(tmp_path):
    class Nothing(EpochOf):
        def on_epoch_begin(self, epoch, logs=None):
            pass

    for kind in MAKERS:
        one = train(tmp_path / f"{kind} 1", kind, EpochOf)
        other = train(tmp_path / f"{kind} 2", kind, Nothing)
        assert one.tobytes() != other.tobytes()


class Shards:
    """Keeps the part that it read last, as datasets of files do."""

    def __init__(self):
        self.shard, self.rows = 0, X[:8]

    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index // 8 != self.shard:
            self.shard = index // 8
            self.rows = X[8 * self.shard : 8 * self.shard + 8]
        return self.rows[index % 8], np.int32(index)


def test_what_a_dataset_keeps_for_itself_is_left_alone():
    def source():
        return RandomAccessSource(Shards(), 4, shuffle=False)

    whole = read(source(), 8)
    iterator = source().iterate(seed=5, capacity=4)
    iterator.next_chunk(3)
    state = iterator.get_state()
    assert_equal(read(source(), 5, state=state), whole[3:])
    iterator.set_state({"epoch": 0, "batch": 0})
    assert_equal(take(iterator, source(), 8), whole)


class Experiment:
    """Whose methods give the data, as many programs have it."""

    def __init__(self):
        self.model = keras.Sequential(
            [keras.Input((2,)), keras.layers.Dense(1)]
        )

    def batches(self):
        for i in range(3):
            yield X[5 * i : 5 * i + 5] / 50, X[5 * i : 5 * i + 5].sum(1) / 50


class Mines(Experiment):
    """Data that look at the model."""

    def __len__(self):
        return 3

    def __iter__(self):
        return self.batches()


@pytest.mark.parametrize("make", [Mines, lambda: Experiment().batches])
def test_a_model_is_no_state_of_the_data(make, tmp_path):
    data = make()
    model = getattr(data, "__self__", data).model
    model.compile(keras.optimizers.SGD(0.1), "mse")
    losses = legato.fit(
        model,
        data,
        validation_data=data,
        steps_per_epoch=3,
        validation_steps=3,
        epochs=4,
        verbose=0,
        run_dir=tmp_path,
    ).history
    assert losses["val_loss"][-1] < 0.9 * losses["val_loss"][0]
    assert losses["val_loss"][0] < losses["loss"][0]


def test_a_position_of_an_earlier_version():
    def source():
        return fit_source(Loader())

    whole = read(source(), 8)
    for position in (0, 2, 4):
        iterator = source().iterate(seed=5, capacity=4)
        if position:
            take(iterator, source(), position)
        state = iterator.get_state()
        iterator.close()
        del state["now"], state["drawn"]
        rest = read(source(), 8 - position, state=state)
        assert_equal(rest, whole[position:])


def test_threads_of_a_pydataset_are_named(tmp_path):
    data = Batched(workers=2)
    source = fit_source(data)
    iterator = source.iterate(seed=1, capacity=1)
    iterator.next_chunk(1)
    iterator.get_state()
    assert source.inexact is None
    data.level = 0.5
    iterator.get_state()
    assert "its attributes changed while workers=2" in source.inexact
    iterator.close()


WORKERS = """
import sys
import time
import numpy as np
import grain
from legato.data import fit_source

def slow(example):
    time.sleep(3)
    return example

if __name__ == "__main__":
    rows = np.zeros((64, 2), "float32")
    options = grain.MultiprocessingOptions(num_workers=2)
    data = grain.MapDataset.source(rows).map(slow).batch(2)
    source = fit_source(
        data.to_iter_dataset().mp_prefetch(options), steps_per_epoch=5
    )
"""


def _children(tag):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                marked = tag.encode() in file.read()
            with open(f"/proc/{pid}/stat") as file:
                if marked and ") Z " not in file.read():
                    found.append(int(pid))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks into /proc")
def test_grains_workers_end_with_a_process_that_is_killed_early(tmp_path):
    pytest.importorskip("grain")
    script = tmp_path / "program.py"
    script.write_text(WORKERS)
    tag = f"LEGATO_TEST={os.getpid()}-{time.time_ns()}"
    name, value = tag.split("=")
    process = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, name: value}
    )
    deadline = time.monotonic() + 60
    # Itself, two workers and what looks after them: no batch has come yet.
    while len(_children(tag)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(_children(tag)) >= 4
    time.sleep(0.2)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while _children(tag) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = _children(tag)
    for pid in left:
        os.kill(pid, 9)
    assert not left
