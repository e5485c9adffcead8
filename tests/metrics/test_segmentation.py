"""Segmentation's metrics, against scikit-learn's."""

import keras
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score

import legato
from legato.errors import ConfigError, DataError
from legato.metrics import (
    ConfusionMatrix,
    MeanDice,
    MeanIoU,
    PerClassDice,
    PerClassIoU,
)

CLASSES = 5
ALL = [ConfusionMatrix, MeanDice, MeanIoU, PerClassDice, PerClassIoU]
OF_CLASSES = [(PerClassIoU, jaccard_score), (PerClassDice, f1_score)]
MEANS = [(MeanIoU, jaccard_score), (MeanDice, f1_score)]


def random_maps(seed, count=9, present=CLASSES, size=(6, 9)):
    random = np.random.default_rng(seed)
    labels = random.integers(0, present, (count, *size))
    logits = random.normal(size=(count, *size, CLASSES)).astype("float32")
    logits += 1.5 * np.eye(CLASSES, dtype="float32")[labels]
    logits[..., present:] -= 100
    return labels, logits


def value_of(metric):
    result = metric.result()
    if isinstance(result, dict):
        return {k: float(np.asarray(on_host(v))) for k, v in result.items()}
    return on_host(result)


def on_host(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def exact(metric):
    """The counts with all of their bits."""
    pair = on_host(metric.variables[0]).astype("float64")
    return pair.sum(0)


def measured(metric, labels, outputs, weights=None, batch=3):
    for first in range(0, len(labels), batch):
        part = slice(first, first + batch)
        given = None if weights is None else weights[part]
        metric.update_state(labels[part], outputs[part], given)
    return value_of(metric)


def expected_of(function, labels, predicted, weights=None, ignored=()):
    """scikit-learn's figure of each class; NaN where there is nothing."""
    labels, predicted = labels.ravel(), predicted.ravel()
    if weights is not None:
        weights = weights.ravel()
    values = function(
        labels,
        predicted,
        labels=range(CLASSES),
        average=None,
        sample_weight=weights,
        zero_division=0,
    )
    absent = set(range(CLASSES)) - {*labels, *predicted}
    values[[*absent, *ignored]] = np.nan
    return values


@pytest.mark.parametrize("seed", range(3))
def test_confusion_matrix(seed):
    labels, logits = random_maps(seed)
    predicted = logits.argmax(-1)
    expected = confusion_matrix(labels.ravel(), predicted.ravel())
    assert len(np.unique(expected)) > 5
    for outputs, given in (("logits", logits), ("labels", predicted)):
        metric = ConfusionMatrix(CLASSES, outputs)
        np.testing.assert_array_equal(measured(metric, labels, given), expected)
    metric = ConfusionMatrix(CLASSES, axis=1)
    first = np.moveaxis(logits, -1, 1)
    np.testing.assert_array_equal(measured(metric, labels, first), expected)
    metric = ConfusionMatrix(CLASSES)
    last = labels[..., None].astype("uint8")
    np.testing.assert_array_equal(measured(metric, last, logits), expected)
    metric.reset_state()
    np.testing.assert_array_equal(
        measured(metric, labels.astype("float32"), logits, batch=5), expected
    )


@pytest.mark.parametrize("weighted", ["", "examples", "pixels"])
@pytest.mark.parametrize("present", [CLASSES, 3])
def test_of_classes(present, weighted):
    labels, logits = random_maps(3, present=present)
    random = np.random.default_rng(0)
    each = weights = None
    if weighted == "examples":
        weights = random.uniform(0, 2, len(labels)).astype("float32")
        each = np.broadcast_to(weights[:, None, None], labels.shape)
    elif weighted == "pixels":
        each = weights = random.uniform(0, 2, labels.shape).astype("float32")
    for kind, function in OF_CLASSES:
        expected = expected_of(function, labels, logits.argmax(-1), each)
        assert np.isnan(expected).sum() == CLASSES - present
        np.testing.assert_allclose(
            measured(kind(CLASSES), labels, logits, weights), expected, 2e-6
        )
    for kind, function in MEANS:
        expected = expected_of(function, labels, logits.argmax(-1), each)
        np.testing.assert_allclose(
            measured(kind(CLASSES), labels, logits, weights),
            np.nanmean(expected),
            2e-6,
        )


@pytest.mark.parametrize("ignored", [255, -1, 0, 2])
def test_ignored_label(ignored):
    labels, logits = random_maps(4)
    labels[np.random.default_rng(0).random(labels.shape) < 0.3] = ignored
    counts = labels != ignored
    predicted = logits.argmax(-1)
    given = {"num_classes": CLASSES, "ignore_label": ignored}
    np.testing.assert_array_equal(
        measured(ConfusionMatrix(**given), labels, logits),
        confusion_matrix(
            labels[counts], predicted[counts], labels=range(CLASSES)
        ),
    )
    inside = [ignored] if 0 <= ignored < CLASSES else []
    for (kind, function), (mean, _) in zip(OF_CLASSES, MEANS, strict=True):
        expected = expected_of(
            function, labels[counts], predicted[counts], ignored=inside
        )
        np.testing.assert_allclose(
            measured(kind(**given), labels, logits), expected, 1e-6
        )
        np.testing.assert_allclose(
            measured(mean(**given), labels, logits), np.nanmean(expected), 1e-6
        )


def test_a_class_that_is_only_predicted_has_none_right():
    labels = np.zeros((1, 4), int)
    predicted = np.array([[0, 0, 1, 1]])
    values = measured(PerClassIoU(3, "labels"), labels, predicted)
    np.testing.assert_array_equal(values, [0.5, 0, np.nan])
    assert measured(MeanIoU(3, "labels"), labels, predicted) == 0.25
    values = measured(PerClassDice(3, "labels"), labels, predicted)
    np.testing.assert_allclose(values, [2 / 3, 0, np.nan])


@pytest.mark.parametrize("per_pixel", [False, True])
def test_padding_changes_nothing(per_pixel):
    labels, logits = random_maps(5)
    metric = ConfusionMatrix(CLASSES)
    measured(metric, labels, logits)
    plain = exact(metric)
    assert plain.sum() == labels.size
    # What is padded may be out of range.
    padded = np.concatenate([labels, np.full((2, *labels.shape[1:]), 77)])
    outputs = np.concatenate([logits, logits[:2]])
    weights = np.repeat([1.0, 0.0], [len(labels), 2]).astype("float32")
    if per_pixel:
        weights = np.broadcast_to(weights[:, None, None], padded.shape)
    metric.reset_state()
    measured(metric, padded, outputs, weights, batch=6)
    np.testing.assert_array_equal(exact(metric), plain)


def test_weights_of_other_shapes():
    labels, logits = random_maps(6)
    plain = measured(ConfusionMatrix(CLASSES), labels, logits)
    for weights in (
        np.full((9, 1, 1), 2.0),
        np.full((9, 6, 9, 1), 2.0),
    ):
        metric = ConfusionMatrix(CLASSES)
        doubled = measured(metric, labels, logits, weights.astype("float32"))
        np.testing.assert_array_equal(doubled, 2 * plain)
    metric.reset_state()
    metric.update_state(labels, logits, 2)
    np.testing.assert_array_equal(value_of(metric), 2 * plain)
    # Pixels without images.
    metric.reset_state()
    flat = labels.reshape(-1), logits.reshape(-1, CLASSES)
    metric.update_state(*flat, np.full(labels.size, 2.0))
    np.testing.assert_array_equal(value_of(metric), 2 * plain)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("wrong", [CLASSES, -1, 255])
def test_out_of_range_is_seen(kind, wrong):
    labels, logits = random_maps(7)
    predicted = logits.argmax(-1)
    for index in (0, 1):
        pair = [labels.copy(), predicted.copy()]
        pair[index][3, 2, 1] = wrong
        assert np.isnan(measured(kind(CLASSES, "labels"), *pair)).all()


@pytest.mark.parametrize("ignored", [None, -1, 0, 255])
@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [
        ("float32", 1.5),
        ("float32", 255.5),
        ("float32", np.nan),
        ("int64", 2**32),
        ("uint64", 2**63),
        ("int64", 2**32 + 255),
    ],
)
def test_a_label_that_is_no_whole_number_is_seen(dtype, wrong, ignored):
    labels, logits = random_maps(7)
    labels = labels.astype(dtype)
    labels[3, 2, 1] = wrong
    given = {"num_classes": CLASSES, "ignore_label": ignored}
    metric = ConfusionMatrix(**given)
    assert np.isnan(measured(metric, labels, logits)).all()
    if dtype == "int64" and ignored is None:
        metric = ConfusionMatrix(**given, outputs="labels")
        assert np.isnan(measured(metric, logits.argmax(-1), labels)).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_logits_that_are_nan_are_seen(compiled):
    labels, logits = random_maps(7)
    logits[3, 2, 1, 4] = np.nan
    metric = MeanIoU(CLASSES)
    if not compiled:
        assert np.isnan(measured(metric, labels, logits))
        metric.reset_state()
        metric.update_state(labels, logits, np.arange(9) != 3)
        assert 0 < value_of(metric) < 1
        return
    model = keras.Sequential(
        [keras.Input(logits.shape[1:]), keras.layers.Activation("linear")]
    )
    jit = keras.config.backend() != "torch"
    model.compile(
        loss=lambda labels, outputs: keras.ops.mean(outputs),
        metrics=[metric],
        jit_compile=jit,
    )
    logs = model.evaluate(logits, labels, verbose=0, return_dict=True)
    assert np.isnan(logs["mean_iou"])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("weight", [-1.0, np.nan])
