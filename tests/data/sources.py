"""Data of every kind, made anew at each call, for the tests of resuming.

They draw on purpose from everything that a resumed run must find again: the
global generators, generators of their own, what they counted so far.
"""

import itertools
import random

import keras
import numpy as np

from legato.data import RandomAccessSource, fit_source
from legato.workers import Pad

X = np.arange(23 * 2, dtype="float32").reshape(23, 2)
Y = np.arange(23, dtype="int32")


class Plain(keras.utils.PyDataset):
    """5 batches of up to 5 examples."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        rows = slice(5 * index, 5 * index + 5)
        return X[rows], Y[rows]


class Augments(Plain):
    """Draws from the global generators, also PyTorch's."""

    def __getitem__(self, index):
        import torch

        x, y = super().__getitem__(index)
        noise = np.random.normal(size=x.shape) + random.random()
        noise = noise + torch.rand(x.shape).numpy()
        keras_noise = keras.random.normal(x.shape)
        return x + noise + keras.ops.convert_to_numpy(keras_noise), y


class Reshuffles(keras.utils.PyDataset):
    """Shuffles its own indices, as many do, and has a generator of its own."""

    def __init__(self, n=23, **kwargs):
        super().__init__(**kwargs)
        self.indices = np.arange(n)
        self.names = [f"name {i}" for i in range(n // 100 or n)]
        self.generator = np.random.default_rng(3)
        self.drawn = 0
        self.begun = []

    def __len__(self):
        return -(-len(self.indices) // 5)

    def __getitem__(self, index):
        rows = self.indices[5 * index : 5 * index + 5]
        self.drawn += len(rows)
        x = rows[:, None] + self.generator.normal(size=(len(rows), 2))
        count = len(self.names)
        y = [int(self.names[i % count].split()[1]) for i in rows]
        return x.astype("float32"), np.array(y, "int32") + self.drawn

    def on_epoch_begin(self):
        self.begun.append(len(self.begun))

    def on_epoch_end(self):
        np.random.shuffle(self.indices)
        random.shuffle(self.names)


class ReshufflesMuch(Reshuffles):
    """The same, with more of it than is saved whole."""

    def __init__(self, **kwargs):
        super().__init__(200_000, **kwargs)  # 1.6 MB of indices

    def __len__(self):
        return 3


class Buckets(keras.utils.PyDataset):
    """Sequences of lengths that vary, with a generator of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = random.Random(5)

    def __len__(self):
        return 7

    def __getitem__(self, index):
        length = [3, 3, 5, 3, 5, 5, 5][index]
        size = 4 if index < 6 else 2
        x = np.full((size, length), self.generator.random(), "float32")
        return x, np.full(size, index, "int32")


class Endless(keras.utils.PyDataset):
    @property
    def num_batches(self):
        return None

    def __getitem__(self, index):
        return np.full((2, 3), index, "float32"), np.random.rand(2)


class Iterates:
    """Batches again and again, in an order of its own."""

    def __init__(self, length=4):
        self.length = length
        self.generator = np.random.default_rng(7)

    def __len__(self):
        return self.length

    def __iter__(self):
        for i in self.generator.permutation(self.length):
            rows = slice(5 * i, 5 * i + 5)
            yield X[rows] + np.random.rand(), Y[rows]


class Unsized:
    def __iter__(self):
        yield from Iterates(3)


def generator():
    position = 0
    while True:
        size = 5 - position % 2
        yield X[:size] + np.random.rand(), Y[:size] + position
        position += 1


def three_batches():
    yield from itertools.islice(generator(), 3)


def tf_dataset(*, late=False):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(23, seed=3)
    if late:
        data = data.concatenate(
            tf.data.Dataset.from_tensor_slices((X[:6], Y[:6]))
            .shuffle(6, seed=4)
            .repeat(2)
        )
    return data.batch(5).prefetch(2)


def torch_loader(**kwargs):
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    return DataLoader(data, batch_size=5, **kwargs)


def torch_augmented(**kwargs):
    import torch
    from torch.utils.data import DataLoader

    return DataLoader(
        Augmented(torch.from_numpy(X)), batch_size=5, shuffle=True, **kwargs
    )


class Augmented:
    """A dataset of PyTorch's kind that draws from everything."""

    def __init__(self, x):
        self.x = x
        self.own = random.Random(3)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        import torch

        noise = torch.rand(2) + np.random.rand() + random.random()
        return self.x[index] + noise + self.own.random(), index


class Seldom(Augmented):
    """Draws from a generator of its own, but not for the first batches."""

    def __getitem__(self, index):
        x, index = self.x[index] + np.random.rand(), int(index)
        return x + (self.own.random() if index > 14 else 0), index


def torch_seldom():
    import torch
    from torch.utils.data import DataLoader

    return DataLoader(Seldom(torch.from_numpy(X)), batch_size=5)


def torch_stateful(**kwargs):
    import torch
    from torch.utils.data import TensorDataset
    from torchdata.stateful_dataloader import StatefulDataLoader

    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    return StatefulDataLoader(
        data, batch_size=5, shuffle=True, generator=generator, **kwargs
    )


def torch_stateful_stream():
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(Stream(), batch_size=5)


def torch_stream():
    from torch.utils.data import DataLoader

    return DataLoader(Stream(), batch_size=5)


class _Stream:
    """Examples in their own order; tells its state, for torchdata."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while self.position < 23:
            self.position += 1
            yield X[self.position - 1] + np.float32(np.random.rand())
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def Stream():
    from torch.utils.data import IterableDataset

    return type("Stream", (_Stream, IterableDataset), {})()


def torch_seeded():
    import torch

    generator = torch.Generator().manual_seed(5)
    return torch_loader(shuffle=True, generator=generator)


def grain_dataset():
    import grain

    return grain.MapDataset.range(23).shuffle(seed=1).batch(5)


def grain_iter(**kwargs):
    from tests.data import grain_examples

    return grain_examples.dataset(**kwargs)


def grain_plain():
    """Runs the user's code where it is drawn."""
    import grain

    data = grain.MapDataset.range(23).shuffle(seed=1).to_iter_dataset()
    return data.map(np.float32).batch(5)


def grain_loader(*, workers=0):
    import grain

    return grain.DataLoader(
        data_source=Examples(),
        sampler=grain.samplers.IndexSampler(
            23, shuffle=True, seed=3, num_epochs=1
        ),
        operations=[grain.transforms.Batch(5, drop_remainder=False)],
        worker_count=workers,
    )


class Examples:
    """Examples by their numbers; printed with its address."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return X[index]


class TellsItself:
    """Tells its state, as torchdata's loader does."""

    key = "position"

    def __init__(self):
        self.position = 0

    def __len__(self):
        return 7

    def __iter__(self):
        self.position = self.position % 7
        while self.position < 7:
            self.position += 1
            yield X[self.position :][:3] + np.random.rand(), Y[:3]

    def state_dict(self):
        return {b"position": (self.position % 7,)}

    def load_state_dict(self, state):
        (self.position,) = state[b"position"]


class IteratorTells(Iterates):
    """Its iterators tell their state, as Grain's do."""

    def __iter__(self):
        return Told(self.generator.permutation(self.length))


class Told:
    """An iterator with a state; also without end, of itself."""

    def __init__(self, order=None):
        self.order = order
        self.position = 0
        self.generator = np.random.default_rng(3)

    def __iter__(self):
        return self

    def __next__(self):
        if self.order is not None and self.position == len(self.order):
            raise StopIteration
        i = self.position if self.order is None else self.order[self.position]
        self.position += 1
        noise = self.generator.random() + np.random.rand()
        return X[i % 9 : i % 9 + 5] + noise, Y[:5]

    def get_state(self):
        return {
            "order": self.order,
            "position": self.position,
            "generator": self.generator.bit_generator.state,
        }

    def set_state(self, state):
        self.order = state["order"]
        self.position = state["position"]
        self.generator.bit_generator.state = state["generator"]


NAMES = [f"name {i}" for i in range(23)]
DATES = np.datetime64("2026-01-01") + np.arange(23)


class Named(keras.utils.PyDataset):
    """Batches of several shapes, with all that no device takes."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        rows = slice(5 * index, 5 * index + [5, 3, 3, 5, 3][index])
        names = [f"{name}, {np.random.rand()}" for name in NAMES[rows]]
        objects = np.array([None] + [{"of": name} for name in names], object)
        return X[rows], {
            "y": Y[rows],
            "name": names,
            "date": DATES[rows],
            "object": objects[1:],
            "bytes": np.array([name.encode() for name in names]),
            "text": np.array(names),
        }


class NamedAgain(Iterates):
    """As loaders leave strings: in tuples."""

    def __iter__(self):
        for i in self.generator.permutation(self.length):
            rows = slice(5 * i, 5 * i + 5 - i % 2)
            names = tuple(f"{n} {np.random.rand()}" for n in NAMES[rows])
            yield X[rows], (Y[rows], names)


class NamedTold(Told):
    """An iterator with a state."""

    def __next__(self):
        x, y = super().__next__()
        names = [f"{each:.7f}" for each in x[:, 0]]
        x, y, names = (a[self.position % 2 :] for a in (x, y, names))
        return x, (y, names)


def named_torch():
    from torch.utils.data import DataLoader

    rows = [
        {"x": x, "name": name, "pair": (name, name[-2:])}
        for x, name in zip(X, NAMES, strict=True)
    ]
    return DataLoader(rows, batch_size=5, shuffle=True)


def named_tf():
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, {"y": Y, "name": NAMES}))
    return data.shuffle(23, seed=3).batch(5)


def named_examples(**kwargs):
    rows = [
        {
            "x": X[:, 0][: 1 + i % 3],
            "name": name,
            "words": name.split()[i % 2 :],
        }
        for i, name in enumerate(NAMES)
    ]
    return RandomAccessSource(
        rows, 5, collate=Pad({"x": 0}, boundaries=[2, 3]), **kwargs
    )


def hugging_face(kind=None, **kwargs):
    import datasets

    columns = {"x": X.tolist(), "y": Y.tolist(), "name": NAMES}
    data = datasets.Dataset.from_dict(columns).with_format(kind)
    return RandomAccessSource(data, 5, **kwargs)


def hugging_face_stream(shuffle=False, batch_size=5):
    data = hugging_face().recipe.dataset.to_iterable_dataset(num_shards=3)
    if shuffle:
        data = data.shuffle(seed=3, buffer_size=7)
    return data.batch(batch_size) if batch_size else data


class HoldsStreams:
    """Has streams of Hugging Face's, and goes from epoch to epoch."""

    def __init__(self):
        self.stream = hugging_face_stream(shuffle=True)
        self.more = [hugging_face_stream()]

    def __len__(self):
        return 5

    def __iter__(self):
        self.stream.set_epoch(self.stream.epoch + 1)
        for one, other in zip(self.stream, self.more[0], strict=True):
            yield (
                np.asarray(one["x"]) + np.random.rand(),
                np.asarray(other["y"]),
            )


def torch_of_stream():
    from torch.utils.data import DataLoader

    data = hugging_face_stream(shuffle=True, batch_size=None)
    data = data.remove_columns("name").with_format("torch")
    return DataLoader(data, batch_size=5)


NAMED = {
    "named": lambda: fit_source(
        X, {"y": Y, "name": NAMES, "date": DATES}, batch_size=5, shuffle=True
    ),
    "py named": lambda: fit_source(Named(), shuffle=True),
    "named iterable": lambda: fit_source(NamedAgain()),
    "named iterator": lambda: fit_source(NamedTold(), steps_per_epoch=3),
    "named torch": lambda: fit_source(named_torch()),
    "named tf": lambda: fit_source(named_tf()),
    "named examples": named_examples,
    "named examples, threads": lambda: named_examples(workers=2),
}

SOURCES = {
    **NAMED,
    "arrays": lambda: fit_source(X, Y, batch_size=5, shuffle=True),
    "arrays, batch": lambda: fit_source(X, Y, batch_size=5, shuffle="batch"),
    "py": lambda: fit_source(Plain(), shuffle=True),
    "py in threads": lambda: fit_source(Plain(workers=3), shuffle=True),
    "py in threads, steps": lambda: fit_source(
        Plain(workers=3), shuffle=True, steps_per_epoch=7
    ),
    "py augments": lambda: fit_source(Augments(), shuffle=True),
    "py reshuffles": lambda: fit_source(Reshuffles()),
    "py reshuffles much": lambda: fit_source(ReshufflesMuch()),
    "py steps": lambda: fit_source(Reshuffles(), steps_per_epoch=3),
    "py buckets": lambda: fit_source(Buckets(), shuffle=True),
    "py endless": lambda: fit_source(Endless(), steps_per_epoch=3),
    "iterable": lambda: fit_source(Iterates()),
    "iterable, steps": lambda: fit_source(Iterates(), steps_per_epoch=3),
    "iterable tells": lambda: fit_source(TellsItself()),
    "iterators tell": lambda: fit_source(IteratorTells()),
    "iterator": lambda: fit_source(Told(), steps_per_epoch=3),
    "generator": lambda: fit_source(generator(), steps_per_epoch=3),
    "generator function": lambda: fit_source(three_batches, steps_per_epoch=3),
    "tf": lambda: fit_source(tf_dataset()),
    "tf late": lambda: fit_source(tf_dataset(late=True)),
    "torch": lambda: fit_source(torch_loader(shuffle=True)),
    "torch seeded": lambda: fit_source(torch_seeded()),
    "torch augmented": lambda: fit_source(torch_augmented()),
    "torch seldom": lambda: fit_source(torch_seldom()),
    "torch stream": lambda: fit_source(torch_stream(), steps_per_epoch=5),
    "torchdata": lambda: fit_source(torch_stateful()),
    "torchdata stream": lambda: fit_source(
        torch_stateful_stream(), steps_per_epoch=5
    ),
}

GRAIN = {
    "grain": lambda: fit_source(grain_dataset()),
    "grain iter": lambda: fit_source(grain_iter(), steps_per_epoch=5),
    "grain plain": lambda: fit_source(grain_plain(), steps_per_epoch=5),
    "grain loader": lambda: fit_source(grain_loader(), steps_per_epoch=5),
}
HUGGING_FACE = {
    "hf": hugging_face,
    "hf stream": lambda: fit_source(hugging_face_stream(), steps_per_epoch=5),
    "hf shuffled": lambda: fit_source(
        hugging_face_stream(shuffle=True), steps_per_epoch=5
    ),
    "hf held": lambda: fit_source(HoldsStreams()),
    "hf in torch": lambda: fit_source(torch_of_stream(), steps_per_epoch=5),
}
KINDS = {**SOURCES, **GRAIN, **HUGGING_FACE}
if keras.config.backend() == "torch":
    # (A fork of JAX's many threads may deadlock.)
    KINDS["torch workers"] = lambda: fit_source(
        torch_augmented(num_workers=2, persistent_workers=True)
    )
    KINDS["torch workers, seeded"] = lambda: fit_source(
        torch_loader(num_workers=1, shuffle=True)
    )
