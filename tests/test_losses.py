"""Losses, against the formulas of their papers in float64."""

import itertools
import json

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers, ops

import legato
from legato import backend_choice
from legato.errors import ConfigError, StepError
from legato.losses import (
    DiceLoss,
    SigmoidFocalLoss,
    SmoothedCrossentropy,
    SmoothL1Loss,
    WeightedSum,
)

ALL = [SigmoidFocalLoss, SmoothL1Loss, SmoothedCrossentropy, DiceLoss]
HALF = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

# Float32: sums of at most 120 entries, each of a few operations.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def focal(y, x, alpha=0.25, gamma=2.0):
    """Lin et al. 2017, equation 5, for labels 0 and 1."""
    p = sigmoid(x)
    p_t = np.where(y == 1, p, 1 - p)
    alpha_t = 1 if alpha is None else np.where(y == 1, alpha, 1 - alpha)
    return -alpha_t * (1 - p_t) ** gamma * np.log(p_t)


def smooth_l1(y, x, beta=1.0):
    """Girshick 2015, equation 3, with the bend at beta."""
    d = np.abs(x - y)
    return np.where(d < beta, d**2 / 2 / beta, d - beta / 2).sum(axis=-1)


def crossentropy(q, x, smoothing):
    """Szegedy et al. 2015, section 7, for distributions q."""
    classes = x.shape[-1]
    smoothed = (1 - smoothing) * q + smoothing / classes
    return -(smoothed * np.log(softmax(x))).sum(axis=-1)


def dice(g, p, smooth=0.0):
    """Milletari et al. 2016, section 3, by image and class."""
    axes = tuple(range(1, p.ndim - 1))
    top = 2 * (p * g).sum(axis=axes) + smooth
    return 1 - top / ((p**2).sum(axis=axes) + (g**2).sum(axis=axes) + smooth)


def host(tensor):
    return np.asarray(ops.convert_to_numpy(tensor)).astype("float64")


def value_and_gradient(compute, x, dtype="float32"):
    """Of a scalar function of one tensor, on this backend."""
    variable = keras.Variable(np.asarray(x), dtype=dtype)
    value, (gradient,) = legato.value_and_grad(
        lambda: compute(ops.convert_to_tensor(variable)), [variable]
    )
    return float(host(value)), host(gradient)


def differences(function, x, h=1e-6):
    """The gradient of a NumPy function by central differences."""
    x = np.array(x, "float64")
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        gradient[i] = (function(up) - function(down)) / (2 * h)
    return gradient


def check(loss, reference, y, x, sample_weight=None, dtype="float32"):
    """Value and gradient against a function of NumPy, in float64."""
    if dtype in HALF:
        x = x.astype(HALF[dtype])
    exact = np.asarray(x).astype("float64")
    value, gradient = value_and_gradient(
        lambda t: loss(y, t, sample_weight=sample_weight), x, dtype
    )
    np.testing.assert_allclose(value, reference(exact), **CLOSE)
    # The value is computed in float32; the gradient is of the input's dtype.
    eps = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype, 0)
    close = {"rtol": max(1e-5, eps), "atol": 1e-6}
    np.testing.assert_allclose(gradient, differences(reference, exact), **close)


def random_anchors():
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (2, 10, 3)).astype("float32")
    labels = np.zeros((2, 10, 3), "int32")
    labels[0, 1, 2] = labels[0, 4, 0] = labels[1, 9, 1] = 1
    return labels, logits


# --- the focal loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (None, 0.5), (0.9, 0)])
def test_focal_is_the_papers_over_the_positives(alpha, gamma, dtype):
    labels, logits = random_anchors()
    check(
        SigmoidFocalLoss(alpha=alpha, gamma=gamma),
        lambda x: focal(labels, x, alpha, gamma).sum() / 3,
        labels,
        logits,
        dtype=dtype,
    )


def test_focal_reductions():
    labels, logits = random_anchors()
    exact = focal(labels, logits.astype("float64"))
    for reduction, expected in {
        "sum": exact.sum(),
        "sum_over_batch_size": exact.mean(),
        "mean": exact.mean(),
        "mean_with_sample_weight": exact.mean(),
        "none": exact,
        None: exact,
    }.items():
        loss = SigmoidFocalLoss(reduction=reduction)
        np.testing.assert_allclose(
            host(loss(labels, logits)), expected, **CLOSE
        )
    np.testing.assert_allclose(
        host(SigmoidFocalLoss().call(labels.astype("float32"), logits)),
        exact,
        **CLOSE,
    )


def test_focal_agrees_with_keras_where_that_does_not_clip():
    labels, logits = random_anchors()
    kerass = keras.losses.BinaryFocalCrossentropy(
        apply_class_balancing=True, from_logits=True
    )
    np.testing.assert_allclose(
        host(SigmoidFocalLoss(reduction="mean")(labels, logits)),
        host(kerass(labels, logits)),
        rtol=1e-4,  # Keras's goes by way of 1 - p
    )


