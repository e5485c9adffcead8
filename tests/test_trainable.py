"""Frozen layers are noticed, however their class tells."""

import keras
import pytest

from legato.compat.keras_trainable import TrainableFlags


class Own(keras.layers.Dense):
    """Trains while something outside says so."""

    switch = True

    @property
    def trainable(self):
        return self.switch

    @trainable.setter
    def trainable(self, value):
        pass


@pytest.fixture
def layer():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    return layer


def test_nothing_changed(layer):
    assert not TrainableFlags([layer, *layer.variables]).have_changed
    assert not TrainableFlags([]).have_changed


def test_a_layer_is_frozen(layer):
    flags = TrainableFlags([layer])
    layer.trainable = False
    assert flags.have_changed
    layer.trainable = True
    assert not flags.have_changed


def test_a_variable_is_frozen(layer):
    flags = TrainableFlags(layer.variables)
    layer.bias.trainable = False
    assert flags.have_changed


def test_a_property_of_a_class_of_its_own(layer):
    own = Own(2)
    flags = TrainableFlags([layer, own])
    own.switch = False
    assert flags.have_changed
