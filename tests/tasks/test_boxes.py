"""Anchors, matching, coding and suppression: by hand, and one by one."""

import keras
import numpy as np
import pytest

from legato.tasks import boxes


def on_host(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return width * height / (sum(area) - width * height)


def random_boxes(random, *shape, size=64):
    corner = random.uniform(0, 0.7 * size, (*shape, 2))
    sides = random.uniform(4, 0.5 * size, (*shape, 2))
    return np.concatenate([corner, corner + sides], -1).astype("float32")


# Anchors.


@pytest.mark.any_backend
def test_anchors_by_hand():
    found = boxes.make_anchors((8, 12), (2, 3), 2.0, (1.0, 2.0), (1.0, 4.0))
    # 2 by 3 places of 4 pixels, 1 by 2 of 8 pixels, four anchors in each.
    assert found.shape == ((6 + 2) * 4, 4) and found.dtype == np.float32
    np.testing.assert_array_equal(
        found[:4],  # around (2, 2); of a side of 8, then of 16
        [[-2, -2, 6, 6], [0, -6, 4, 10], [-6, -6, 10, 10], [-2, -14, 6, 18]],
    )
    np.testing.assert_array_equal(found[4], [2, -2, 10, 6])  # to the right
    np.testing.assert_array_equal(found[12], [-2, 2, 6, 10])  # a row further
    np.testing.assert_array_equal(found[24], [-4, -4, 12, 12])
    np.testing.assert_array_equal(found[28], [4, -4, 20, 12])
    # An image that is no multiple has places for what is left over.
    assert len(boxes.make_anchors((9, 5), (2,), 1.0, (1.0,), (1.0,))) == 3 * 2


# Matching.


def test_matching_by_hand():
    anchors = np.array(
        [
            [0, 0, 10, 10],  # the first box itself
            [0, 0, 10, 16],  # IoU 0.625
            [0, 0, 10, 22],  # IoU 0.4545: left alone
            [0, 0, 10, 30],  # IoU 0.3333: background
            [40, 40, 60, 60],  # IoU 0.25, and the second box has no better
            [80, 80, 90, 90],  # only what is no object is there
        ],
        "float32",
    )
    objects = [[[0, 0, 10, 10], [40, 40, 50, 50], [80, 80, 90, 90]]]
    targets = boxes.match(
        anchors, np.array(objects, "float32"), np.array([[3, 7, -1]])
    )
    assert on_host(targets.classes).tolist() == [[3, 3, -2, -1, 7, -1]]
    codes = on_host(targets.codes)[0]
    np.testing.assert_allclose(codes[0], 0, atol=1e-6)
    # Its centre is 3 of 16 pixels higher, its height 10 of 16.
    np.testing.assert_allclose(
        codes[1], [0, -3 / 16 / 0.1, 0, np.log(10 / 16) / 0.2], rtol=1e-5
    )
    np.testing.assert_allclose(
        codes[4], [-2.5, -2.5, *[np.log(0.5) / 0.2] * 2], rtol=1e-5
    )


def matched(anchors, objects, classes):
    """One anchor after the other."""
    overlaps = np.array(
        [
            [
                iou(anchor, box) if index >= 0 else -1
                for box, index in zip(objects, classes, strict=True)
            ]
            for anchor in anchors
        ]
    )
    found, codes = [], []
    for anchor, row in zip(anchors, overlaps, strict=True):
        box = objects[row.argmax()]
        is_closest = any(
            column.argmax() == len(found) and column.max() > 0
            for column in overlaps.T
        )
        if row.max() >= 0.5 or is_closest:
            found.append(classes[row.argmax()])
        else:
            found.append(-1 if row.max() < 0.4 else -2)
        width, height = anchor[2:] - anchor[:2]
        codes.append(
            [
                (box[0] + box[2] - anchor[0] - anchor[2]) / 2 / width / 0.1,
                (box[1] + box[3] - anchor[1] - anchor[3]) / 2 / height / 0.1,
                np.log((box[2] - box[0]) / width) / 0.2,
                np.log((box[3] - box[1]) / height) / 0.2,
            ]
        )
    return found, codes


def test_matching_against_loops():
    random = np.random.default_rng(0)
    # Whole numbers, so that what ties does so however it is rounded.
    anchors = boxes.make_anchors((64, 64), (2, 3), 4, (1, 1.5), (0.25, 1, 4))
    objects = np.round(random_boxes(random, 4, 5))
    classes = random.integers(-1, 6, (4, 5))
    classes[3] = -1  # nothing is there at all
    targets = boxes.match(anchors, objects, classes)
    found, codes = on_host(targets.classes), on_host(targets.codes)
    assert set(found.ravel()) >= {-2, -1, 0, 1, 2, 3}
    for row in range(4):
        expected = matched(anchors.astype(float), objects[row], classes[row])
        np.testing.assert_array_equal(found[row], expected[0])
        chosen = found[row] >= 0
        np.testing.assert_allclose(
            codes[row][chosen],
            np.array(expected[1])[chosen],
            rtol=1e-4,
            atol=1e-4,
        )
    assert (found[3] == -1).all()


# Coding.


def test_decoding_by_hand_and_as_the_inverse():
    anchors = np.array([[10, 20, 30, 60]], "float32")
    codes = np.array([[[1.0, -0.5, 0.0, 5 * np.log(2)]]], "float32")
    # The centre (20, 40) moves by 0.1 * 20 and -0.05 * 40; twice as high.
    np.testing.assert_allclose(
        on_host(boxes.decode(anchors, codes))[0, 0], [12, -2, 32, 78], rtol=1e-5
    )
    random = np.random.default_rng(1)
    anchors, objects = random_boxes(random, 20), random_boxes(random, 3, 20)
    again = boxes.decode(anchors, boxes.encode(anchors, objects))
    np.testing.assert_allclose(on_host(again), objects, rtol=1e-4, atol=1e-3)
    wild = np.full((1, 20, 4), 1e6, "float32")
    assert np.isfinite(on_host(boxes.decode(anchors, wild))).all()


# Suppression.


def kept_one_by_one(found, classes, threshold):
    kept = []
    for i in range(len(found)):
        kept.append(
            not any(
                kept[j]
                and classes[j] == classes[i]
                and iou(found[j], found[i]) > threshold
                for j in range(i)
            )
        )
    return kept


def test_suppression():
    row = [[0, 0, 10, 10], [0, 2, 10, 11], [0, 5, 10, 13], [0, 0, 10, 10]]
    found = boxes.suppress(
        np.array([row], "float32"), np.array([[1, 1, 1, 2]]), 0.45
    )
    # The second falls to the first (8/11), and so the third stays, which it
    # would have left out (6/11). The fourth is of another class.
    assert on_host(found).tolist() == [[True, False, True, True]]
    random = np.random.default_rng(2)
    many, classes = random_boxes(random, 3, 60), random.integers(0, 3, (3, 60))
    found = on_host(boxes.suppress(many, classes, 0.3))
    for each, its_classes, kept in zip(many, classes, found, strict=True):
        assert kept.tolist() == kept_one_by_one(each, its_classes, 0.3)
    assert 0.2 < found.mean() < 0.9