def test_focal_leaves_out_ignored_labels_and_weights_of_zero():
    labels, logits = random_anchors()
    labels[0, 4] = -1  # a positive, with all of its classes
    labels[1, 0, 0] = -1
    counted = labels != -1

    def reference(x):
        return (focal(labels, x) * counted).sum() / 2

    check(SigmoidFocalLoss(), reference, labels, logits)
    # The same, said by weights; of anchors, and of their classes.
    plain = np.where(counted, labels, 0)
    plain[0, 4, 0] = 1
    weights = counted.astype("float32")
    check(SigmoidFocalLoss(), reference, plain, logits, weights)
    anchors = np.ones((2, 10), "float32")
    anchors[0, 1] = 0  # the other positive of the first image
    check(
        SigmoidFocalLoss(),
        lambda x: (focal(labels, x) * counted * anchors[..., None]).sum() / 1,
        labels,
        logits,
        anchors,
    )
    mean = (focal(labels, logits.astype("float64")) * counted).sum()
    np.testing.assert_allclose(
        host(SigmoidFocalLoss(reduction="mean")(labels, logits)),
        mean / counted.sum(),
        **CLOSE,
    )
    # No label is ignored: -1 is one that is not 1.
    np.testing.assert_allclose(
        host(SigmoidFocalLoss(ignore_label=None)(labels, logits)),
        focal(labels, logits.astype("float64")).sum() / 2,
        **CLOSE,
    )


def test_a_weight_scales_and_does_not_count():
    labels, logits = random_anchors()
    once = host(SigmoidFocalLoss()(labels, logits))
    by_example = SigmoidFocalLoss()(labels, logits, sample_weight=[0.5, 0.5])
    np.testing.assert_allclose(host(by_example), once / 2, rtol=1e-6)
    weights = np.array([0.5, 2.0])
    exact = focal(labels, logits.astype("float64")).sum(axis=(1, 2))
    loss = SigmoidFocalLoss(reduction="mean_with_sample_weight")
    np.testing.assert_allclose(
        host(loss(labels, logits, sample_weight=weights)),
        (exact * weights).sum() / (30 * 2.5),
        **CLOSE,
    )


def test_focal_without_positives_divides_by_one():
    _, logits = random_anchors()
    labels = np.zeros(logits.shape, "int32")
    check(SigmoidFocalLoss(), lambda x: focal(labels, x).sum(), labels, logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_at_the_extremes(gamma, dtype):
    logits = np.array([1e4, 1e4, -1e4, -1e4, 0, 0, 100, -100])
    logits = np.asarray(logits, HALF.get(dtype, "float32"))
    labels = np.array([1, 0, 1, 0, 1, 0, 0, 1])
    wrong = np.array([0, 1, 1, 0, 0, 0, 1, 1], bool)
    x = logits.astype("float64")
    even = 0.5**gamma * np.log(2)
    # There 1 - p_t is 1 or 0 to the last bit, and log(p_t) the logit or 0.
    expected = np.where(wrong, np.abs(x), 0) + np.where(x == 0, even, 0)
    loss = SigmoidFocalLoss(0.5, gamma, reduction="sum")
    value, gradient = value_and_gradient(
        lambda t: loss(labels, t), logits, dtype
    )
    np.testing.assert_allclose(value, expected.sum() / 2, rtol=1e-6)
    slope = np.where(wrong, np.sign(x), 0) / 2
    bend = 0.5 * (0.5**gamma) * (0.5 + gamma * np.log(2) / 2)
    slope += np.where(x == 0, np.where(labels == 1, -bend, bend), 0)
    rtol = 2.0**-8 if dtype in HALF else 1e-6
    np.testing.assert_allclose(gradient, slope, rtol=rtol, atol=1e-30)


# --- smooth L1


def random_boxes():
    random = np.random.default_rng(1)
    targets = random.normal(0, 1, (2, 6, 4)).astype("float32")
    boxes = (targets + random.normal(0, 2, targets.shape)).astype("float32")
    positive = np.zeros((2, 6), "float32")
    positive[0, 1] = positive[0, 2] = positive[1, 5] = 1
    return targets, boxes, positive


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("beta", [1.0, 1 / 9, 3])
def test_smooth_l1_is_the_papers_over_the_positives(beta, dtype):
    targets, boxes, positive = random_boxes()
    check(
        SmoothL1Loss(beta=beta),
        lambda x: (smooth_l1(targets, x, beta) * positive).sum() / 3,
        targets,
        boxes,
        positive,
        dtype,
    )


def test_smooth_l1_is_hubers_loss_up_to_its_bend():
    targets, boxes, _ = random_boxes()
    huber = keras.losses.Huber(delta=0.25)(targets, boxes)
    ours = SmoothL1Loss(beta=0.25, reduction="mean")(targets, boxes)
    np.testing.assert_allclose(host(ours) * 0.25 / 4, host(huber), rtol=1e-6)


def test_smooth_l1_without_weights_takes_every_box():
    targets, boxes, _ = random_boxes()
    exact = smooth_l1(targets, boxes.astype("float64"))
    for reduction, expected in {
        "sum_over_positives": exact.mean(),
        "sum_over_batch_size": exact.mean(),
        "sum": exact.sum(),
        None: exact,
    }.items():
        loss = SmoothL1Loss(reduction=reduction)
        np.testing.assert_allclose(
            host(loss(targets, boxes)), expected, **CLOSE
        )


def test_boxes_of_weight_zero_may_have_any_target():
    targets, boxes, positive = random_boxes()
    expected = (
        smooth_l1(targets, boxes.astype("float64")) * positive
    ).sum() / 3
    targets[positive == 0] = [np.nan, np.inf, -np.inf, 1e38]
    for weights in (positive, positive[..., None]):
        value, gradient = value_and_gradient(
            lambda t, w=weights: SmoothL1Loss()(targets, t, sample_weight=w),
            boxes,
        )
        np.testing.assert_allclose(value, expected, **CLOSE)
        assert np.isfinite(gradient).all()
        assert not gradient[positive == 0].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_smooth_l1_at_the_extremes_and_without_positives(dtype):
    boxes = np.array([[[1e4, -1e4, 0, 6e4]]], HALF.get(dtype, "float32"))
    targets = np.zeros((1, 1, 4), "float32")
    value, gradient = value_and_gradient(
        lambda t: SmoothL1Loss()(targets, t, sample_weight=[[1]]), boxes, dtype
    )
    exact = np.abs(boxes.astype("float64"))
    np.testing.assert_allclose(value, exact.sum() - 1.5, rtol=1e-6)
    assert gradient.tolist() == [[[1, -1, 0, 1]]]
    value, gradient = value_and_gradient(
        lambda t: SmoothL1Loss()(targets, t, sample_weight=[[0]]), boxes, dtype
    )
    assert value == 0 and not gradient.any()


# --- cross-entropy


def random_classes():
    random = np.random.default_rng(2)
    logits = random.normal(0, 2, (3, 4, 5)).astype("float32")
    return random.integers(0, 5, (3, 4)), logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_crossentropy_is_the_papers(smoothing, dtype):
    labels, logits = random_classes()
    q = np.eye(5)[labels]

    def reference(x):
        return crossentropy(q, x, smoothing).mean()

    loss = SmoothedCrossentropy(smoothing)
    check(loss, reference, labels, logits, dtype=dtype)
    for other in (labels[..., None], q, labels.astype("float32")):
        np.testing.assert_allclose(
            host(loss(other, logits)), host(loss(labels, logits)), rtol=1e-6
        )
    kerass = keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=smoothing
    )
    np.testing.assert_allclose(
        host(loss(q, logits)), host(kerass(q, logits)), rtol=1e-5
    )