def test_a_weight_below_zero_is_seen(kind, weight):
    labels, logits = random_maps(7)
    for shape in (9, labels.shape):
        weights = np.ones(shape, "float32")
        weights.flat[2] = weight
        value = measured(kind(CLASSES), labels, logits, weights)
        assert np.isnan(value).all()


@pytest.mark.parametrize("shape", [(), (6, 9)])
def test_a_batch_without_examples_changes_nothing(shape):
    metric = MeanIoU(CLASSES)
    labels, logits = random_maps(8)
    measured(metric, labels, logits)
    before = exact(metric)
    labels = np.zeros((0, *shape), int)
    logits = np.zeros((0, *shape, CLASSES), "float32")
    for weights in (None, np.zeros(0, "float32"), np.zeros_like(labels)):
        metric.update_state(labels, logits, weights)
    np.testing.assert_array_equal(exact(metric), before)


@pytest.mark.parametrize("kind", ALL[1:])
def test_nothing_is_nan(kind):
    metric = kind(CLASSES)
    assert np.isnan(value_of(metric)).all()
    labels, logits = random_maps(8)
    measured(metric, labels, logits)
    metric.reset_state()
    assert np.isnan(value_of(metric)).all()


def test_by_name():
    labels, logits = random_maps(9)
    names = ["sky", "road", "car", "tree", "sea"]
    metric = PerClassIoU(CLASSES, class_names=names)
    values = measured(metric, labels, logits)
    assert list(values) == [f"iou_{name}" for name in names]
    np.testing.assert_array_equal(
        list(values.values()), measured(PerClassIoU(CLASSES), labels, logits)
    )


