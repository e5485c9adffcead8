"""The smallest task: what a test is not about, it need not say."""

import keras

import legato


class Linear(legato.Task):
    """A model of two features and one output; without data and a loss."""

    def build_model(self):
        return keras.Sequential(
            [keras.layers.Input((2,)), keras.layers.Dense(1)]
        )

    def build_optimizer(self):
        return keras.optimizers.SGD(0.1)