def test_crossentropy_of_distributions():
    _, logits = random_classes()
    q = softmax(np.random.default_rng(3).normal(size=logits.shape))
    check(
        SmoothedCrossentropy(0.2),
        lambda x: crossentropy(q, x, 0.2).mean(),
        q,
        logits,
    )


@pytest.mark.parametrize("ignored", [-1, 255, 2])
def test_crossentropy_ignores_a_class(ignored):
    labels, logits = random_classes()
    labels[0, :2] = labels[2, 3] = ignored
    counted = labels != ignored
    q = np.eye(5)[np.where(counted, labels, 0)]
    weights = np.arange(12.0).reshape(3, 4)

    def reference(x):
        return (crossentropy(q, x, 0.1) * counted).sum() / counted.sum()

    loss = SmoothedCrossentropy(ignore_class=ignored)
    check(loss, reference, labels, logits)
    rows = np.where(counted[..., None], q, ignored)
    check(loss, reference, rows, logits)
    check(
        loss,
        lambda x: (
            (crossentropy(q, x, 0.1) * counted * weights).sum() / counted.sum()
        ),
        labels,
        logits,
        weights,
    )
    by_weight = SmoothedCrossentropy(
        ignore_class=ignored, reduction="mean_with_sample_weight"
    )
    check(
        by_weight,
        lambda x: (
            (crossentropy(q, x, 0.1) * counted * weights).sum()
            / (counted * weights).sum()
        ),
        labels,
        logits,
        weights,
    )


def test_crossentropy_takes_labels_that_bfloat16_lacks():
    logits = np.zeros((2, 600), "float32")
    logits[:, 257] = 20
    # 257 is 256 in bfloat16, which Keras's losses would cast it to.
    loss = SmoothedCrossentropy(0.0, reduction=None, dtype="bfloat16")
    found = host(loss(np.array([257, 256]), logits))
    np.testing.assert_allclose(found, [0, 20], atol=1e-4)