@pytest.mark.any_backend
def test_above_what_a_float32_counts():
    metric = ConfusionMatrix(2, "labels")
    labels = np.zeros((1, 2**24 + 3), "uint8")
    metric.update_state(labels, labels)
    assert exact(metric)[0] == 2**24 + 3
    one = np.zeros((1, 1), "uint8")
    for _ in range(4):
        metric.update_state(one, one)
        metric.update_state(one, one, np.ones((1, 1), "float32"))
        metric.update_state(one, one, np.ones(1, "float32"))
    assert exact(metric)[0] == 2**24 + 15
    # Parts of any size, more of them than a sum one by one can take.
    parts = np.full((2**17, 5), 300.7, "float32") * 10.0 ** np.arange(-4, 6, 2)
    parts = parts.astype("float32")
    metric.reset_state()
    metric._counts.add_parts(keras.ops.convert_to_tensor(parts))
    np.testing.assert_allclose(
        exact(metric), parts.sum(0, dtype="float64"), rtol=1e-8
    )
    # A thousand batches of two thousand million pixels.
    most = np.array([2**31 - 1, 12345, 1, 0, 0], "int32")
    metric.reset_state()
    for _ in range(1000):
        metric._counts.add_counts(keras.ops.convert_to_tensor(most))
    np.testing.assert_array_equal(exact(metric), most.astype("float64") * 1000)


