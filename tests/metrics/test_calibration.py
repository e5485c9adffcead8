"""The expected calibration error, against NumPy."""

import keras
import numpy as np
import pytest

import legato
from legato.errors import ConfigError, DataError
from legato.metrics import ExpectedCalibrationError


def expected_error(confidence, correct, bins, weights=None):
    """Bin by bin, as the paper's equation 3 has it."""
    weights = np.ones(len(confidence)) if weights is None else weights
    total = 0.0
    for index in range(bins):
        low, high = np.float32(index / bins), np.float32((index + 1) / bins)
        is_in = (confidence > low) & (confidence <= high)
        if weights[is_in].sum():
            gap = np.average(correct[is_in], weights=weights[is_in])
            gap -= np.average(confidence[is_in], weights=weights[is_in])
            total += weights[is_in].sum() * abs(gap)
    return total / weights.sum()


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def random_outputs(seed, count=200, classes=4):
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    logits = random.normal(0, 2, (count, classes)).astype("float32")
    logits[np.arange(count), labels] += 1
    return labels, logits


def measured(metric, labels, outputs, weights=None, batch=100):
    for first in range(0, len(labels), batch):
        part = slice(first, first + batch)
        given = None if weights is None else weights[part]
        metric.update_state(labels[part], outputs[part], given)
    return float(keras.ops.convert_to_numpy(metric.result()))


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("seed", range(3))
def test_many_classes(seed, bins):
    labels, logits = random_outputs(seed)
    probabilities = softmax(logits)
    weights = np.random.default_rng(seed).uniform(0, 3, 200).astype("float32")
    correct = probabilities.argmax(-1) == labels
    confidence = probabilities.max(-1)
    for given in (None, weights):
        expected = expected_error(confidence, correct, bins, given)
        assert 0.005 < expected < 0.6
        metric = ExpectedCalibrationError(bins, from_logits=True)
        assert measured(metric, labels, logits, given) == pytest.approx(
            expected, abs=1e-6
        )
        metric = ExpectedCalibrationError(bins)
        assert measured(metric, labels, probabilities, given) == pytest.approx(
            expected, abs=1e-6
        )


@pytest.mark.parametrize("shape", ["flat", "column", "labels"])
def test_binary_is_a_vector_of_two(shape):
    labels, logits = random_outputs(4, classes=2)
    metric = ExpectedCalibrationError(from_logits=True)
    expected = measured(metric, labels, logits)
    one = logits[:, 1] - logits[:, 0]
    if shape != "flat":
        one = one[:, None]
    if shape == "labels":
        labels = labels[:, None]
    metric = ExpectedCalibrationError(from_logits=True, binary=True)
    assert measured(metric, labels, one) == pytest.approx(expected, abs=1e-6)
    metric = ExpectedCalibrationError(binary=True)
    probabilities = 1 / (1 + np.exp(-one))
    value = measured(metric, labels, probabilities)
    assert value == pytest.approx(expected, abs=1e-6)


def test_edges_of_bins():
    """They are open below and closed above."""
    labels = np.array([1, 1, 0, 1])
    outputs = np.float32([0.5, 0.75, 1.0, 0.75])  # of class 1
    metric = ExpectedCalibrationError(4, binary=True)
    # In (0.25, 0.5]: one half is class 0, which is wrong. In (0.5, 0.75]: two
    # that are right. In (0.75, 1]: one that is wrong.
    assert measured(metric, labels, outputs) == (0.5 + 2 * 0.25 + 1) / 4


def test_certain_and_right_or_wrong():
    labels = np.arange(3)
    metric = ExpectedCalibrationError()
    assert measured(metric, labels, np.eye(3, dtype="float32")) == 0
    metric.reset_state()
    outputs = np.eye(3, dtype="float32")[[1, 2, 0]]
    assert measured(metric, labels, outputs) == 1


def test_pixels_and_weights_of_shapes():
    labels, logits = random_outputs(5)
    metric = ExpectedCalibrationError(from_logits=True)
    weights = np.repeat(np.float32([1, 2, 0, 3]), 50)
    expected = measured(metric, labels, logits, weights)
    maps = labels.reshape(4, 5, 10), logits.reshape(4, 5, 10, 4)
    for given in (
        weights.reshape(4, 5, 10),
        weights.reshape(4, 5, 10, 1),
        np.float32([1, 2, 0, 3]),
    ):
        metric.reset_state()
        value = measured(metric, *maps, given, batch=2)
        assert value == pytest.approx(expected, abs=1e-6)


def test_batches_and_padding_change_nothing():
    labels, logits = random_outputs(6)
    metric = ExpectedCalibrationError(from_logits=True)
    expected = measured(metric, labels, logits, batch=200)
    metric.reset_state()
    value = measured(metric, labels, logits, batch=60)
    assert value == pytest.approx(expected, abs=1e-6)
    metric.reset_state()
    padded = np.concatenate([labels, labels[:100]])
    outputs = np.concatenate([logits, logits[:100] * 3])
    weights = np.repeat(np.float32([1, 0]), [200, 100])
    value = measured(metric, padded, outputs, weights)
    assert value == pytest.approx(expected, abs=1e-6)


