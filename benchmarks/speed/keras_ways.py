"""The contestants that need no more than a Keras model."""

import tempfile

import keras
from problems import ENGINE, LEARNING_RATE, Problem
from turns import EpochEnd, Train

import legato

ENDLESS = 1_000_000
"""Epochs: as in a long run, for which legato may choose to compile."""


class _EpochEnd(keras.callbacks.Callback):
    """Hands over at the end of each epoch."""

    def __init__(self, epoch_end: EpochEnd) -> None:
        super().__init__()
        self._epoch_end = epoch_end

    def get_state(self) -> dict:
        """There is nothing to go on with."""
        return {}

    def set_state(self, state: dict) -> None:
        """Of a run that does not go on."""

    def on_epoch_end(self, epoch, logs=None):
        if not self._epoch_end(logs["loss"]):
            self.model.stop_training = True


def _compiled(problem: Problem, **options) -> keras.Model:
    model = problem.make()
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE),
        loss=ENGINE.build_loss(),
        metrics=problem.metrics(),
        **options,
    )
    return model


def legato_fit(problem: Problem) -> Train:
    """As it comes: metrics, summaries, and a checkpoint at each epoch's end."""

    def train(epoch_end: EpochEnd) -> None:
        model = _compiled(problem)
        x, y = problem.data()
        with tempfile.TemporaryDirectory() as run_dir:
            legato.fit(
                model,
                x,
                y,
                batch_size=problem.batch,
                epochs=ENDLESS,
                shuffle=False,
                verbose=0,
                callbacks=[_EpochEnd(epoch_end)],
                run_dir=run_dir,
            )

    return train


def model_fit(problem: Problem, **options) -> Train:
    """`keras.Model.fit`, compiled with these options."""

    def train(epoch_end: EpochEnd) -> None:
        x, y = problem.data()
        _compiled(problem, **options).fit(
            x,
            y,
            batch_size=problem.batch,
            epochs=ENDLESS,
            shuffle=False,
            verbose=0,
            callbacks=[_EpochEnd(epoch_end)],
        )

    return train
