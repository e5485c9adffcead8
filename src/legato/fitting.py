"""`legato.fit`: what `keras.Model.fit` does, in runs that can be killed."""

import contextlib
import dataclasses
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from legato.callbacks import CallbackRunner
from legato.checkpoint import Checkpoint, find_checkpoint
from legato.compat import keras_models
from legato.compiled import CompiledTask, TrainMetrics, ValidationMetrics
from legato.config import MAX_SHAPES, TrainerConfig
from legato.data import DataSource, fit_source, split_validation
from legato.data.fitting import check_number
from legato.errors import ConfigError, DataError
from legato.evaluation import Evaluator
from legato.restoring import assign_arrays, averaged, check_weights, kept
from legato.state import variable_paths
from legato.trainer import Trainer

Verbose = Literal["auto", 0, 1, 2]


def fit(
    model: keras.Model,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    epochs: int = 1,
    verbose: Verbose | str | int = "auto",
    callbacks: Any = None,
    validation_split: float = 0.0,
    validation_data: Any = None,
    shuffle: bool | Literal["batch"] = True,
    class_weight: Mapping[int, float] | None = None,
    sample_weight: Any = None,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: int | Sequence[int] = 1,
    *,
    run_dir: str | os.PathLike[str],
    checkpoint_interval: int | str = "epoch",
    keep_last: int | None = 3,
    train_metrics: TrainMetrics = "compiled",
    validation_metrics: ValidationMetrics = "compiled",
    check_numerics: bool = False,
    max_batch_shapes: int = MAX_SHAPES,
    exact: Literal["strict", "warn", "off"] = "warn",
    resume: Literal["auto", "must", "never", "override"] = "auto",
) -> keras.callbacks.History:
    """Train a compiled model; killed at any instant, the same call goes on.

    The arguments up to `validation_freq` are those of `keras.Model.fit`
    (Keras 3.15), in the same order and with the same meaning, but for these:

    - The order of shuffled arrays is legato's own (drawn, as Keras's, from
      what `keras.utils.set_random_seed` seeds).
    - With `steps_per_epoch`, data that end in the middle of an epoch begin
      anew there; Keras ends the epoch with a warning.
    - A generator for validation is measured by the same batches each time;
      Keras goes on in it.
    - `verbose` 1 shows a bar, and 2 shows plain lines.

    Of what the model was compiled with, `run_eagerly` and
    `steps_per_execution` change nothing; `jit_compile=True` compiles steps
    where that is a choice (`TrainerConfig.torch_compile`).

    Args:
        model: a compiled model; it is built by the first batch if need be.
        x: the features, or all data: see `legato.data.fit_source`.
        y: the targets.
        batch_size: examples in a batch, for arrays; 32 by default.
        epochs: the number of the epoch to stop before; more than in the run
            so far extend it.
        verbose: "auto" or 1, 0 for nothing, 2 for plain lines.
        callbacks: Keras callbacks; their state is saved and restored.
        validation_split: part of the arrays that is kept for validation.
        validation_data: `(x, y)`, `(x, y, sample_weight)`, or a data set. Of
            a generator the first `validation_steps` batches are kept in
            memory, and measured each time.
        shuffle: whether arrays are visited in a new order in each epoch.
        class_weight: class -> weight of its examples in the loss.
        sample_weight: weights of the examples.
        initial_epoch: the number (from 0) of the run's first epoch.
        steps_per_epoch: steps in an epoch; None for a pass over the data.
        validation_steps: batches in a validation; None for all.
        validation_batch_size: `batch_size` by default.
        validation_freq: epochs between validations, or a list of the epochs
            (from 1) to validate after.
        run_dir: where everything is written; a run that is there goes on.
        checkpoint_interval: steps between checkpoints, or "epoch", or a
            duration such as "10min".
        keep_last: how many of the newest checkpoints are kept; None for all.
        train_metrics: "compiled" computes those that the model was compiled
            with, at each step; `legato.Every(50)` or `legato.Sample(0.02)`
            computes them at some steps; a list of metrics, as `compile` takes
            it, or a dict `{metric: legato.Every(50)}` takes others (or 50, or
            what else `TrainerConfig.train_metrics` takes); None leaves all
            out of the compiled step. The loss is always measured.
        validation_metrics: "compiled", a list of metrics, or None.
        check_numerics: look at every batch before it is used, for NaN,
            infinities and labels out of range, and name the example. (Labels
            in arrays are looked at in any case.)
        max_batch_shapes: for how many shapes of batches steps may be compiled.
        exact: what to do about something that keeps resuming from being
            exact: refuse ("strict"), warn once ("warn"), or nothing ("off").
        resume: "auto" resumes if there is something to resume, "must" refuses
            to start anew, "never" refuses a used directory, and "override"
            resumes with this program's optimizer and loss where they differ.

    Returns:
        The history of the whole run, over all resumes; also `model.history`.

    Raises:
        ConfigError: an argument is wrong, or does not fit the model.
        DataError: the data are wrong.
        Others: see `legato.Trainer.train`.
    """
    _require_compiled(model)
    _check_epochs(epochs, initial_epoch)
    if validation_split and validation_data is None:
        (x, y, sample_weight), validation_data = split_validation(
            x, y, sample_weight, validation_split
        )
    train = fit_source(
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        shuffle=shuffle,
        class_weight=class_weight,
        steps_per_epoch=steps_per_epoch,
    )
    check_number("validation_batch_size", validation_batch_size)
    validation = _validation_source(
        validation_data,
        validation_batch_size or batch_size,
        validation_steps,
        keep=True,
    )
    if validation is None and validation_metrics not in ("compiled", None):
        raise ConfigError(
            f"validation_metrics={validation_metrics!r} and no validation "
            "data: give validation_data or validation_split."
        )
    config = TrainerConfig(
        epochs=epochs,
        initial_epoch=initial_epoch,
        steps_per_epoch=steps_per_epoch,
        validation_interval="epoch" if validation is not None else None,
        validation_freq=_as_freq(validation_freq),
        validation_steps=validation_steps,
        checkpoint_interval=checkpoint_interval,
        keep_last=keep_last,
        check_numerics=check_numerics,
        max_batch_shapes=max_batch_shapes,
        exact=exact,
        resume=resume,
        # As in Keras: a NaN is TerminateOnNaN's to act upon.
        nonfinite_loss="warn",
        torch_compile=keras_models.asks_for_compiling(model) or "auto",
        progress=_progress(verbose),
    )
    task = CompiledTask(
        model,
        train,
        validation,
        train_metrics=train_metrics,
        validation_metrics=validation_metrics,
        # Drawn, not looked at: a second `fit` has another order. A resumed
        # run takes what it began with.
        order_seed=random.getrandbits(62),
    )
    trainer = Trainer(task, run_dir=run_dir, config=config, callbacks=callbacks)
    with _metrics_kept(model):
        return trainer.train()


