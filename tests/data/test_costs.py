"""What resuming costs: how much is read again, counted."""

import keras
import numpy as np
import pytest

import legato
from legato.data import fit_source
from tests.data.sources import Told

LENGTH = 4000  # batches in a pass


READS = [0]  # kept where it is not part of any data


class Reads:
    """Examples by number, which count how often they are asked for."""

    def __len__(self):
        return 2 * LENGTH

    def __getitem__(self, index):
        READS[0] += 1
        return np.full(3, index, "float32")


def grain_map(reads):
    grain = pytest.importorskip("grain")
    return grain.MapDataset.source(reads).shuffle(seed=1).batch(2)


def grain_iter(reads):
    grain = pytest.importorskip("grain")
    data = grain.MapDataset.source(reads).shuffle(seed=1)
    return data.to_iter_dataset(grain.ReadOptions(2, 4)).batch(2)


def grain_loader(reads):
    grain = pytest.importorskip("grain")
    return grain.DataLoader(
        data_source=reads,
        sampler=grain.samplers.IndexSampler(
            len(reads), shuffle=True, seed=3, num_epochs=1
        ),
        operations=[grain.transforms.Batch(2)],
        read_options=grain.ReadOptions(2, 4),
    )


def torch_map(reads):
    import torch
    from torch.utils.data import DataLoader

    class Dataset(torch.utils.data.Dataset):
        def __len__(self):
            return len(reads)

        def __getitem__(self, index):
            return torch.from_numpy(reads[index])

    return DataLoader(Dataset(), batch_size=2, shuffle=True)


class Counts(Told):
    """Tells its state; what it reads is counted elsewhere."""

    def __init__(self, reads):
        super().__init__()

    def __next__(self):
        READS[0] += 1
        return super().__next__()


CHEAP = {
    "grain MapDataset": (grain_map, 64),
    "grain IterDataset": (grain_iter, 32),
    "grain DataLoader": (grain_loader, 32),
    "torch map-style": (torch_map, 16),
    "iterator": (Counts, 16),
}


@pytest.mark.parametrize("name", CHEAP)
def test_resuming_late_reads_little(name):
    make, most = CHEAP[name]
    reads = Reads()
    source = fit_source(make(reads), steps_per_epoch=LENGTH)
    iterator = source.iterate(seed=5, capacity=256)
    given = 0
    while given < LENGTH - 100:
        given += iterator.next_chunk(min(256, LENGTH - 100 - given)).num_batches
    state = iterator.get_state()
    expected = iterator.next_chunk(1).operands
    iterator.close()
    iterator = fit_source(make(reads), steps_per_epoch=LENGTH).iterate(
        seed=5, capacity=1
    )
    READS[0] = 0
    iterator.set_state(state)
    assert iterator.rereads == 0
    found = iterator.next_chunk(1).operands
    iterator.close()
    np.testing.assert_array_equal(found[0][0], expected[0][0])
    assert 0 < READS[0] <= most


def test_what_is_read_again_is_announced():
    def generator():
        while True:
            yield np.zeros((2, 3), "float32")

    source = fit_source(generator(), steps_per_epoch=3)
    assert "reads again all from its first batch" in source.resuming
    iterator = source.iterate(seed=5, capacity=4)
    iterator.next_chunk(3)
    state = iterator.get_state()
    iterator = fit_source(generator(), steps_per_epoch=3).iterate(
        seed=5, capacity=4
    )
    iterator.set_state(state)
    assert iterator.rereads == 3
    iterator.next_chunk(1)
    assert iterator.rereads == 0


def test_users_are_told(tmp_path, capsys):
    def train(epochs):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        legato.fit(
            model,
            ((np.zeros((2, 3)), np.zeros(2)) for _ in iter(int, 1)),
            steps_per_epoch=5,
            epochs=epochs,
            verbose=2,
            run_dir=tmp_path / "run",
        )
        return " ".join(capsys.readouterr().err.split())

    assert "x (generator): a run that is resumed reads again all" in train(1)
    text = train(2)
    assert "at step 5, 5 batches are read again:" in text
    assert "x (generator): a run" not in text