class Pixels(legato.Task):
    """Few steps of a linear model, measured at each."""

    def __init__(self):
        labels, logits = random_maps(10, count=10)
        self.arrays = (logits, labels, np.float32([1] * 8 + [0] * 2))

    def build_model(self):
        return keras.Sequential(
            [
                keras.layers.Input((6, 9, CLASSES)),
                keras.layers.Conv2D(CLASSES, 1),
            ]
        )

    def build_optimizer(self):
        return keras.optimizers.SGD(0.1)

    def build_inputs(self, split):
        return legato.ArraySource(self.arrays, batch_size=4)

    def build_metrics(self, training):
        return [
            ConfusionMatrix(CLASSES),
            MeanIoU(CLASSES),
            PerClassDice(CLASSES, class_names=list("abcde")),
            legato.metrics.ExpectedCalibrationError(from_logits=True),
        ]

    def train_step(self, inputs, model, optimizer, metrics=None):
        logits, labels, weights = inputs

        def forward():
            outputs = model(logits, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(
                labels, outputs, from_logits=True
            )
            return keras.ops.mean(losses), outputs

        (loss, outputs), gradients = legato.value_and_grad(
            forward, model.trainable_variables, optimizer
        )
        optimizer.apply(gradients, model.trainable_variables)
        for metric in metrics or ():
            metric.update_state(labels, outputs, sample_weight=weights)
        return {self.loss: loss}

    def validation_step(self, inputs, model, metrics=None):
        logits, labels, weights = inputs
        outputs = model(logits, training=False)
        for metric in metrics or ():
            metric.update_state(labels, outputs, sample_weight=weights)
        return {self.loss: keras.ops.mean(outputs)}


def test_in_compiled_steps(tmp_path):
    config = legato.TrainerConfig(epochs=2, progress="none")
    task = Pixels()
    trainer = legato.Trainer(task, run_dir=tmp_path, config=config)
    history = trainer.train().history
    logits, labels, weights = task.arrays
    outputs = on_host(trainer.model(logits))
    for metric in task.build_metrics(False):
        value = measured(metric, labels, outputs, weights, batch=10)
        if not isinstance(value, dict):
            value = {metric.name: value}
        for name, each in value.items():
            np.testing.assert_allclose(
                history[f"val_{name}"][-1], each, 1e-5, err_msg=name
            )
            assert f"{name}" in history
    assert np.sum(history["val_confusion_matrix"][-1]) == labels[:8].size
    assert 0 < history["val_mean_iou"][-1] < 1


def test_compiling_keeps_what_is_small():
    """A compiler that took the sums apart would lose the ones."""
    metric = ConfusionMatrix(3)
    model = keras.Sequential(
        [keras.layers.Input((3,)), keras.layers.Activation("linear")]
    )
    model.compile(
        loss="sparse_categorical_crossentropy",
        weighted_metrics=[metric],
        jit_compile=keras.config.backend() != "torch",
    )
    outputs = np.eye(3, dtype="float32")[np.ones(12, int)]
    weights = np.float32([2**24] * 2 + [0.5] * 10)
    model.evaluate(
        outputs,
        np.zeros(12, int),
        sample_weight=weights,
        batch_size=2,
        verbose=0,
    )
    assert exact(metric)[1] == 2**25 + 5


@pytest.mark.parametrize("kind", ALL)
def test_config(kind):
    metric = kind(CLASSES, "labels", ignore_label=3, axis=1, name="of_mine")
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(metric)
    )
    assert type(again) is kind
    assert again.get_config() == metric.get_config()
    assert again.ignore_label == 3 and again.name == "of_mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"num_classes": 2.0}, "num_classes=2.0"),
        ({"num_classes": 50000}, "to 46340"),
        ({"outputs": "softmax"}, '"logits".*or "labels"'),
        ({"ignore_label": 0.5}, "ignore_label=0.5.*such as 255"),
        ({"axis": None}, "axis=None"),
        ({"class_names": ["a"]}, "there must be 5 different str"),
        ({"class_names": list("abcda")}, "5 different"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ConfigError, match=f"PerClassIoU.*{words}"):
        PerClassIoU(**{"num_classes": CLASSES} | arguments)