def test_nothing_is_nan_and_nan_is_seen():
    metric = ExpectedCalibrationError()
    assert np.isnan(float(keras.ops.convert_to_numpy(metric.result())))
    labels, logits = random_outputs(7)
    logits[3] = np.nan
    assert np.isnan(measured(metric, labels, logits))


def pixels(values, correct, bins=15):
    """A batch of images, and the error in float64."""
    where = np.clip(np.ceil(values * bins) - 1, 0, bins - 1).astype(int)
    gaps = correct.astype("float64") - values
    each = np.bincount(where.ravel(), gaps.ravel(), bins)
    return np.abs(each).sum() / values.size


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_many_pixels_in_a_batch(constant, compiled):
    """Sums of many numbers of float32, one by one, drop parts of each."""
    random = np.random.default_rng(0)
    shape = (8, 512, 512) if compiled else (2**22,)
    outputs = random.uniform(0.87, 0.93, shape).astype("float32")
    labels = (random.random(shape) < outputs).astype("int32")
    if constant:
        outputs, labels = np.full_like(outputs, 0.9), np.ones_like(labels)
    expected = pixels(outputs, labels == 1)
    metric = ExpectedCalibrationError(binary=True)
    if not compiled:
        value = measured(metric, labels, outputs, batch=2**22)
    else:
        model = keras.Sequential(
            [keras.Input(shape[1:]), keras.layers.Activation("linear")]
        )
        model.compile(
            loss="mse",
            metrics=[metric],
            jit_compile=keras.config.backend() != "torch",
        )
        logs = model.evaluate(
            outputs, labels, batch_size=8, verbose=0, return_dict=True
        )
        value = logs["expected_calibration_error"]
    assert value == pytest.approx(expected, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("own", [False, True])
def test_in_a_compiled_model(own, tmp_path):
    labels, logits = random_outputs(8)
    expected = measured(
        ExpectedCalibrationError(from_logits=True), labels, logits
    )
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(4, kernel_initializer="identity"),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[ExpectedCalibrationError(from_logits=True)],
    )
    if own:
        history = model.fit(logits, labels, verbose=0).history
        logs = model.evaluate(logits, labels, verbose=0, return_dict=True)
    else:
        data = (logits, labels)
        history = legato.fit(
            model, *data, validation_data=data, verbose=0, run_dir=tmp_path
        ).history
        logs = {n: history[f"val_{n}"][0] for n in history if n[:3] != "val"}
    for found in (
        history["expected_calibration_error"][0],
        logs["expected_calibration_error"],
    ):
        assert found == pytest.approx(expected, abs=1e-6)


def check_second_is_seen(metric, labels, outputs):
    """The second example makes it NaN, but where its weight is 0."""
    assert np.isnan(measured(metric, labels, outputs))
    metric.reset_state()
    weights = np.float32([1, 0])
    value = measured(metric, labels, outputs, weights)
    assert value == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("wrong", [-1, 2, 0.5, np.nan, 2**32])
def test_a_label_that_is_no_class_is_seen(wrong, binary):
    outputs = np.float32([0.9, 0.2] if binary else [[0.1, 0.9], [0.8, 0.2]])
    labels = np.array([1, wrong])
    metric = ExpectedCalibrationError(binary=binary)
    check_second_is_seen(metric, labels, outputs)


@pytest.mark.parametrize("wrong", [8.5, -0.5, np.nan, np.inf])
def test_what_is_no_probability_is_seen(wrong):
    labels = np.array([1, 1])
    one = np.float32([0.9, wrong])
    for binary, outputs in ((True, one), (False, np.stack([1 - one, one], 1))):
        metric = ExpectedCalibrationError(binary=binary)
        check_second_is_seen(metric, labels, outputs)
    # Rounding may lead a little over 1.
    metric = ExpectedCalibrationError(binary=True)
    over = np.float32([1.0001, 1.0001])
    assert measured(metric, labels, over) == pytest.approx(1e-4, abs=1e-6)


@pytest.mark.parametrize("weight", [-1, np.nan])
def test_a_weight_below_zero_is_seen(weight):
    metric = ExpectedCalibrationError()
    outputs = np.float32([[0.1, 0.9], [0.8, 0.2]])
    weights = np.float32([3, weight])
    assert np.isnan(measured(metric, np.array([1, 0]), outputs, weights))


def test_config():
    metric = ExpectedCalibrationError(7, from_logits=True, binary=True)
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(metric)
    )
    assert again.get_config() == metric.get_config()
    assert (again.num_bins, again.from_logits, again.binary) == (7, True, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_bins": 0}, "num_bins=0"),
        ({"num_bins": 1.5}, "num_bins=1.5"),
        ({"from_logits": None}, "from_logits=None"),
        ({"binary": 1}, "binary=1"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ConfigError, match=words):
        ExpectedCalibrationError(**arguments)


@pytest.mark.parametrize(
    ("labels", "outputs", "weights", "words"),
    [
        ((8, 3), (8, 3), None, "one-hot labels need"),
        ((7,), (8, 3), None, r"\(7,\)"),
        ((8,), (8, 3), (7,), "sample_weight has the shape"),
    ],
)
def test_bad_batches(labels, outputs, weights, words):
    metric = ExpectedCalibrationError()
    with pytest.raises(DataError, match=words):
        metric.update_state(
            np.zeros(labels, int),
            np.zeros(outputs, "float32"),
            None if weights is None else np.ones(weights, "float32"),
        )
