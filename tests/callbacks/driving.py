"""Drives callbacks through a made-up training that can be cut anywhere."""

import contextlib
import json
import math
import warnings

import keras
import numpy as np

from legato.callbacks import CallbackRunner

EPOCHS = 6
STEPS = 3
# Attributes that belong to one process: clocks, and whether a CSVLogger will
# still write a header (a resumed one knows already that it will not).
OF_THE_PROCESS = ("_batch_start_time", "_epoch_start_time", "append_header")
PARAMS = {"epochs": EPOCHS, "steps": STEPS, "verbose": 0}


def make_model():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD(0.5, use_ema=True)
    model.compile(optimizer, "mse", metrics=["accuracy"])
    optimizer.build(model.trainable_variables)
    for variable in variables_of(model):
        variable.assign(np.zeros(variable.shape))
    optimizer.learning_rate = 0.5
    return model


def variables_of(model):
    return [*model.variables, *model.optimizer.variables]


def values_of(model):
    return [
        np.array(keras.ops.convert_to_numpy(variable))
        for variable in variables_of(model)
    ]


def logs_of(epoch, batch=0):
    """Goes down, rests, goes up: something to react to."""
    loss = 1.0 + math.cos(epoch * 1.3 + batch * 0.01) / (epoch + 1)
    return {"loss": loss, "accuracy": 2.0 - loss}


def events():
    """What an engine calls, in order, with whether it may save after it."""
    for epoch in range(EPOCHS):
        yield "begin", epoch, 0, False
        for batch in range(STEPS):
            yield "batch", epoch, batch, batch < STEPS - 1
        yield "end", epoch, 0, True


def play(runner, model, event):
    kind, epoch, batch, _ = event
    if kind == "begin":
        runner.on_epoch_begin(epoch)
    elif kind == "batch":
        runner.on_train_batch_begin(batch)
        for i, variable in enumerate(model.trainable_variables):
            variable.assign(variable.value + i + epoch + 0.25 * batch)
        runner.on_train_batch_end(batch, logs_of(epoch, batch))
    else:
        logs = logs_of(epoch)
        runner.on_test_begin()
        runner.on_test_batch_begin(0)
        runner.on_test_batch_end(0, {"loss": 1.0})
        runner.on_test_end({"loss": logs["loss"] + 0.1})
        logs["val_loss"] = logs["loss"] + 0.1
        logs["val_accuracy"] = logs["accuracy"] - 0.1
        runner.on_epoch_end(epoch, logs)


def start(make, *, resuming, **kwargs):
    model = make_model()
    runner = CallbackRunner(make(model), model=model, params=PARAMS, **kwargs)
    runner.on_train_begin(resuming=resuming)
    return runner, model


def finish(runner, model, rest, *, cut=None, further=4):
    """Plays `rest`; a cut one goes on a little after its last checkpoint."""
    saved = None
    for number, event in enumerate(rest):
        if cut is not None and number > cut + further:
            break
        if model.stop_training:
            break
        play(runner, model, event)
        if number == cut:
            tree, arrays = runner.get_state()
            saved = json.dumps(tree), arrays, values_of(model)
            saved += (model.stop_training,)
    return saved


def outcome(runner, model):
    tree, arrays = runner.get_state()
    arrays = {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()
    }
    values = [value.tobytes() for value in values_of(model)]
    # Also what an adapter might have forgotten to save.
    arrays["attributes"] = [
        {
            name: value
            for name, value in vars(callback).items()
            if isinstance(value, bool | int | float | str)
            and name not in OF_THE_PROCESS
        }
        for callback in runner.callbacks
    ]
    return json.dumps(tree, indent=1), arrays, values, model.stop_training


def check_every_cut(make, files=lambda: None, *, start=start, **kwargs):
    """Cuts the training at each checkpoint: nothing may differ in the end.

    Args:
        make: makes new callbacks for a model.
        files: gives what the callbacks wrote.
    """
    whole = list(events())
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        runner, model = start(make, resuming=False, **kwargs)
        finish(runner, model, whole)
        expected = outcome(runner, model), files()
        runner.on_train_end({})
        expected_end = values_of(model), files()
        for cut in (i for i, event in enumerate(whole) if event[3]):
            runner, model = start(make, resuming=False, **kwargs)
            saved = finish(runner, model, whole, cut=cut)
            if saved is None:
                continue  # it stopped before
            tree, arrays, values, stop = saved
            runner, model = start(make, resuming=True, **kwargs)
            for variable, value in zip(
                variables_of(model), values, strict=True
            ):
                variable.assign(value)
            audit = runner.set_state(json.loads(tree), arrays)
            assert {entry.status for entry in audit} <= {"restored"}, audit
            model.stop_training = stop
            finish(runner, model, whole[cut + 1 :])
            assert (outcome(runner, model), files()) == expected, whole[cut]
            runner.on_train_end({})
            end = values_of(model), files()
            assert str(end) == str(expected_end)
    return runner