@pytest.mark.parametrize(
    ("arguments", "labels", "outputs", "weights", "words"),
    [
        ({}, (2, 3), (2, 3, 4), None, "Axis -1 must have 5 entries"),
        ({"axis": 3}, (2, 3), (2, 3, 5), None, "Axis 3"),
        ({}, (2, 4), (2, 3, 5), None, r"labels have the shape \(2, 4\)"),
        ({}, (2, 3, 5), (2, 3, 5), None, "one-hot"),
        ({"outputs": "labels"}, (2, 3), (2, 3), None, "must be whole numbers"),
        ({}, (2, 3), (2, 3, 5), (3,), r"sample_weight has the shape \(3,\)"),
        ({}, (2, 3, 4), (2, 3, 4, 5), (2, 3), "one weight for each example"),
    ],
)
def test_bad_batches(arguments, labels, outputs, weights, words):
    metric = MeanIoU(CLASSES, **arguments)
    with pytest.raises(DataError, match=f"mean_iou: .*{words}"):
        metric.update_state(
            np.zeros(labels, "int32"),
            np.zeros(outputs, "float32"),
            None if weights is None else np.ones(weights, "float32"),
        )


@pytest.mark.parametrize("shape", [(1_500_000,), (2, 750, 1000)])
def test_small_weights_are_not_dropped_beside_large_sums(shape):
    labels = np.random.default_rng(0).integers(0, 2, shape).astype("int32")
    weights = np.full(shape, 0.1, "float32")
    expected = np.bincount(labels.ravel()) * float(weights.flat[0])
    whole = ConfusionMatrix(2, outputs="labels")
    whole.update_state(labels, labels, sample_weight=weights)
    found = keras.ops.convert_to_numpy(whole.result())
    np.testing.assert_allclose(found, np.diag(expected), rtol=1e-5)
    parts = ConfusionMatrix(2, outputs="labels")
    for part in np.array_split(np.arange(len(labels)), 2):
        parts.update_state(
            labels[part], labels[part], sample_weight=weights[part]
        )
    again = keras.ops.convert_to_numpy(parts.result())
    np.testing.assert_allclose(again, found, rtol=1e-6)


def test_ones_are_counted_beyond_what_float32_holds():
    count = 2**24 + 1000
    labels, weights = np.zeros(count, "int32"), np.ones(count, "float32")
    metric = ConfusionMatrix(1, outputs="labels")
    metric.update_state(labels, labels, sample_weight=weights)
    assert float(metric.result()[0, 0]) == count


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="sizes are known elsewhere"
)
@pytest.mark.parametrize("shape", [(None,), (None, None)])
def test_weights_where_a_trace_does_not_know_the_size(shape):
    import tensorflow as tf

    metric = ConfusionMatrix(3, outputs="labels", ignore_label=2)
    kinds = tf.int32, tf.int32, tf.float32

    @tf.function(input_signature=[tf.TensorSpec(shape, k) for k in kinds])
    def update(labels, outputs, weights):
        metric.update_state(labels, outputs, sample_weight=weights)

    rng, expected = np.random.default_rng(0), np.zeros((3, 3))
    for size in (1, 700):
        size = (size,) * len(shape)
        labels, found = rng.integers(0, 3, (2, *size)).astype("int32")
        weights = rng.random(size).astype("float32")
        update(labels, found, weights)
        counts = labels < 2
        np.add.at(expected, (labels[counts], found[counts]), weights[counts])
    np.testing.assert_allclose(metric.result().numpy(), expected, rtol=1e-5)
