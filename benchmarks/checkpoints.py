"""What saving costs: steps while it goes on, and memory.

    KERAS_BACKEND=torch python benchmarks/checkpoints.py [speed|memory ...]
        [--rounds N] [--write]

Of a model whose state is 100 MB: its steps with a checkpoint every 100 steps
beside those without any, in turns, with batches that make a step of 20 ms; and
how much memory processes took at most, with legato and with `keras.Model.fit`.
"""

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engine  # chooses the backend, and finds the models

sys.path.insert(0, str(Path(__file__).parent / "speed"))

EVERY = 100
STEPS = 2 * EVERY  # of a turn
NEVER = 10**9
STEP_SECS = 0.02


def contestant(name: str, interval: int, batch_size: int, steps: int = STEPS):
    """Trains with a checkpoint every so many steps."""
    import keras
    import large
    from turns import Contestant, EpochEnd

    import legato

    def train(epoch_end: EpochEnd) -> None:
        class Watch(keras.callbacks.Callback):
            def get_state(self):
                return {}

            def set_state(self, state):
                pass

            def on_epoch_end(self, epoch, logs=None):
                self.model.stop_training = not epoch_end(logs["loss"])

        network = large.compiled(large.build_model())
        with tempfile.TemporaryDirectory() as run_dir:
            legato.fit(
                network,
                *large.make_data(steps, batch_size),
                batch_size=batch_size,
                epochs=10_000,
                shuffle=False,
                verbose=0,
                callbacks=[Watch()],
                run_dir=run_dir,
                checkpoint_interval=interval,
            )

    return Contestant(name, train, steps)


def batch_size() -> int:
    """That of which a step takes about `STEP_SECS` here."""
    sizes, seconds = (8, 64), []
    for size in sizes:
        trial = contestant("trial", NEVER, size, steps=30)
        seconds.append(1 / max(trial.turn(0) for _ in range(4)))
        trial.end()
    (small, large), (least, most) = sizes, seconds
    per_example = (most - least) / (large - small)
    return max(1, round(small + (STEP_SECS - least) / per_example))


def speed(rounds: int) -> list[engine.Row]:
    """Steps per second with checkpoints beside those without."""
    size = batch_size()
    both = [
        contestant("saving", EVERY, size),
        contestant("not saving", NEVER, size),
    ]
    for each in both:
        each.turn(0)  # compiles
        each.turn(0)
    times = engine.in_turns(
        {each.name: lambda each=each: each.turn(0) for each in both}, rounds
    )
    for each in both:
        each.end()
    value, text = engine.ratio(times, "saving", "not saving")
    milliseconds = sorted(1e3 / rate for rate in times["not saving"])
    return [
        ("a step without",
         f"{milliseconds[len(milliseconds) // 2]:.1f} ms, {size} examples",
         "", ""),
        engine.judged(
            f"steps/s with a checkpoint of 100 MB every {EVERY} / without",
            text, value, at_least=0.97,
        ),
    ]  # fmt: skip


def memory(rounds: int) -> list[engine.Row]:
    """The most memory of processes, in turns."""
    ways = {
        "fit, MLP": ("fit", "mlp"),
        "legato, MLP": ("legato", "mlp"),
        "fit": ("fit", "large"),
        "legato, not saving": ("legato", "large", str(NEVER)),
        "legato, saving every 20": ("legato", "large", "20"),
    }
    peaks = engine.in_turns(
        {
            name: lambda arguments=arguments: float(
                engine.run_script("large.py", *arguments)
            )
            for name, arguments in ways.items()
        },
        min(rounds, 3),
    )
    rows = [
        (f"memory, {name}", f"{sorted(each)[len(each) // 2]:,.0f} MB", "", "")
        for name, each in peaks.items()
    ]
    for above, below in (
        ("legato, MLP", "fit, MLP"),
        ("legato, not saving", "fit"),
        ("legato, saving every 20", "fit"),
    ):
        _, text = engine.ratio(peaks, above, below)
        rows.append((f"memory, {above} / {below}", text, "", ""))
    pairs = zip(
        peaks["legato, saving every 20"],
        peaks["legato, not saving"],
        strict=True,
    )
    copies = sorted((a - b) / 100 for a, b in pairs)
    middle = copies[len(copies) // 2]
    shown = f"{middle:.2f} ({copies[0]:.2f} to {copies[-1]:.2f})"
    rows.append(
        engine.judged(
            "copies of the state while saving", shown, middle, at_most=1.1
        )
    )
    return rows


def main() -> None:
    """Measures what is asked for, and prints a table."""
    parts = {"speed": speed, "memory": memory}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--write", action="store_true", help="keep the table in results/"
    )
    arguments = parser.parse_args()
    for name in arguments.parts:
        if name not in parts:
            parser.error(f"{name!r} is none of {', '.join(parts)}")
    rows: list[engine.Row] = []
    for name in arguments.parts or parts:
        rows += parts[name](arguments.rounds)
    engine.report(
        "checkpoints",
        "A dense network of 8.3 million weights, Adam: a state of 100 MB "
        "(memory: batch 16); MLP 64-64-10, batch 32",
        rows,
        write=arguments.write,
    )


if __name__ == "__main__":
    # Not in the main thread: all that train would take the signals there.
    ThreadPoolExecutor(1).submit(main).result()
