"""Recurrent layers in a step: PyTorch's operations where Keras has loops."""

import sys

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops

import legato
from legato.backends.torch.layers import layers_of_step
from legato.backends.torch.scope import StepScope
from legato.compat import keras_torch

BATCH, TIME, FEATURES, UNITS = 4, 5, 3, 6


def sequences(shape=(BATCH, TIME, FEATURES)):
    rng = np.random.default_rng(0)
    return ops.convert_to_tensor(rng.normal(size=shape).astype("float32"))


def plain(kind, **options):
    return layers.Input((TIME, FEATURES)), [kind(UNITS, **options)]


def stacked(kind, **options):
    return layers.Input((TIME, FEATURES)), [
        kind(UNITS, return_sequences=True, **options),
        layers.Bidirectional(kind(UNITS)),
    ]


def with_states(kind):
    """As in an encoder and a decoder."""
    inputs = layers.Input((TIME, FEATURES))
    outputs, *states = kind(UNITS, return_state=True)(inputs)
    decoded = kind(UNITS, return_sequences=True)(inputs, initial_state=states)
    mixed = layers.Add()([decoded, layers.RepeatVector(TIME)(outputs)])
    return keras.Model(inputs, mixed)


def model_of(name, kind):
    keras.utils.set_random_seed(1)
    made = MODELS[name](kind)
    if isinstance(made, keras.Model):
        return made
    inputs, parts = made
    return keras.Sequential([inputs, *parts])


MODELS = {
    "plain": plain,
    "sequences": lambda kind: plain(kind, return_sequences=True),
    "backwards": lambda kind: plain(kind, go_backwards=True),
    "unrolled": lambda kind: plain(kind, unroll=True),
    "stateful": lambda kind: (
        layers.Input((TIME, FEATURES), batch_size=BATCH),
        [kind(UNITS, stateful=True)],
    ),
    "both ways": stacked,
    "dropout": lambda kind: stacked(kind, dropout=0.25),
    "states": with_states,
    "relu": lambda kind: plain(kind, activation="relu"),
    "hard sigmoid": lambda kind: plain(
        kind, recurrent_activation="hard_sigmoid"
    ),
    "no bias": lambda kind: plain(kind, use_bias=False),
    "float64": lambda kind: plain(kind, dtype="float64"),
    "bfloat16": lambda kind: plain(kind, dtype="mixed_bfloat16"),
    "masked": lambda kind: (
        layers.Input((TIME, FEATURES)),
        [layers.Masking(), kind(UNITS)],
    ),
    "dropout of the state": lambda kind: plain(kind, recurrent_dropout=0.25),
}
BY_LOOPS = {
    "relu", "hard sigmoid", "no bias", "float64", "bfloat16", "masked",
    "dropout of the state",
}  # fmt: skip


@pytest.fixture
def without_fusing(monkeypatch):
    """A context in which Keras's loops are left alone."""

    def disable(patch):
        patch.setattr(
            "legato.backends.torch.layers._can_fuse", lambda inputs: False
        )

    return disable


def differentiated(model, x):
    torch.manual_seed(7)  # of dropout
    variables = model.trainable_variables

    def forward():
        return ops.mean(ops.square(model(x, training=True)))

    loss, gradients = legato.value_and_grad(forward, variables)
    return [loss, *gradients, *model.non_trainable_variables]


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
@pytest.mark.parametrize("name", MODELS)
def test_what_keras_computes_by_a_loop(name, kind, monkeypatch, without_fusing):
    x = sequences()
    with monkeypatch.context() as patch:
        without_fusing(patch)
        wanted = differentiated(model_of(name, kind), x)
    found = differentiated(model_of(name, kind), x)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(a), ops.convert_to_numpy(b), 1e-5, 1e-6
        )
    assert any(np.any(ops.convert_to_numpy(g)) for g in wanted[1:])


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
@pytest.mark.parametrize("name", sorted(set(MODELS) - BY_LOOPS))
def test_there_is_no_loop(name, kind, monkeypatch):
    """(Which takes 4 to 20 times as long.)"""

    def refuse(*given):
        raise AssertionError("a loop over time")

    module = sys.modules["keras.src.backend.torch.rnn"]
    for kept in ("lstm", "gru"):
        choose = getattr(keras_torch, f"_choose_{kept}")
        monkeypatch.setattr(
            module, f"_fallback_{kept}", keras_torch._replacing(refuse, choose)
        )
    differentiated(model_of(name, kind), sequences())


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
def test_a_gradient_of_a_gradient(kind, monkeypatch, without_fusing):
    """As in a gradient penalty."""
    x = keras.Variable(sequences())

    def penalty():
        model = model_of("sequences", kind)

        def forward():
            _, (slope,) = legato.value_and_grad(
                lambda: ops.sum(ops.square(model(x.value))), [x]
            )
            return ops.mean(ops.square(slope))

        return legato.value_and_grad(forward, model.trainable_variables)

    with monkeypatch.context() as patch:
        without_fusing(patch)
        wanted = penalty()
    found = penalty()
    for a, b in zip(
        [found[0], *found[1]], [wanted[0], *wanted[1]], strict=True
    ):
        np.testing.assert_allclose(a.numpy(), b.numpy(), 1e-5, 1e-6)


