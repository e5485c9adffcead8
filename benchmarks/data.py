"""How fast data come: waiting, resuming, memory, and beside other loaders.

Every comparison is of things measured in turns (A B A B).

    KERAS_BACKEND=torch python benchmarks/data.py [wait|resume ...]
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import engine  # chooses the backend, and finds the model

WAIT_SHARE = 0.05
THROUGHPUT = 0.95
WIDTHS = {"jax": (512, 1024)}
"""Of the layers beside which data wait: the step takes milliseconds."""
WORKERS: dict[str, dict[str, Any]] = {
    "none": {},
    "a thread": {"workers": 1},
    "a process": {"workers": 1, "processes": True},
    "two threads": {"workers": 2},
}
BY_HAND = "a thread, in a loop by hand"


# -- waiting ----------------------------------------------------------------


def wait(rounds: int) -> list[engine.Row]:
    """What training waits for data in memory, and for data that wait."""
    import model

    import legato

    x, y = model.make_data(engine.EXAMPLES)

    def arrays() -> Any:
        return legato.ArraySource((x, y), batch_size=model.BATCH)

    shares = [waited(arrays(), epochs=4) for _ in range(rounds)]
    share = statistics.median(shares)
    rows = [
        engine.judged(
            "MLP from arrays in memory: waiting for data, of the step",
            f"{100 * share:.2f} %",
            share,
            at_most=WAIT_SHARE,
        )
    ]
    return rows + slow(rounds)


def waited(source: Any, *, epochs: int) -> float:
    """The part of training that the thread waits for data."""
    import legato.data.feed

    feed = legato.data.feed.Feed
    spent = [0.0]

    def timed(method: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                spent[0] += time.perf_counter() - began

        return call

    take, prefetch = feed.take, feed.prefetch
    feed.take, feed.prefetch = timed(take), timed(prefetch)
    try:
        ends = trained(source, epochs, on_end=lambda: spent[0])
    finally:
        feed.take, feed.prefetch = take, prefetch
    (first, before), *_, (last, after) = ends
    return (after - before) / (last - first)


def trained(
    source: Any,
    epochs: int,
    *,
    width: int = 64,
    on_end: Callable[[], float] = lambda: 0.0,
) -> list[tuple[float, float]]:
    """When each epoch ended, and what `on_end` said then."""
    import keras
    import model

    import legato

    ends: list[tuple[float, float]] = []

    class Timer(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            ends.append((time.perf_counter(), on_end()))

    class Mlp(legato.Task):
        def __init__(self) -> None:
            self.cross_entropy = model.build_loss()

        def build_model(self) -> Any:
            if width == 64:
                return model.build_model()
            layers = [keras.layers.Dense(width, "relu") for _ in range(4)]
            return keras.Sequential(
                [keras.layers.Input((64,)), *layers, keras.layers.Dense(10)]
            )

        def build_optimizer(self) -> Any:
            return keras.optimizers.Adam(model.LEARNING_RATE)

        def build_inputs(self, split: str) -> Any:
            return source if split == "train" else None

        def build_losses(
            self, labels: Any, model_outputs: Any, aux_losses: Any = None
        ) -> Any:
            return self.cross_entropy(labels, model_outputs)

    with tempfile.TemporaryDirectory() as run_dir:
        legato.Trainer(
            Mlp(),
            run_dir=run_dir,
            config=legato.TrainerConfig(
                epochs=epochs, progress="none", torch_compile=False
            ),
            callbacks=[Timer()],
        ).train()
    return ends


def slow(rounds: int) -> list[engine.Row]:
    """A source that waits as long as the step takes."""
    backend = os.environ["KERAS_BACKEND"]
    return [
        row
        for width in WIDTHS.get(backend, (512,))
        for row in slow_beside(width, rounds)
    ]


def slow_beside(width: int, rounds: int) -> list[engine.Row]:
    """The same, with layers of one width."""
    import data_samples
    import model

    import legato

    x, y = model.make_data(100 * model.BATCH)
    size = model.BATCH

    def rate(source: Any) -> float:
        # (Calls of the device grow to their length in the first epochs.)
        ends = trained(source, 10, width=width)
        return 700 / (ends[-1][0] - ends[2][0])

    def step() -> float:
        return rate(legato.ArraySource((x, y), batch_size=size))

    step()  # to warm up
    secs = 1 / step()
    data = data_samples.Waits(x, y, secs)

    def made(**arguments: Any) -> Any:
        return legato.RandomAccessSource(data, size, **arguments)

    def alone(**arguments: Any) -> float:
        source = made(**arguments)
        iterator = source.iterate(seed=0, capacity=8)
        begun, done = time.perf_counter(), 0
        while done < 200:
            done += iterator.next_chunk(8).num_batches
        iterator.close()
        return done / (time.perf_counter() - begun)

    # By kind: the step alone, the data alone, both.
    trios: dict[str, tuple[Callable[[], float], ...]] = {}
    for kind, arguments in WORKERS.items():
        trios[kind] = (
            step,
            lambda a=arguments: alone(**a),
            lambda a=arguments: rate(made(**a)),
        )
    if os.environ["KERAS_BACKEND"] == "jax":
        from data_by_hand import Loop, drawn, in_a_thread

        loop = Loop(width)
        repeated = [(x[i::100], y[i::100].astype("int32")) for i in range(100)]
        loop.rate(repeated)
        trios[BY_HAND] = (
            lambda: loop.rate(7 * repeated),
            lambda: drawn(in_a_thread(data, 200)),
            lambda: loop.rate(in_a_thread(data, 700)),
        )
    ratios: dict[str, list[float]] = {kind: [] for kind in trios}
    for _ in range(rounds):
        for kind, trio in trios.items():
            of_step, of_data, of_both = (measure() for measure in trio)
            ratios[kind].append(of_both / min(of_step, of_data))
    rows = []
    for kind, each in ratios.items():
        middle = statistics.median(each)
        asked = kind not in ("none", BY_HAND)
        rows.append(
            engine.judged(
                f"data that wait {1e3 * secs:.1f} ms, as long as the step, "
                f"workers: {kind}; throughput / the slower of the two",
                f"{middle:.2f} ({min(each):.2f} to {max(each):.2f})",
                middle,
                at_least=THROUGHPUT if asked else None,
            )
        )
    return rows


# -- resuming, memory -------------------------------------------------------


def resume(rounds: int) -> list[engine.Row]:
    """Seconds to the first batch at a position, of 10**9 examples."""
    import data_samples

    import legato

    source = legato.RandomAccessSource(data_samples.Vast(), 32)
    iterator = source.iterate(seed=0, capacity=1)

    def at(step: int) -> Callable[[], float]:
        def measure() -> float:
            epoch, batch = divmod(step, source.batches_per_epoch)
            began = time.perf_counter()
            # (Another epoch in between, so that nothing is known already.)
            iterator.set_state({"epoch": epoch, "batch": batch})
            iterator.next_chunk(1)
            return time.perf_counter() - began

        return measure

    steps = (10, 10**6, 10**9)
    times = engine.in_turns({str(n): at(n) for n in steps}, 15 * rounds)
    rows = [
        (
            f"ms to resume at step {int(name):.0e}, of 10^9 examples",
            f"{1e3 * statistics.median(each):.2f}",
            "",
            "",
        )
        for name, each in times.items()
    ]
    value, text = engine.ratio(times, str(10**6), "10")
    rows.append(engine.judged("step 10^6 / step 10", text, value, at_most=1.5))
    return rows


def memory(rounds: int) -> list[engine.Row]:
    """What making batches ahead takes, beside the batches themselves."""
    import data_samples

    import legato

    del rounds
    batch = 32 * 100_000
    rows = []
    for kind, processes in (("threads", False), ("processes", True)):
        source = legato.RandomAccessSource(
            data_samples.Large(), 32, workers=2, processes=processes, prefetch=2
        )
        iterator = source.iterate(seed=0, capacity=4)
        for _ in range(3):
            iterator.next_chunk(4)
        before = peak()
        for _ in range(100):
            iterator.next_chunk(4)
        grown = peak() - before
        iterator.close()
        # The window, the chunk, and one chunk that is let go of.
        window = (2 * 2 + 1 + 2 * 4) * batch
        rows.append(
            engine.judged(
                f"MB above the prefetch window ({window / 1e6:.0f} MB) after "
                f"400 batches of {batch / 1e6:.1f} MB, 2 {kind}",
                f"{max(0, grown) / 1e6:.1f}",
                max(0, grown) / 1e6,
                at_most=window / 1e6,
            )
        )
    return rows


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


# -- beside others ----------------------------------------------------------


def arrays(rounds: int) -> list[engine.Row]:
    """Batches per second from arrays: 64 floats and a label, 32 of them."""
    import keras
    import model
    import torch
    from keras.src.trainers.data_adapters.array_data_adapter import (
        ArrayDataAdapter,
    )
    from keras.src.trainers.data_adapters.py_dataset_adapter import (
        PyDatasetAdapter,
    )

    import legato

    x, y = model.make_data(engine.EXAMPLES)
    size = model.BATCH

    class Batches(keras.utils.PyDataset):
        def __init__(self) -> None:
            super().__init__()
            self.order = rng.permutation(len(x))

        def __len__(self) -> int:
            return len(x) // size

        def __getitem__(self, index: int) -> tuple:
            rows = self.order[index * size : (index + 1) * size]
            return x[rows], y[rows]

    import numpy as np

    rng = np.random.default_rng(0)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(
            torch.from_numpy(x), torch.from_numpy(y)
        ),
        batch_size=size,
        shuffle=True,
    )
    batches = PyDatasetAdapter(Batches())
    adapter = ArrayDataAdapter(x, y, batch_size=size, shuffle=True)
    pairs = [(row, label) for row, label in zip(x, y, strict=True)]
    in_memory = legato.ArraySource((x, y), size)
    staged = legato.ArraySource((x, y), size)
    staged._is_resident = False  # as arrays of more than 256 MB are
    examples = legato.RandomAccessSource(pairs, size)
    contestants = {
        "ArraySource (its indices)": chunks(in_memory, 1000),
        "ArraySource (rows, as of large data)": chunks(staged, 1000),
        "RandomAccessSource of examples": chunks(examples, 1000),
        "Keras, model.fit's arrays": loop(adapter.get_numpy_iterator, 1000),
        "Keras, PyDataset": loop(batches.get_numpy_iterator, 1000),
        "PyTorch, DataLoader": loop(lambda: loader, 1000),
    }
    times = engine.in_turns(contestants, rounds)
    rows, ours = "ArraySource (rows, as of large data)", list(times)[2]
    pairs = [(rows, name) for name in list(times)[3:]]
    return beside(times, [*pairs, (ours, "PyTorch, DataLoader")])


def images(rounds: int) -> list[engine.Row]:
    """Batches per second from a folder of JPEGs, 256 to 128 pixels, 32."""
    import data_samples
    import keras
    import numpy as np
    import torch
    from PIL import Image

    import legato

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for index in range(640):
            path = Path(folder, f"class_{index % 4}", f"{index}.jpg")
            path.parent.mkdir(exist_ok=True)
            rows = rng.integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(rows).resize((256, 256)).save(path, quality=90)
        data = legato.files.ImageFolder(folder, image_size=(128, 128))
        ours = {
            f"legato, ImageFolder, {kind}": chunks(
                legato.RandomAccessSource(data, 32, **arguments), 40, 4
            )
            for kind, arguments in {
                "no workers": {},
                "2 threads": {"workers": 2},
                "2 processes": {"workers": 2, "processes": True},
            }.items()
        }
        pictures = data_samples.Pictures(data.paths, data.labels, 128)
        theirs = torch.utils.data.DataLoader(
            pictures,
            batch_size=32,
            shuffle=True,
            num_workers=2,
            persistent_workers=True,
            multiprocessing_context="forkserver",
        )
        keras_data = keras.utils.image_dataset_from_directory(
            folder, image_size=(128, 128), batch_size=32, verbose=False
        )
        contestants = {
            **ours,
            "PyTorch, DataLoader, 2 processes": loop(lambda: theirs, 40),
            "Keras, image_dataset_from_directory": loop(
                keras_data.as_numpy_iterator, 40
            ),
        }
        for measure in contestants.values():
            measure()  # to start what is started, and fill caches
        times = engine.in_turns(contestants, rounds)
        # Pillow decodes without Python's lock.
        mine = "legato, ImageFolder, 2 threads"
        return beside(times, [(mine, name) for name in list(times)[3:]])


def chunks(
    source: Any, batches: int, capacity: int = 64
) -> Callable[[], float]:
    """Batches per second of a source, as training takes them."""
    iterator = source.iterate(seed=0, capacity=capacity)

    def measure() -> float:
        began, done = time.perf_counter(), 0
        while done < batches:
            done += iterator.next_chunk(capacity).num_batches
        return done / (time.perf_counter() - began)

    return measure


def loop(make: Callable[[], Iterable], batches: int) -> Callable[[], float]:
    """Batches per second of what is iterated over, again and again."""

    def endless() -> Iterable:
        while True:
            yield from make()

    def measure() -> float:
        began = time.perf_counter()
        for _ in itertools.islice(endless(), batches):
            pass
        return batches / (time.perf_counter() - began)

    return measure


def beside(
    times: engine.Times, pairs: list[tuple[str, str]]
) -> list[engine.Row]:
    """Rates, and ratios of some."""
    rows = [
        (f"batches/s, {name}", f"{statistics.median(each):,.0f}", "", "")
        for name, each in times.items()
    ]
    for above, below in pairs:
        value, text = engine.ratio(times, above, below)
        name = f"{above} / {below}"
        rows.append(engine.judged(name, text, value, at_least=1.0))
    return rows


SECTIONS = {
    "wait": wait,
    "resume": resume,
    "memory": memory,
    "arrays": arrays,
    "images": images,
}


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--write", action="store_true", help="keep the table in results/"
    )
    arguments = parser.parse_args()
    rows = [
        row
        for name in arguments.sections or SECTIONS
        for row in SECTIONS[name](arguments.rounds)
    ]
    engine.report("data", "How data come", rows, write=arguments.write)


if __name__ == "__main__":
    main()
