"""How fast the engine is: steps, checkpoints, the start of a process.

Every figure is a ratio of things measured in turns (A B A B) in one session,
and the median of these: on a busy machine a time alone says little.

    KERAS_BACKEND=torch python benchmarks/engine.py [PART ...]

The parts are `speed`, `checkpoint`, `start` and `imports`.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "start"))

PACKAGES = {
    "jax": (("JAX", "jax"), ("Optax", "optax")),
    "tensorflow": (("TensorFlow", "tensorflow-cpu"),),
    "torch": (("PyTorch", "torch"),),
}

Row = tuple[str, str, str, str]
Times = dict[str, list[float]]

EXAMPLES = 32 * 1024
EPOCHS = 5  # of 1024 steps; the first one compiles and is not counted
START_EXAMPLES = 1797
# Eager steps take long to get there.
RESUME_AT = 10_000 if os.environ["KERAS_BACKEND"] == "torch" else 100_000
BEST_STEPS_PER_EXECUTION = (8, 32, 128)

TARGETS = {
    "jax": {"by hand": 2, "fit": 4},
    "tensorflow": {"fit": 6, "fit at its best": 2.5},
    "torch": {"fit": 2.5},
}
"""How many times as fast as these legato should be, by backend."""


def in_turns(contestants: dict[str, Callable[[], float]], rounds: int) -> Times:
    """Measures each in turn, round after round."""
    times: Times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, measure in contestants.items():
            times[name].append(measure())
    return times


def ratio(times: Times, above: str, below: str) -> tuple[float, str]:
    """Median of the rounds' ratios, and their range as text."""
    ratios = [a / b for a, b in zip(times[above], times[below], strict=True)]
    middle = statistics.median(ratios)
    return middle, f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


# -- steps per second -------------------------------------------------------


def speed(rounds: int) -> list[Row]:
    """Steps per second, in steady state, with all that goes with training."""
    backend = keras_backend()
    contestants = {"legato": legato_speed(), "fit": fit_speed(1)}
    several = []
    if backend == "jax":
        contestants["by hand"] = by_hand_speed()
    if backend != "jax":  # which compiles always
        contestants["legato, not compiled"] = legato_speed(torch_compile=False)
    if backend != "torch":  # on which fit takes one step at a time
        for steps in BEST_STEPS_PER_EXECUTION:
            several.append(f"fit, {steps} steps per execution")
            contestants[several[-1]] = fit_speed(steps)
    for measure in contestants.values():
        measure()  # to warm up
    times = in_turns(contestants, rounds)
    rates = {name: statistics.median(each) for name, each in times.items()}
    rows = [
        (f"steps/s, {name}", f"{rate:,.0f}", "", "")
        for name, rate in rates.items()
    ]
    if several:
        times["fit at its best"] = times[max(several, key=rates.__getitem__)]
    for other in times:
        if other not in ("legato", *several):
            value, text = ratio(times, "legato", other)
            target = TARGETS[backend].get(other)
            rows.append(
                judged(f"legato / {other}", text, value, at_least=target)
            )
    return rows


def keras_backend() -> str:
    """The backend that is measured."""
    import keras

    return keras.config.backend()