def evaluate(
    model: keras.Model,
    data: Any,
    *,
    metrics: ValidationMetrics = "compiled",
    checkpoint: str | os.PathLike[str] | None = None,
    which: str | int | None = None,
    weights: Literal["model", "average"] = "model",
    batch_size: int | None = None,
    steps: int | None = None,
    callbacks: Any = None,
) -> dict[str, Any]:
    """Measure a model, with any metrics, at any checkpoint of a run.

    Args:
        model: a model; compiled, if its loss is wanted.
        data: `(x, y)`, `(x, y, sample_weight)`, or a data set.
        metrics: "compiled", or a list as `compile` takes it: also metrics
            that training never computed.
        checkpoint: a run directory, or that of one of its checkpoints, whose
            weights are measured; the model has its own back afterwards. None
            measures the model as it is.
        which: in a run directory: "latest" (the default), "best", or the
            number of a step.
        weights: "average" measures the averages that the optimizer keeps
            (`use_ema=True`), of the checkpoint or of the model as it is.
        batch_size: examples in a batch, for arrays; 32 by default.
        steps: batches to measure; None for all.
        callbacks: Keras callbacks; their `on_test_*` hooks are called.

    Returns:
        The loss and the metrics, by name: floats. Host metrics may return
        groups of them too, as dicts, and images, texts or figures.

    Raises:
        ConfigError: the arguments do not go together, or the model's optimizer
            keeps no averages.
        DataError: the data are wrong.
        CheckpointError: there is no such checkpoint, it is damaged, or holds
            no averages.
        RestoreError: the checkpoint does not fit the model.
    """
    if not isinstance(model, keras.Model):
        raise ConfigError(f"model={model!r:.80}: it must be a keras.Model.")
    if not model.compiled and metrics in ("compiled", None):
        raise ConfigError(
            f"metrics={metrics!r} and the model is not compiled: there is "
            "nothing to measure. Give metrics=[...], or compile the model."
        )
    check_weights(weights)
    source = _validation_source(
        data, batch_size, steps, name="data", steps_name="steps"
    )
    if source is None:
        raise ConfigError("data=None: give the data to measure the model on.")
    task = CompiledTask(
        model,
        source,
        source,
        train_metrics="compiled",
        validation_metrics=metrics,
    )
    evaluator = Evaluator(
        task,
        model,
        source,
        list(task.build_metrics(training=False)),
        seed=0,
        max_batches=steps,
    )
    hooks = CallbackRunner(callbacks or [], model=model, params={})
    found = None
    if checkpoint is not None:
        found = find_checkpoint(checkpoint, which)
    with contextlib.ExitStack() as stack:
        if found is not None:
            stack.enter_context(kept(model.weights))
            _load_weights(model, found)
        stack.enter_context(averaged(weights, model, model.optimizer, found))
        logs = evaluator(hooks, lambda: False)
    assert logs is not None  # nothing asks it to stop
    return logs


