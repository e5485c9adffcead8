"""Real processes that call `legato.fit`, kill themselves, and go on.

Children are forked from a server that has imported what is slow to import.
"""

import csv
import functools
import json
import os
import signal
import traceback
import warnings
from pathlib import Path

import keras
import numpy as np
from tests.processes import compiled_by, context, keep_compiled

EPOCHS = 4
STEPS = 5

callbacks = keras.callbacks


class Killer(keras.callbacks.Callback):
    """Kills its process after a step, as the last of the callbacks."""

    def __init__(self, hook, step):
        super().__init__()
        if hook is not None:
            setattr(self, hook, functools.partial(self._kill, step))

    def _kill(self, step, *args, **kwargs):
        if int(self.model.optimizer.iterations) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    # All of it is this process's.
    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def make_model():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, "relu", name="hidden"),
            keras.layers.Dropout(0.2, seed=3),
            keras.layers.Dense(1, name="out"),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9, use_ema=True),
        "mse",
        metrics=["mae"],
    )
    return model


def _run(out, scenario, hook, step, epochs, kwargs, compiled):
    keep_compiled(compiled)
    try:
        import legato.errors

        keras.utils.set_random_seed(7)
        x = np.linspace(-1, 1, 120, dtype="float32").reshape(40, 3)
        y = (x**2).sum(1, keepdims=True)
        model = make_model()
        made = SCENARIOS[scenario](out)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", legato.errors.ExactnessWarning)
            history = legato.fit(
                model,
                x,
                y,
                batch_size=8,
                epochs=epochs,
                verbose=0,
                validation_data=(x[:16], y[:16] + 0.1),
                callbacks=[*made, Killer(hook, step)],
                run_dir=out / "run",
                **{"checkpoint_interval": 3, **kwargs},
            )
        assert model.history is history
        result = {
            "history": history.history,
            "epoch": history.epoch,
            "weights": [
                keras.ops.convert_to_numpy(w).tobytes().hex()
                for w in model.weights
            ],
            "warnings": [str(w.message) for w in caught],
        }
        (out / "result.json").write_text(json.dumps(result))
    except BaseException:
        (out / "error.txt").write_text(traceback.format_exc())
        raise


def fit(out, scenario, *kills, epochs=EPOCHS, **kwargs):
    """Trains through kills, each `(hook, step)`, to the end; the result."""
    out.mkdir(parents=True, exist_ok=True)
    compiled = compiled_by("one")
    for hook, step in [*kills, (None, 0)]:
        process = context().Process(
            target=_run,
            args=(out, scenario, hook, step, epochs, kwargs, compiled),
        )
        process.start()
        process.join(200)
        if process.exitcode is None:
            process.kill()
        error = out / "error.txt"
        assert not error.exists(), error.read_text()
        expected = -signal.SIGKILL if hook else 0
        assert process.exitcode == expected, (hook, step)
    return json.loads((out / "result.json").read_text())


def read_events(directory: Path):
    """What the event files of a folder hold, in TensorBoard's order."""
    from tensorboard.backend.event_processing.event_file_loader import (
        EventFileLoader,
    )

    found = []
    for path in sorted(directory.glob("*tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                data = value.tensor.SerializeToString()
                if "steps_per_second" in value.tag:
                    data = b""  # is of the clock
                found.append((value.tag, event.step, data))
    return found


def boards(out):
    """One that writes all there is, beside two that share a directory."""
    return [
        callbacks.TensorBoard(
            out / "logs",
            histogram_freq=2,
            update_freq=5,  # Keras writes nothing at other steps
            write_images=True,
            write_steps_per_second=True,
        ),
        callbacks.TensorBoard(out / "logs2"),
        callbacks.TensorBoard(out / "logs2", write_graph=False),
        callbacks.ReduceLROnPlateau(patience=1, factor=0.5, min_delta=1.0),
    ]


def files(out):
    """All that write files, or react to what others do."""
    old = out / "old.csv"
    if not old.exists():
        old.write_text("epoch,loss\r\n0,9.5\r\n", newline="")
    return [
        callbacks.CSVLogger(out / "new.csv"),
        callbacks.CSVLogger(old, append=True),
        callbacks.CSVLogger(out / "begun.csv", append=True),
        callbacks.ModelCheckpoint(out / "best.keras", save_best_only=True),
        callbacks.ModelCheckpoint(
            out / "{epoch}-{batch}.weights.h5",
            save_weights_only=True,
            save_freq=4,
        ),
        callbacks.TerminateOnNaN(),
    ]


def rates(out):
    calls = 0

    def schedule(epoch, rate):
        nonlocal calls
        calls += 1
        return rate * (0.5 if calls == 3 else 1.0)

    seen = []

    def on_epoch_end(epoch, logs):
        seen.append(epoch)
        logs["seen"] = float(len(seen))

    return [
        callbacks.LearningRateScheduler(schedule),
        callbacks.SwapEMAWeights(),
        callbacks.LambdaCallback(on_epoch_end=on_epoch_end),
        callbacks.EarlyStopping(
            "val_loss", patience=2, restore_best_weights=True, min_delta=9.0
        ),
        callbacks.ReduceLROnPlateau(
            "loss", patience=1, min_delta=9.0, cooldown=1, min_lr=0.02
        ),
    ]


def swaps(out):
    return [
        callbacks.SwapEMAWeights(swap_on_epoch=True),
        callbacks.CSVLogger(out / "new.csv"),
    ]


def batches(out):
    return [callbacks.TensorBoard(out / "logs", update_freq="batch")]


SCENARIOS = {
    function.__name__: function
    for function in (boards, files, rates, swaps, batches)
}


def rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))
