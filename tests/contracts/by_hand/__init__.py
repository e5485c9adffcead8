"""The steps of the scenarios written by hand, on the backend that runs.

Nothing of legato's is in here but the tasks themselves, for their models,
optimizers and numbers.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from tests.contracts.by_hand.step import Step

_steps = importlib.import_module(f"{__name__}.{keras.config.backend()}")

apply: Callable[[Any, Any, Any], None] = _steps.apply
"""`apply(optimizer, gradients, variables)`: one update, outside of a step."""

WITH_CALLBACKS = {"vae", "convolutional"}
"""Scenarios whose callbacks take part in the steps, here too. Those of the
others act on epochs, and are left to the resume tests."""


def batches(task: Any, seed: int, num_batches: int) -> Iterator[Any]:
    """The rows of each batch, in the order of a run with this seed."""
    source = task.build_inputs("train")
    iterator = source.iterate(seed=seed, capacity=1)
    for _ in range(num_batches):
        chunk = iterator.next_chunk(1)
        batch = source.fetch(source.resident, chunk.operands, 0)
        yield keras.tree.map_structure(ops.convert_to_tensor, batch)
    iterator.close()


def train(
    step: Step, task: Any, seed: int, num_batches: int
) -> list[dict[str, np.ndarray]]:
    """Run a step over the first batches of a run; the logs of each."""
    # As a run does right before its first step. PyTorch's dropout draws from
    # a generator that building the model, or another run, has moved.
    keras.utils.set_random_seed(seed)
    return [
        {k: ops.convert_to_numpy(v) for k, v in step(batch).items()}
        for batch in batches(task, seed, num_batches)
    ]


def _vae(task: Any, model: Any, optimizer: Any) -> Step:
    """The weight of the KL grows after each epoch of five steps."""
    step = _steps.vae(task, model, optimizer)
    done = itertools.count()

    def anneal_and_step(batch: Any) -> dict[str, Any]:
        epoch, batches = divmod(next(done), 5)
        if epoch and not batches:
            task.kl_weight.assign(min(1.0, 0.1 + 0.15 * epoch))
        return step(batch)

    return anneal_and_step


def _convolutional(task: Any, model: Any, optimizer: Any) -> Step:
    """The classifier, with a learning rate for each batch."""
    step = _steps.classifier(task, model, optimizer)
    numbers = itertools.count(1)

    def warm_up_and_step(batch: Any) -> dict[str, Any]:
        optimizer.learning_rate = 0.02 * min(1.0, next(numbers) / 12)
        return step(batch)

    return warm_up_and_step


HAND: dict[str, Callable[[Any, Any, Any], Step]] = {
    "plateau": _steps.classifier,
    "augmented": _steps.classifier,
    "gan": _steps.gan,
    "vae": _vae,
    "half_precision": _steps.half_precision,
    "accumulation": _steps.classifier,
    "averages": _steps.classifier,
    "regularized": _steps.classifier,
    "nested": _steps.nested,
    "scheduled": _steps.classifier,
    "subset": _steps.subset,
    "conditional": _steps.conditional,
    "convolutional": _convolutional,
    "recurrent": _steps.recurrent,
    "metric_cadence": _steps.classifier,
}
"""`HAND[name](task, model, optimizer)` makes the step of a scenario."""