def _load_weights(model: keras.Model, checkpoint: Checkpoint) -> None:
    """Not the seeds: backends differ in their type, and nothing draws."""
    named = variable_paths({"model": model})
    weights = {id(variable) for variable in model.weights}
    chosen = {path: v for path, v in named.items() if id(v) in weights}
    arrays = {
        path: array
        for path, array in checkpoint.arrays.items()
        if path in chosen or (path.startswith("model/") and path not in named)
    }
    assign_arrays(chosen, dataclasses.replace(checkpoint, arrays=arrays))


def _require_compiled(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise ConfigError(
            f"model={model!r:.80}: it must be a keras.Model. (For a Task, use "
            "legato.Trainer.)"
        )
    if not model.compiled or model.optimizer is None:
        raise ConfigError(
            f"The model {model.name!r} is not compiled: call "
            'model.compile(optimizer="adam", loss=...) before legato.fit.'
        )


def _check_epochs(epochs: Any, initial_epoch: Any) -> None:
    for name, value, least in (
        ("epochs", epochs, 1),
        ("initial_epoch", initial_epoch, 0),
    ):
        whole = isinstance(value, int | np.integer)
        if isinstance(value, bool) or not whole or value < least:
            raise ConfigError(
                f"{name}={value!r}: it must be a whole number of at least "
                f"{least}."
            )


def _validation_source(
    data: Any,
    batch_size: int | None,
    steps: int | None,
    *,
    name: str = "validation_data",
    steps_name: str = "validation_steps",
    keep: bool = False,
) -> DataSource | None:
    if data is None:
        return None
    if isinstance(data, list | tuple) and not 1 <= len(data) <= 3:
        raise DataError(
            f"{name} is a {type(data).__name__} of {len(data)}: it must be "
            "(x,), (x, y) or (x, y, sample_weight), or a data set. Put several "
            "inputs into a tuple or a dict of their own."
        )
    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    of_arrays = y is not None or keras.tree.is_nested(x) or hasattr(x, "shape")
    return fit_source(
        x,
        y,
        weight,
        batch_size=batch_size if of_arrays else None,
        steps_per_epoch=None if of_arrays else steps,
        name=name,
        steps_name=steps_name,
        keep=keep,
    )


def _as_freq(freq: Any) -> Any:
    return freq if isinstance(freq, int | np.integer) else list(freq)


def _progress(verbose: Any) -> Any:
    shown = {"auto": "auto", 0: "none", 1: "auto", 2: "plain"}
    if verbose not in shown:
        raise ConfigError(
            f'verbose={verbose!r}: it must be "auto", 0 (nothing), 1 (a bar) '
            "or 2 (plain lines)."
        )
    return shown[verbose]


@contextlib.contextmanager
def _metrics_kept(model: Any) -> Iterator[None]:
    """While active: `model.evaluate` leaves the metrics of training alone.

    It has no others, and a hook may call it in the middle of an epoch.
    """
    evaluate = model.evaluate

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with kept(model.metrics_variables):
            return evaluate(*args, **kwargs)

    # (Keras's own `__setattr__` looks for variables in what it is given.)
    object.__setattr__(model, "evaluate", wrapped)
    try:
        yield
    finally:
        object.__delattr__(model, "evaluate")
