"""The same with legato: `with_legato.py EXAMPLES RUN_DIR STEPS [first]`.

It tells when the first step of this process was done. With `first` it dies
then; without, it trains to the end, which leaves a run to be resumed.
"""

import os
import sys
import time

import keras
from model import (
    BATCH,
    LEARNING_RATE,
    build_loss,
    build_metrics,
    build_model,
    make_data,
)

import legato


class FirstStep(keras.callbacks.Callback):
    """Prints the time at which the first step's loss is on the host."""

    is_told = False

    def get_state(self):
        """Nothing: each process tells it."""
        return {}

    def set_state(self, state):
        """See `get_state`."""

    def on_train_batch_end(self, batch, logs=None):
        """The first step is done."""
        if not self.is_told:
            float(logs["loss"])
            print(time.monotonic(), flush=True)
            self.is_told = True
            if sys.argv[4:] == ["first"]:
                os._exit(0)


class Mlp(legato.Task):
    """The model of all these benchmarks."""

    def __init__(self):
        self.data = make_data(int(sys.argv[1]))
        self.cross_entropy = build_loss()

    def build_model(self):
        """The MLP."""
        return build_model()

    def build_optimizer(self):
        """Adam."""
        return keras.optimizers.Adam(LEARNING_RATE)

    def build_inputs(self, split):
        """Arrays in memory."""
        if split != "train":
            return None
        return legato.ArraySource(self.data, batch_size=BATCH)

    def build_losses(self, labels, model_outputs, aux_losses=None):
        """Cross-entropy."""
        return self.cross_entropy(labels, model_outputs)

    def build_metrics(self, training):
        """Two metrics."""
        return build_metrics()


legato.Trainer(
    Mlp(),
    run_dir=sys.argv[2],
    config=legato.TrainerConfig(
        train_steps=int(sys.argv[3]),
        checkpoint_interval=10_000,
        torch_compile=False,
        progress="none",
    ),
    callbacks=[FirstStep()],
).train()