class OneState(keras.layers.Layer):
    """States that are learnt, the same for all examples."""

    def __init__(self, kind):
        super().__init__()
        self.inner = kind(UNITS)

    def build(self, shape):
        self.inner.build(shape)
        count = 2 if isinstance(self.inner, layers.LSTM) else 1
        self.states = [self.add_weight(shape=(1, UNITS)) for _ in range(count)]

    def call(self, x):
        states = self.states
        return self.inner(
            x, initial_state=states if len(states) > 1 else states[0]
        )


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
def test_a_state_for_all_examples(kind, monkeypatch, without_fusing):
    """Keras's loops broadcast it, and PyTorch's operations do not."""

    def made():
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [layers.Input((TIME, FEATURES)), OneState(kind)]
        )
        return differentiated(model, sequences())

    with monkeypatch.context() as patch:
        without_fusing(patch)
        wanted = made()
    for a, b in zip(made(), wanted, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(a), ops.convert_to_numpy(b), 1e-5, 1e-6
        )


@pytest.mark.parametrize("case", ["one state twice", "inputs of the state"])
def test_gradients_of_gradients_where_arguments_are_related(
    case, monkeypatch, without_fusing
):
    x = keras.Variable(sequences())
    state = keras.Variable(sequences((BATCH, UNITS)))

    def penalty():
        keras.utils.set_random_seed(1)
        layer = layers.LSTM(UNITS, return_sequences=True)
        layer.build((BATCH, TIME, UNITS if case[0] == "i" else FEATURES))

        def inner():
            h = ops.tanh(state.value)
            if case == "one state twice":
                return ops.sum(ops.square(layer(x.value, initial_state=[h, h])))
            repeated = ops.repeat(h[:, None], TIME, axis=1)
            found = layer(repeated, initial_state=[h, ops.zeros_like(h)])
            return ops.sum(ops.square(found))

        slopes = []

        def forward():
            _, (slope,) = legato.value_and_grad(inner, [state])
            slopes.append(slope)
            return ops.mean(ops.square(slope))

        loss, gradients = legato.value_and_grad(
            forward, layer.trainable_variables
        )
        return [loss, slopes[-1], *gradients]

    with monkeypatch.context() as patch:
        without_fusing(patch)
        wanted = penalty()
    for a, b in zip(penalty(), wanted, strict=True):
        np.testing.assert_allclose(
            a.detach().numpy(), b.detach().numpy(), 1e-4, 1e-5
        )


def test_what_the_gradient_needs_may_not_be_changed():
    """PyTorch sees it, as for its own operations."""
    model = model_of("sequences", layers.LSTM)

    def forward():
        outputs = model(sequences())
        loss = ops.sum(ops.square(outputs))
        outputs.mul_(2.0)
        return loss

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        legato.value_and_grad(forward, model.trainable_variables)


def test_sequences_of_sequences():
    """`vectorized_map` is PyTorch's vmap, which knows no fused operation."""
    layer = layers.LSTM(UNITS)
    x = sequences((2, BATCH, TIME, FEATURES))
    layer.build(x.shape[1:])
    with layers_of_step(), StepScope():
        found = ops.vectorized_map(layer, x)
    wanted = ops.stack([layer(x[0]), layer(x[1])])
    np.testing.assert_allclose(
        found.detach().numpy(), wanted.detach().numpy(), 1e-5, 1e-6
    )


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
def test_every_way_to_run_a_step(kind, tmp_path):
    """As Python, replayed (the same bits), and compiled."""
    x = np.asarray(sequences((64, TIME, FEATURES)))
    y = np.arange(64) % UNITS
    weights = {}
    for way in (False, "auto", True):
        model = model_of("both ways", kind)
        model.compile(
            "sgd",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=way,
        )
        legato.fit(
            model, x, y % (2 * UNITS), batch_size=8, epochs=9, verbose=0,
            run_dir=tmp_path / str(way),
        )  # fmt: skip
        weights[way] = model.get_weights()
    for a, b, c in zip(*weights.values(), strict=True):
        assert a.tobytes() == b.tobytes()
        np.testing.assert_allclose(a, c, 1e-4, 1e-5)


def test_other_threads_and_later_calls_have_the_loop():
    layer = layers.LSTM(UNITS)
    x = sequences()
    before = layer(x)
    with layers_of_step():
        assert torch.equal(layer(x), before)  # in no step's scope
    assert torch.equal(layer(x), before)