def epoch_timer() -> tuple[object, Callable[[], float]]:
    """A callback, and the steps per second of all epochs but the first."""
    import keras

    class Timer(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.ends = []

        def on_epoch_end(self, epoch, logs=None):
            self.ends.append(time.perf_counter())

    timer = Timer()

    def rate() -> float:
        steps = (len(timer.ends) - 1) * EXAMPLES // 32
        return steps / (timer.ends[-1] - timer.ends[0])

    return timer, rate


def legato_speed(torch_compile: bool = True) -> Callable[[], float]:
    """The Trainer as it comes: summaries, and a checkpoint each epoch."""
    import keras
    import model

    import legato

    data = model.make_data(EXAMPLES)

    class Mlp(legato.Task):
        def __init__(self):
            self.cross_entropy = model.build_loss()

        def build_model(self):
            return model.build_model()

        def build_optimizer(self):
            return keras.optimizers.Adam(model.LEARNING_RATE)

        def build_inputs(self, split):
            if split != "train":
                return None
            return legato.ArraySource(data, batch_size=model.BATCH)

        def build_losses(self, labels, model_outputs, aux_losses=None):
            return self.cross_entropy(labels, model_outputs)

        def build_metrics(self, training):
            return model.build_metrics()

    def measure() -> float:
        timer, rate = epoch_timer()
        with tempfile.TemporaryDirectory() as run_dir:
            legato.Trainer(
                Mlp(),
                run_dir=run_dir,
                config=legato.TrainerConfig(
                    epochs=EPOCHS,
                    progress="none",
                    torch_compile=torch_compile,
                ),
                callbacks=[timer],
            ).train()
        return rate()

    return measure


def fit_speed(steps_per_execution: int) -> Callable[[], float]:
    """`model.fit`."""
    import keras
    import model

    features, labels = model.make_data(EXAMPLES)
    fitted = model.build_model()
    fitted.compile(
        optimizer=keras.optimizers.Adam(model.LEARNING_RATE),
        loss=model.build_loss(),
        metrics=model.build_metrics(),
        steps_per_execution=steps_per_execution,
    )

    def measure() -> float:
        timer, rate = epoch_timer()
        fitted.fit(
            features,
            labels,
            batch_size=model.BATCH,
            epochs=3 if steps_per_execution == 1 else EPOCHS,
            verbose=0,
            callbacks=[timer],
        )
        return rate()

    return measure


def by_hand_speed() -> Callable[[], float]:
    """The same step by hand: one donated `jax.jit` call for each batch."""
    import jax
    import jax.numpy as jnp
    import model
    import numpy as np
    import optax

    features, labels = model.make_data(EXAMPLES)
    optimizer = optax.adam(model.LEARNING_RATE)

    def initial() -> dict:
        key = jax.random.key(0)
        params = {}
        for name, rows, columns in (("hidden", 64, 64), ("out", 64, 10)):
            key, used = jax.random.split(key)
            params[name] = {
                "kernel": jax.nn.initializers.glorot_uniform()(
                    used, (rows, columns)
                ),
                "bias": jnp.zeros(columns),
            }
        return {
            "params": params,
            "optimizer": optimizer.init(params),
            "key": key,
            "loss": jnp.zeros(()),
            "correct": jnp.zeros(()),
            "top3": jnp.zeros(()),
            "examples": jnp.zeros(()),
        }

    def loss_of(params, x, y, key):
        hidden = x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
        hidden = jax.nn.relu(hidden)
        kept = jax.random.bernoulli(key, 1 - model.RATE, hidden.shape)
        hidden = jnp.where(kept, hidden / (1 - model.RATE), 0)
        logits = hidden @ params["out"]["kernel"] + params["out"]["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), logits

    @jax.jit(donate_argnums=0)
    def step(state, x, y):
        key, used = jax.random.split(state["key"])
        (loss, logits), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state["params"], x, y, used
        )
        updates, optimizer_state = optimizer.update(
            gradients, state["optimizer"], state["params"]
        )
        _, best3 = jax.lax.top_k(logits, 3)
        return {
            "params": optax.apply_updates(state["params"], updates),
            "optimizer": optimizer_state,
            "key": key,
            "loss": state["loss"] + loss * len(y),
            "correct": state["correct"] + (logits.argmax(-1) == y).sum(),
            "top3": state["top3"] + (best3 == y[:, None]).any(-1).sum(),
            "examples": state["examples"] + len(y),
        }

    def measure() -> float:
        rng = np.random.default_rng(0)
        state = initial()
        ends = []
        for _ in range(EPOCHS):
            order = rng.permutation(EXAMPLES)
            x, y = features[order], labels[order]
            for first in range(0, EXAMPLES, model.BATCH):
                batch = slice(first, first + model.BATCH)
                state = step(state, x[batch], y[batch])
            for name in ("loss", "correct", "top3", "examples"):
                float(state[name])
                state[name] = jnp.zeros(())
            ends.append(time.perf_counter())
        return (EPOCHS - 1) * EXAMPLES / model.BATCH / (ends[-1] - ends[0])

    return measure


# -- checkpoints ------------------------------------------------------------


def checkpoint(saves: int) -> list[Row]:
    """What the training thread pays for a checkpoint of 100 MB."""
    import keras
    import numpy as np

    from legato import backends
    from legato.checkpoint import CheckpointStore

    # 24 arrays, as a network of 8 layers with Adam has.
    variables = [
        keras.Variable(np.full((1024, 1017), i, "float32")) for i in range(24)
    ]
    size = sum(np.prod(v.shape) * 4 for v in variables)
    megabytes = size / 1e6
    backend = backends.current()
    blocked = []
    with tempfile.TemporaryDirectory() as run_dir:
        store = CheckpointStore(Path(run_dir), run_id="0" * 32)
        for step in range(saves):
            # New arrays each time, as after training: nothing is cached.
            for variable in variables:
                variable.assign_add(keras.ops.ones(()))
                float(variable[0, 0])  # waits
            began = time.perf_counter()
            arrays = backend.read(variables)
            store.save(
                step,
                {f"v{i}": array for i, array in enumerate(arrays)},
                {"step": step},
            )
            blocked.append(1e3 * (time.perf_counter() - began))
            del arrays
            store.wait()
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    copies = []
    for _ in range(saves):
        began = time.perf_counter()
        np.copyto(target, source)
        copies.append(1e3 * (time.perf_counter() - began))
    later = statistics.median(blocked[1:])
    shown = f"{later:.1f} ms ({min(blocked[1:]):.1f} to {max(blocked[1:]):.1f})"
    return [
        (f"first save of {megabytes:.0f} MB blocks", f"{blocked[0]:.1f} ms",
         "", ""),
        judged("each later one blocks", shown, later, at_most=15),
        ("a bare copy of as many bytes",
         f"{statistics.median(copies):.1f} ms", "", ""),
    ]  # fmt: skip


# -- the start of a process -------------------------------------------------


def start(rounds: int) -> list[Row]:
    """From the start of a process to its first completed step."""
    with tempfile.TemporaryDirectory() as directory:
        resumed, fresh_run = (Path(directory, n) for n in ("resumed", "fresh"))
        # What is kept of a process that was there before is part of resuming.
        kept, no_cache = (Path(directory, n) for n in ("kept", "no-cache"))
        examples, steps = str(START_EXAMPLES), str(RESUME_AT)
        run_script("with_legato.py", examples, str(resumed), steps, cache=kept)

        def fresh() -> float:
            for folder in (fresh_run, no_cache):
                shutil.rmtree(folder, ignore_errors=True)
            return until_first_step(
                "with_legato.py",
                examples,
                str(fresh_run),
                steps,
                "first",
                cache=no_cache,
            )

        contestants = {
            "bare Keras": lambda: until_first_step("bare_keras.py", examples),
            "legato": fresh,
            f"legato, resumed at {RESUME_AT:,}": lambda: until_first_step(
                "with_legato.py",
                examples,
                str(resumed),
                str(2 * RESUME_AT),
                "first",
                cache=kept,
            ),
        }
        in_turns(contestants, 1)  # to warm up
        times = in_turns(contestants, rounds)
    rows = [
        (f"start, {name}", f"{statistics.median(each):.2f} s", "", "")
        for name, each in times.items()
    ]
    for name in list(times)[1:]:
        value, text = ratio(times, name, "bare Keras")
        rows.append(judged(f"{name} / bare Keras", text, value, at_most=1.1))
    value, text = ratio(times, list(times)[2], "legato")
    rows.append(judged("resumed / begun", text, value, at_most=0.7))
    return rows


def imports(rounds: int) -> list[Row]:
    """What importing legato takes, and its help."""
    python = [sys.executable, "-c"]
    command = "from legato.cli import main; main(['--help'])"
    times = in_turns(
        {
            "import keras": lambda: seconds_of(*python, "import keras"),
            "import keras, legato": lambda: seconds_of(
                *python, "import keras, legato"
            ),
            "legato --help": lambda: seconds_of(*python, command),
        },
        rounds,
    )
    added = sorted(
        a - b
        for a, b in zip(
            times["import keras, legato"], times["import keras"], strict=True
        )
    )
    middle = statistics.median(added)
    shown = f"{middle:.2f} s ({added[0]:.2f} to {added[-1]:.2f})"
    each = {name: statistics.median(taken) for name, taken in times.items()}
    taken = each["legato --help"]
    return [
        ("import keras", f"{each['import keras']:.2f} s", "", ""),
        judged("import legato adds to it", shown, middle, at_most=0.15),
        judged("legato --help", f"{taken:.2f} s", taken, at_most=0.3),
    ]


def seconds_of(*command: str) -> float:
    """How long a command takes."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    return time.perf_counter() - began


def run_script(name: str, *arguments: str, cache: Path | None = None) -> str:
    """Runs a script of `start/` and returns what it printed."""
    command = [sys.executable, str(HERE / "start" / name), *arguments]
    # Compiled once, as installed packages are.
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    if cache is not None:
        env["XDG_CACHE_HOME"] = str(cache)
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=env
    ).stdout


def until_first_step(
    name: str, *arguments: str, cache: Path | None = None
) -> float:
    """Seconds from the start of a script to its first step."""
    began = time.monotonic()  # the same clock in all processes
    return float(run_script(name, *arguments, cache=cache)) - began


# -- the report -------------------------------------------------------------


def judged(
    name: str,
    text: str,
    value: float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """A row with its target."""
    if at_least is not None:
        target, met = f"at least {at_least:g}", value >= at_least
    elif at_most is not None:
        target, met = f"at most {at_most:g}", value <= at_most
    else:
        return name, text, "", ""
    return name, text, target, "yes" if met else "NO"


def as_table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    rows = [("figure", "measured", "target", "met"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True))
        + " |"
        for r in rows
    ]  # fmt: skip
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def report(
    name: str,
    what: str,
    rows: list[Row],
    *,
    write: bool,
    spread: str = "the range over the rounds",
) -> None:
    """Prints the rows, and keeps them in `results/` if asked to.

    Those of the same day that are not among them stay.
    """
    backend = keras_backend()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(package)}"
        for name, package in (("Keras", "keras"), *PACKAGES[backend])
    )
    machine = f"{len(os.sched_getaffinity(0))} CPUs ({platform.machine()})"
    text = (
        f"{what}; {machine}, Python {platform.python_version()}, "
        f"{versions}.\n\nMedians; in brackets {spread}.\n\n"
    )
    print(f"{text}{as_table(rows)}")
    if write:
        today = datetime.date.today().isoformat()
        path = HERE / "results" / f"{today}-{name}-{backend}.md"
        path.parent.mkdir(exist_ok=True)
        new = {row[0] for row in rows}
        kept = [row for row in _rows_in(path) if row[0] not in new]
        table = as_table([*kept, *rows])
        path.write_text(f"# {name} on {backend}, {today}\n\n{text}{table}\n")


def _rows_in(path: Path) -> list[Row]:
    """Those of a table that was written before."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        if line.startswith("| "):
            a, b, c, d = (cell.strip() for cell in line[2:-2].split(" | "))
            found.append((a, b, c, d))
    return found[1:]


def main() -> None:
    """Measures what is asked for, and prints a table."""
    parts = {"speed": (speed, 7), "checkpoint": (checkpoint, 10),
             "start": (start, 9), "imports": (imports, 9)}  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}")
    parser.add_argument("--rounds", type=int, help="instead of the usual")
    parser.add_argument(
        "--write", action="store_true", help="keep the table in results/"
    )
    arguments = parser.parse_args()
    for name in arguments.parts:
        if name not in parts:
            parser.error(f"{name!r} is none of {', '.join(parts)}")
    rows: list[Row] = []
    for name in arguments.parts or parts:
        measure, rounds = parts[name]
        rows += measure(arguments.rounds or rounds)
    report(
        "engine",
        "MLP 64-64-10, batch 32, Adam, dropout, two metrics",
        rows,
        write=arguments.write,
    )


if __name__ == "__main__":
    main()
