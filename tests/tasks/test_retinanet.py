"""RetinaNet: losses and detections, by hand."""

import keras
import numpy as np
import pytest

from legato.tasks import RetinaNetTask
from tests.contracts.garden import Detection


def on_host(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def make_task(**changes):
    arguments = {
        "image_size": (16, 16),
        "levels": (3,),
        "anchor_size": 1.0,
        "anchor_scales": (1.0,),
        "anchor_ratios": (1.0,),
        "max_detections": 4,
        **changes,
    }
    return RetinaNetTask(["a", "b"], **arguments)


def outputs_of(logits, codes=0.0):
    # The four anchors are the quarters of the image.
    return {
        "classes": np.array([logits], "float32"),
        "boxes": np.broadcast_to(np.float32(codes), (1, 4, 4)).copy(),
    }


def test_losses_by_hand():
    task = make_task(box_weight=3.0)
    labels = {
        "boxes": np.array([[[0, 0, 8, 8], [9, 8, 17, 16]]], "float32"),
        "classes": np.array([[1, -1]]),  # the second is no object
    }
    losses = task.build_losses(labels, outputs_of(np.zeros((4, 2)), 0.02))
    # One of eight labels is positive: alpha * 0.5**2 * log(2), divided by 1.
    focal = (0.25 + 7 * 0.75) * 0.25 * np.log(2)
    np.testing.assert_allclose(on_host(losses["class_loss"]), focal, rtol=1e-5)
    box = 4 * 0.02**2 / (2 * 0.1)
    np.testing.assert_allclose(on_host(losses["box_loss"]), box, rtol=1e-4)
    np.testing.assert_allclose(
        on_host(losses["loss"]), focal + 3 * box, rtol=1e-5
    )


def test_detections_by_hand():
    task = make_task()
    logits = np.full((4, 2), -9.0)
    logits[2, 1], logits[0, 0], logits[3, 1] = 2.0, 1.0, 0.0
    codes = np.zeros((4, 4))
    codes[3, 0] = -9.0  # 7.2 to the left: nearly where the third is
    codes[0, :2] = -2.5  # 2 to the left and up: beyond the edge
    found = task.detect(outputs_of(logits, codes))
    boxes, classes, scores = (
        on_host(found[f"detection_{name}"])[0]
        for name in ("boxes", "classes", "scores")
    )
    assert classes[:3].tolist() == [1, 0, 1]
    np.testing.assert_allclose(boxes[0], [0, 8, 8, 16], atol=1e-5)
    np.testing.assert_allclose(boxes[1], [0, 0, 6, 6], atol=1e-5)
    sigmoid = 1 / (1 + np.exp(-np.array([2.0, 1.0])))
    np.testing.assert_allclose(scores[:2], sigmoid, rtol=1e-5)
    assert scores[2] == -1  # suppressed by the first


@pytest.mark.any_backend
def test_at_first_everything_is_background():
    model = Detection().build_model()
    # A place of 2 or of 4 pixels has one anchor.
    shapes = sorted(model.output_shape)
    assert shapes == [(None, 64 + 16, 2), (None, 64 + 16, 4)]
    bias = on_host(model.get_layer("classes").layers[-2].bias)
    np.testing.assert_allclose(1 / (1 + np.exp(-bias)), 0.01, rtol=1e-4)


@pytest.mark.any_backend
def test_what_is_drawn():
    task = make_task(shown=1)
    logs = {
        "images": np.zeros((1, 16, 16, 3), np.uint8),
        "boxes": np.array([[[2, 2, 8, 8], [0, 0, 0, 0]]], "float32"),
        "classes": np.array([[1, -1]]),
        "detection_boxes": np.array([[[4, 4, 12, 12], [0, 0, 9, 9]]]),
        "detection_classes": np.array([[0, 1]]),
        "detection_scores": np.array([[0.9, 0.1]]),
    }
    state = task.aggregate_logs(None, {"drawn": logs})
    found = task.reduce_aggregated_logs(state, 3)["detections"]
    assert found.shape == (1, 48, 96, 3)
    wanted, detected = found[0, :, :48], found[0, :, 48:]
    for picture, first, last in ((wanted, 6, 23), (detected, 12, 35)):
        rows, columns = np.nonzero(picture.any(axis=-1))
        corners = rows.min(), columns.min(), rows.max(), columns.max()
        assert corners == (first, first, last, last)