def test_crossentropy_takes_the_mask_of_a_layer():
    logits = layers.Embedding(4, 5, mask_zero=True)(np.array([[1, 2, 0, 0]]))
    labels = np.array([[3, 1, 4, 4]])
    exact = crossentropy(np.eye(5)[labels], host(logits), 0.1)[0]
    found = SmoothedCrossentropy()(labels, logits)
    np.testing.assert_allclose(host(found), exact[:2].mean(), **CLOSE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_crossentropy_at_the_extremes(dtype):
    logits = np.array([[1e4, -1e4, 0], [1e4, -1e4, 0], [-1e4] * 3])
    logits = logits.astype(HALF.get(dtype, "float32"))
    big = float(logits[0, 0])
    loss = SmoothedCrossentropy(0.3, reduction="sum")
    value, gradient = value_and_gradient(
        lambda t: loss(np.array([0, 1, 2]), t), logits, dtype
    )
    # -log_softmax is 0, 2 big, big; its mean is big.
    expected = 0.3 * big + (0.7 * 2 * big + 0.3 * big) + np.log(3)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    third = 1 / 3
    slope = [
        [0.2, -0.1, -0.1],
        [0.9, -0.8, -0.1],
        [third - 0.1, third - 0.1, third - 0.8],
    ]
    rtol = 2.0**-8 if dtype in HALF else 1e-6
    np.testing.assert_allclose(gradient, slope, rtol=rtol)


def test_what_a_layer_masks_is_no_positive():
    outputs = layers.Embedding(4, 5, mask_zero=True)(np.array([[1, 2, 0, 0]]))
    exact = host(outputs)
    labels = np.zeros((1, 4, 5))
    labels[0, 1:, 0] = 1  # three, of which two are masked
    found = SigmoidFocalLoss()(labels, outputs)
    expected = focal(labels, exact)[:, :2].sum()
    np.testing.assert_allclose(host(found), expected, **CLOSE)
    found = SmoothL1Loss()(labels, outputs, sample_weight=[[0, 1, 1, 1]])
    expected = smooth_l1(labels, exact)[0, 1]
    np.testing.assert_allclose(host(found), expected, **CLOSE)
    found = DiceLoss("sigmoid")(labels, outputs)
    expected = dice(labels[:, :2], sigmoid(exact[:, :2]), 1.0).mean()
    np.testing.assert_allclose(host(found), expected, **CLOSE)


# --- Dice


def random_segments(classes=3):
    random = np.random.default_rng(4)
    logits = random.normal(0, 2, (2, 3, 4, classes)).astype("float32")
    labels = random.integers(0, classes, (2, 3, 4))
    labels[1, 0, :classes] = range(classes)
    labels[0][labels[0] == 1] = 2  # the first image has none of class 1
    return labels, logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_dice_is_the_papers(smooth, dtype):
    labels, logits = random_segments()
    g = np.eye(3)[labels]

    def reference(x):
        values = dice(g, softmax(x), smooth)
        if smooth:
            return values.mean()
        assert values[0, 1] == 1  # whatever is predicted
        return (values.sum() - 1) / 5

    loss = DiceLoss(smooth=smooth)
    check(loss, reference, labels, logits, dtype=dtype)
    for other in (labels[..., None], g, labels.astype("uint8")):
        np.testing.assert_allclose(
            host(loss(other, logits)), host(loss(labels, logits)), rtol=1e-6
        )


def test_dice_of_sigmoids():
    labels, logits = random_segments(classes=1)
    labels = np.arange(24).reshape(labels.shape) % 3 == 0
    g = labels[..., None]
    loss = DiceLoss("sigmoid")
    for given in (labels, g):
        check(
            loss,
            lambda x: dice(g, sigmoid(x), 1.0).mean(),
            given.astype("int32"),
            logits,
        )
    _, logits = random_segments()
    several = np.random.default_rng(5).integers(0, 2, logits.shape)
    check(
        loss, lambda x: dice(several, sigmoid(x), 1.0).mean(), several, logits
    )


@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("ignored", [-1, 255, 0])
def test_dice_leaves_out_ignored_pixels(ignored, smooth):
    labels, logits = random_segments()
    labels[0, 0] = labels[1, 2, 1] = ignored
    counted = (labels != ignored)[..., None]
    g = np.eye(3)[np.where(counted[..., 0], labels, 0)] * counted
    present = g.any(axis=(1, 2)) if not smooth else np.ones((2, 3), bool)

    def reference(x):
        return dice(g, softmax(x) * counted, smooth)[present].mean()

    loss = DiceLoss(smooth=smooth, ignore_label=ignored)
    check(loss, reference, labels, logits)
    check(loss, reference, np.where(counted, g, ignored), logits)
    # An image of which nothing counts adds nothing.
    labels[0] = ignored
    check(
        loss,
        lambda x: dice(g, softmax(x) * counted, smooth)[1][present[1]].mean(),
        labels,
        logits,
    )


def test_dice_takes_weights_of_images_and_of_classes():
    labels, logits = random_segments()
    g = np.eye(3)[labels]
    for weights in (np.array([0.5, 3.0]), np.array([[0.0, 1.0, 2.0]])):
        whole = weights[:, None] if weights.ndim == 1 else weights
        check(
            DiceLoss(),
            lambda x, w=whole: (dice(g, softmax(x), 1.0) * w).mean(),
            labels,
            logits,
            weights,
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_dice_at_the_extremes(activation, smooth, dtype):
    """Sure and right, sure and wrong, nothing to see, nothing that counts."""
    logits = np.full((4, 5, 2), -1e4, "float32")
    logits[0, :, 1] = logits[1, :, 0] = logits[2, :, 0] = 1e4
    labels = np.array([[1] * 5, [1] * 5, [0] * 5, [255] * 5])
    loss = DiceLoss(activation, smooth, 255, reduction=None)
    found = host(loss(labels, logits.astype(HALF.get(dtype, "float32"))))
    wrong = 1 - smooth / (5 + smooth)
    missed = wrong if smooth else 0
    # (Image, class): with no smoothing an absent class does not count.
    expected = [[0, 0], [missed, wrong], [0, 0], [0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    loss = DiceLoss(activation, smooth, 255)
    value, gradient = value_and_gradient(
        lambda t: loss(labels, t), logits, dtype
    )
    counts = 6 if smooth else 3
    np.testing.assert_allclose(value, np.sum(expected) / counts, rtol=1e-6)
    assert np.isfinite(gradient).all()


# --- what all have in common


def some_batch(cls):
    if cls is SigmoidFocalLoss:
        return random_anchors()
    if cls is SmoothL1Loss:
        return random_boxes()[:2]
    return (
        random_classes() if cls is SmoothedCrossentropy else random_segments()
    )


# --- what has weight 0, and labels that are no classes


def batches():
    """Losses with labels, outputs and weights of which some are 0."""
    random = np.random.default_rng(3)
    weights = np.float32([[1, 0, 2], [0, 0.5, 1]])
    boxes = random.normal(size=(2, 2, 3, 4)).astype("float32")
    maps = random.normal(size=(3, 4, 5, 3)).astype("float32")
    classes = random.integers(0, 3, (3, 4, 5))
    rows = maps.reshape(3, 20, 3)
    images = np.float32([2, 0, 1])
    by_class = np.float32([[1, 0, 2], [0, 0, 0], [1, 1, 0]])
    focal = random.integers(-1, 2, (2, 3, 4))
    shares = np.eye(3, dtype="float32")[classes]
    return {
        "focal": (SigmoidFocalLoss, {}, focal, boxes[0], weights),
        "boxes": (SmoothL1Loss, {}, boxes[1], boxes[0], weights),
        "index": (SmoothedCrossentropy, {}, classes[0], maps[0], 0),
        "rows": (SmoothedCrossentropy, {}, classes.reshape(3, 20), rows, 1),
        "shares": (SmoothedCrossentropy, {}, shares, maps, images),
        "dice": (DiceLoss, {}, classes, maps, images),
        "smooth": (DiceLoss, {"smooth": 0.0}, classes, maps, images),
        "dice of shares": (DiceLoss, {}, shares, maps, by_class[:, :1]),
        "sigmoid": (
            DiceLoss,
            {"activation": "sigmoid"},
            shares,
            maps,
            by_class,
        ),
    }


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight"])
@pytest.mark.parametrize("name", batches())
def test_what_has_weight_zero_is_inert(name, reduction, bad):
    cls, arguments, labels, outputs, weights = batches()[name]
    if np.ndim(weights) == 0:
        weights = np.ones(labels.shape, "float32")
        weights[0], weights[1, 2] = 0, 0
    loss = cls(reduction=reduction, **arguments)

    def measure(labels, outputs):
        return value_and_gradient(
            lambda x: loss(labels, x, sample_weight=weights), outputs
        )

    value, gradient = measure(labels, outputs)
    zero = weights == 0
    if cls is DiceLoss:
        zero = zero.reshape(3, 1, 1, *zero.shape[1:])
    zero = zero.reshape(*zero.shape, *[1] * (outputs.ndim - zero.ndim))
    zero = np.broadcast_to(zero, outputs.shape)
    of_labels = zero if labels.shape == zero.shape else zero[..., 0]
    assert of_labels.any() and not of_labels.all()
    assert np.isfinite(value) and (gradient[~zero] != 0).any()
    outputs = np.where(zero, bad, outputs).astype("float32")
    again = [measure(labels, outputs)]
    if cls is not SigmoidFocalLoss:  # -1 does not count there
        spoiled = np.where(of_labels, bad, labels).astype("float32")
        again.append(measure(spoiled, outputs))
    for found, slopes in again:
        np.testing.assert_allclose(found, value, **CLOSE)
        np.testing.assert_allclose(slopes, gradient, **CLOSE)
        assert (slopes[zero] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [
        *itertools.product(["uint8", "int32", "float32"], [3, 255]),
        *itertools.product(["int32", "float32"], [-1]),
        *itertools.product(["float32"], [1.5, np.nan]),
    ],
)
@pytest.mark.parametrize("cls", [SmoothedCrossentropy, DiceLoss])
def test_an_index_that_is_no_class_is_nan(cls, wrong, dtype):
    random = np.random.default_rng(0)
    outputs = random.normal(size=(2, 4, 3)).astype("float32")
    labels = random.integers(0, 3, (2, 4)).astype(dtype)
    expected = host(cls(reduction="none")(labels, outputs))
    labels[1, 2] = wrong
    for ignored in (None, 7):
        name = "ignore_label" if cls is DiceLoss else "ignore_class"
        loss = cls(reduction="none", **{name: ignored})
        found = host(loss(labels, outputs))
        np.testing.assert_array_equal(found[0], expected[0])
        bad = np.isnan(found[1])
        assert bad.all() if cls is DiceLoss else bad.tolist() == [0, 0, 1, 0]
    value, _ = value_and_gradient(lambda x: cls()(labels, x), outputs)
    assert np.isnan(value)
    if wrong in (255, -1):
        loss = cls(**{name: wrong})
        value, gradient = value_and_gradient(lambda x: loss(labels, x), outputs)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_dice_of_one_channel_refuses_what_is_no_share():
    outputs = np.zeros((2, 3, 1), "float32")
    loss = DiceLoss("sigmoid", reduction="none")
    labels = np.float32([[0, 0.5, 1], [0, 255, 255]])
    assert np.isnan(host(loss(labels, outputs))).tolist() == [[False], [True]]
    # An image of nothing else counts too.
    loss = DiceLoss("sigmoid", smooth=0.0)
    assert np.isnan(host(loss(labels[1:], outputs[1:])))


def test_dice_refuses_shares_that_are_none():
    outputs = np.zeros((1, 3, 2), "float32")
    shares = np.float32([[[0.5, 0.5], [1, 0], [0, 255]]])
    assert np.isnan(host(DiceLoss()(shares, outputs)))
    shares[0, 2, 1] = 1
    assert np.isfinite(host(DiceLoss()(shares, outputs)))


def test_crossentropy_takes_classes_that_cannot_be():
    """As torch.nn.functional.cross_entropy does."""
    logits = np.float32([[2, 1, -np.inf], [0, -np.inf, 0]])
    labels = np.array([0, 2])
    value, gradient = value_and_gradient(
        lambda x: SmoothedCrossentropy(0.0, reduction="sum")(labels, x), logits
    )
    p = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(value, -np.log(p) + np.log(2), **CLOSE)
    np.testing.assert_allclose(
        gradient, [[p - 1, 1 - p, 0], [0.5, 0, -0.5]], **CLOSE
    )
    impossible = SmoothedCrossentropy(0.0)(np.array([2]), logits[:1])
    assert host(impossible) == np.inf


NOTHING = {
    SigmoidFocalLoss: -1,
    SmoothedCrossentropy: 255,
    DiceLoss: 255,
}


@pytest.mark.parametrize("cls", NOTHING)
@pytest.mark.parametrize(
    "reduction", ["sum", "mean", "mean_with_sample_weight"]
)
def test_a_batch_of_which_nothing_counts_is_zero(cls, reduction):
    labels, logits = some_batch(cls)
    labels = np.full_like(labels, NOTHING[cls])
    logits[0] = np.nan  # what does not count may be anything
    ignoring = {
        SigmoidFocalLoss: {},
        SmoothedCrossentropy: {"ignore_class": 255},
        DiceLoss: {"ignore_label": 255},
    }[cls]
    loss = cls(reduction=reduction, **ignoring)
    value, gradient = value_and_gradient(lambda t: loss(labels, t), logits)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("cls", ALL)
def test_config_makes_the_same_loss_again(cls):
    labels, outputs = some_batch(cls)
    changes = {
        SigmoidFocalLoss: {"alpha": 0.4, "gamma": 1, "ignore_label": None},
        SmoothL1Loss: {"beta": 0.3},
        SmoothedCrossentropy: {"label_smoothing": 0.2, "ignore_class": 3},
        DiceLoss: {"activation": "sigmoid", "smooth": 2, "ignore_label": 1},
    }[cls]
    if cls is DiceLoss:
        labels = np.eye(3)[labels]
    loss = cls(**changes, reduction="sum", name="mine")
    config = json.loads(json.dumps(keras.losses.serialize(loss)))
    assert config["registered_name"] == f"legato>{cls.__name__}"
    again = keras.losses.deserialize(config)
    assert type(again) is cls
    assert again.get_config() == loss.get_config()
    assert again.name == "mine"
    assert host(again(labels, outputs)) == host(loss(labels, outputs))
    assert host(again(labels, outputs)) != host(
        cls(reduction="sum")(labels, outputs)
    )


@pytest.mark.parametrize("cls", ALL)
def test_half_precision_is_raised_and_a_policy_is_taken(cls):
    for dtype in ("float16", "bfloat16", "mixed_bfloat16", None):
        assert cls(dtype=dtype).dtype == "float32"
    assert cls(dtype="float64").dtype == "float64"
    # A sum far above what float16 can hold.
    if cls is SigmoidFocalLoss:
        logits = np.full((100, 10), 1e4, "float16")
        labels = np.zeros((100, 10), "int32")
        found = cls(alpha=None, dtype="float16")(labels, logits)
        np.testing.assert_allclose(host(found), 1e7, rtol=1e-6)


BAD = [
    (SigmoidFocalLoss, {"alpha": 1.5}, "alpha=1.5 must be a number from 0"),
    (SigmoidFocalLoss, {"alpha": float("nan")}, "alpha=nan must be"),
    (SigmoidFocalLoss, {"gamma": -1}, "gamma=-1 must be 0"),
    (SigmoidFocalLoss, {"gamma": True}, "gamma=True must be 0"),
    (SigmoidFocalLoss, {"ignore_label": 0.5}, "ignore_label=0.5 must be a lab"),
    (SigmoidFocalLoss, {"reduction": "avg"}, "reduction='avg' must be one of"),
    (SigmoidFocalLoss, {"dtype": "int32"}, "dtype='int32' must be a float"),
    (SigmoidFocalLoss, {"dtype": "half"}, "dtype='half' must be a float"),
    (SmoothL1Loss, {"beta": 0}, "beta=0 must be a number above 0"),
    (SmoothL1Loss, {"beta": "1"}, "beta='1' must be a number above 0"),
    (SmoothedCrossentropy, {"label_smoothing": 1}, "label_smoothing=1 must be"),
    (SmoothedCrossentropy, {"ignore_class": "x"}, "ignore_class='x' must be"),
    (
        SmoothedCrossentropy,
        {"reduction": "sum_over_positives"},
        "reduction='sum_over_positives' must be one of 'sum_over_batch_size'",
    ),
    (DiceLoss, {"activation": None}, "activation=None must be 'softmax' or"),
    (DiceLoss, {"smooth": -1}, "smooth=-1 must be 0"),
    (DiceLoss, {"ignore_label": True}, "ignore_label=True must be a label"),
]


@pytest.mark.parametrize("cls, arguments, message", BAD)
def test_a_bad_argument_is_named(cls, arguments, message):
    with pytest.raises(ConfigError) as caught:
        cls(**arguments)
    assert message in str(caught.value)
    assert cls.__name__ in str(caught.value)


def test_all_bad_arguments_are_named_at_once():
    with pytest.raises(ConfigError, match=r"alpha=2 .*gamma=-2 .*reduction=1"):
        SigmoidFocalLoss(alpha=2, gamma=-2, reduction=1)


@pytest.mark.parametrize(
    "loss, labels, outputs, weight, message",
    [
        (SigmoidFocalLoss(), (2, 3), (2, 3, 4), None, "must have (2, 3, 4)"),
        (SmoothL1Loss(), (2, 3, 1), (2, 3, 4), None, "must have (2, 3, 4)"),
        (SmoothL1Loss(), (2, 3, 4), (2, 3, 4), (3,), "sample_weight has the"),
        (SmoothedCrossentropy(), (2,), (3, 4), None, "must have (3,)"),
        (SmoothedCrossentropy(), (3,), (3, 4), (3, 4), "sample_weight has"),
        (DiceLoss(), (2, 3), (2, 4, 4, 3), None, "must have (2, 4, 4)"),
        (DiceLoss(), (2,), (2, 3), None, "at least one axis of pixels"),
        (DiceLoss(), (2, 3), (2, 3, 1), None, "activation='sigmoid'"),
    ],
)
def test_shapes_that_do_not_fit(loss, labels, outputs, weight, message):
    if weight is not None:
        weight = np.ones(weight)
    with pytest.raises(ConfigError) as caught:
        loss(np.zeros(labels), np.zeros(outputs), sample_weight=weight)
    assert message in str(caught.value)


def test_the_module_is_found_at_first_use(monkeypatch):
    chosen = []
    monkeypatch.delattr(legato, "losses")
    monkeypatch.setattr(
        backend_choice, "default_backend", lambda: chosen.append(True)
    )
    assert legato.losses.WeightedSum is WeightedSum
    assert chosen  # before Keras is imported


# --- sums


def make_sum(**changes):
    return WeightedSum(
        {"class": SigmoidFocalLoss(), "box": SmoothL1Loss()},
        **{"weights": {"box": 50.0}, **changes},
    )


def detections():
    labels, logits = random_anchors()
    targets, boxes, _ = random_boxes()
    positive = np.zeros((2, 6), "float32")
    positive[0, 1] = 1
    return (
        {"class": labels, "box": targets},
        {"class": logits, "box": boxes},
        {"box": positive},
    )


def test_a_sum_logs_its_parts_unweighted():
    labels, outputs, weights = detections()
    found = make_sum()(labels, outputs, sample_weights=weights)
    assert list(found) == ["loss", "class", "box"]
    of_class = SigmoidFocalLoss()(labels["class"], outputs["class"])
    of_box = SmoothL1Loss()(labels["box"], outputs["box"], weights["box"])
    assert host(found["class"]) == host(of_class)
    assert host(found["box"]) == host(of_box)
    np.testing.assert_allclose(
        host(found["loss"]), host(of_class) + 50 * host(of_box), rtol=1e-6
    )
    aux = [ops.convert_to_tensor(0.5), ops.convert_to_tensor(0.25)]
    more = make_sum(total="sum", auxiliary="decay")(
        labels, outputs, aux, weights
    )
    assert list(more) == ["sum", "class", "box", "decay"]
    assert host(more["decay"]) == 0.75
    np.testing.assert_allclose(
        host(more["sum"]), host(found["loss"]) + 0.75, rtol=1e-6
    )
    assert list(make_sum()(labels, outputs, [])) == ["loss", "class", "box"]


def test_a_part_may_be_a_callable_and_a_weight_a_variable():
    weight = keras.Variable(2.0, trainable=False)
    losses = WeightedSum(
        {
            "far": lambda y, x: ops.mean(ops.abs(x - y)),
            "near": lambda y, x: 1.0,
        },
        {"far": weight, "near": -3},
    )
    y, x = ops.zeros(4), ops.convert_to_tensor([1.0, 2.0, 3.0, 4.0])
    found = losses(y, x)
    assert {name: host(each) for name, each in found.items()} == {
        "loss": 2,
        "far": 2.5,
        "near": 1,
    }
    weight.assign(4.0)
    assert host(losses(y, x)["loss"]) == 7


def test_the_gradient_of_a_sum_is_weighted():
    loss = WeightedSum(
        {
            "class": lambda y, x: ops.sum(x**2),
            "box": lambda y, x: ops.sum(x),
        },
        {"box": 50.0},
    )
    _, gradient = value_and_gradient(
        lambda t: loss(None, t)["loss"], np.array([1.0, 2.0])
    )
    assert gradient.tolist() == [52, 54]


@pytest.mark.parametrize(
    "parts, changes, message",
    [
        ({}, {}, "parts={} must be a dict with at least one loss"),
        ([SmoothL1Loss()], {}, "must be a dict with at least one loss"),
        ({"a": "mse"}, {}, "parts['a']='mse' must be a keras.losses.Loss"),
        (
            {"a": len},
            {"weights": {"b": 1}},
            "weights has 'b', which is no part",
        ),
        ({"a": len}, {"weights": {"a": "1"}}, "weights['a']='1' must be a fin"),
        ({"a": len}, {"weights": {"a": np.inf}}, "weights['a']=inf must be"),
        ({"a": len}, {"weights": [1]}, "weights=[1] must be a dict"),
        ({"loss": len}, {}, "total='loss' must not be the name of anything"),
        ({"a": len}, {"auxiliary": "a"}, "auxiliary='a' must not be the name"),
        ({"a": len}, {"total": ""}, "the name '' must be a text"),
        ({1: len}, {}, "the name 1 must be a text"),
    ],
)
def test_a_bad_sum_is_refused(parts, changes, message):
    with pytest.raises(ConfigError) as caught:
        WeightedSum(parts, **changes)
    assert message in str(caught.value)


def test_what_does_not_fit_a_sum_is_named():
    labels, outputs, _ = detections()
    with pytest.raises(StepError, match=r"'box' in the labels.*\['class'\]"):
        make_sum()({"class": labels["class"]}, outputs)
    with pytest.raises(StepError, match=r"in the outputs, which are a list"):
        make_sum()(labels, [1, 2])
    with pytest.raises(StepError, match=r"sample_weights for \['boxes'\]"):
        make_sum()(labels, outputs, sample_weights={"boxes": 1})
    whole = WeightedSum({"a": lambda y, x: x})
    with pytest.raises(StepError, match=r"'a' of a WeightedSum has the shape"):
        whole(0.0, np.zeros(3))
    with pytest.raises(StepError, match=r"'a', which is a callable"):
        whole(0.0, 0.0, sample_weights={"a": 1})


# --- in a step


class Detector(legato.Task):
    """One label and one box for each of three anchors."""

    def __init__(self):
        self.losses = WeightedSum(
            {
                "class": SigmoidFocalLoss(alpha=None),
                "box": SmoothL1Loss(beta=0.1),
                "kind": SmoothedCrossentropy(ignore_class=255),
                "mask": DiceLoss(),
            },
            {"box": 2.0, "kind": 0.5},
        )

    def build_model(self):
        inputs = layers.Input((4,))
        flat = layers.Dense(35, kernel_regularizer="l2")(inputs)
        return keras.Model(
            inputs,
            {
                "class": layers.Reshape((3, 2))(flat[:, :6]),
                "box": layers.Reshape((3, 4))(flat[:, 6:18]),
                "kind": flat[:, 18:23],
                "mask": layers.Reshape((2, 2, 3))(flat[:, 23:]),
            },
        )

    def build_optimizer(self):
        return keras.optimizers.SGD(0.1)

    def build_inputs(self, split):
        random = np.random.default_rng(split == "train")
        x = random.normal(size=(32, 4)).astype("float32")
        top = (x[:, :3, None] > [0.5, -0.5]).astype("int32")
        top[:, 0, 0] = -1
        boxes = np.repeat(x[:, :3, None], 4, axis=2)
        boxes[x[:, :3] < 0] = np.nan
        kind = (x[:, 0] > 0) + 2 * (x[:, 1] > 0)
        labels = {
            "class": top,
            "box": boxes,
            "positive": (x[:, :3] >= 0).astype("float32"),
            "kind": np.where(x[:, 3] > 1, 255, kind).astype("int32"),
            "mask": (x.reshape(32, 2, 2) > 0) + 1,
        }
        return legato.ArraySource((x, labels), batch_size=8)

    def build_losses(self, labels, model_outputs, aux_losses=None):
        return self.losses(
            labels, model_outputs, aux_losses, {"box": labels["positive"]}
        )


def test_a_task_trains_on_a_sum(tmp_path):
    config = legato.TrainerConfig(epochs=6, progress="none")
    task = Detector()
    history = legato.Trainer(
        task, run_dir=tmp_path / "run", config=config
    ).train()
    found = {k: np.array(v) for k, v in history.history.items()}
    parts = ["class", "box", "kind", "mask"]
    for prefix in ("", "val_"):
        weighted = sum(
            found[prefix + name] * task.losses.weights[name] for name in parts
        )
        np.testing.assert_allclose(
            found[f"{prefix}loss"],
            weighted + found[f"{prefix}auxiliary"],
            rtol=1e-5,
        )
    for name in [*parts, "loss"]:
        assert np.isfinite(found[name]).all()
        assert found[name][-1] < found[name][0], name


def test_a_compiled_model_trains_on_them(tmp_path):
    labels, logits = random_anchors()
    model = keras.Sequential([layers.Input((10, 3)), layers.Dense(3)])
    model.compile("adam", SigmoidFocalLoss())
    inputs = logits, labels
    history = legato.fit(
        model, *inputs, epochs=1, verbose=0, run_dir=tmp_path / "run"
    )
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.parametrize(
    "loss", [SmoothedCrossentropy(), SigmoidFocalLoss(), DiceLoss()]
)
def test_half_precision_of_numpy_is_computed_in_float32(loss):
    rng = np.random.default_rng(0)
    x = (8 * rng.normal(size=(4, 6, 3))).astype(ml_dtypes.bfloat16)
    y = rng.integers(0, 3, (4, 6))
    if isinstance(loss, SigmoidFocalLoss):
        y = np.eye(3, dtype="float32")[y]
    expected = loss(y, x.astype("float32"))
    found = loss(y, x)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    assert float(found) == float(expected)


@pytest.mark.parametrize("labels", [[[1], [0]], [[0.0], [0.0]], [1, 0]])
def test_one_class_is_none(labels):
    with pytest.raises(ConfigError, match=r"\(2, 1\), with one class"):
        SmoothedCrossentropy()(np.array(labels), np.zeros((2, 1), "float32"))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
@pytest.mark.parametrize("smooth", [0, 1])
def test_the_dice_loss_of_nothing_is_nothing(shape, smooth):
    labels = np.zeros(shape[:-1], "int32")
    loss = DiceLoss(smooth=smooth)(labels, np.zeros(shape, "float32"))
    assert float(loss) == 0


def test_bad_use_of_a_weighted_sum_is_told():
    with pytest.raises(ConfigError, match=r"SmoothL1Loss.*is a class"):
        WeightedSum({"a": SmoothL1Loss})
    calls = []
    loss = WeightedSum({"a": lambda labels, outputs: calls.append(1)})
    with pytest.raises(StepError, match=r"'a'.*returned None"):
        loss({}, {})
    calls.clear()
    with pytest.raises(StepError, match=r"sample_weights for \['b'\]"):
        loss({}, {}, sample_weights={"b": 1})
    with pytest.raises(StepError, match="sample_weights of type list"):
        loss({}, {}, sample_weights=[1])
    with pytest.raises(StepError, match="aux_losses of type float"):
        loss({}, {}, aux_losses=0.5)
    assert not calls
