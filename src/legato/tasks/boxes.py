"""Boxes of dense detectors: anchors, what they are to find, what they found.

Boxes are "xyxy": left, top, right, bottom, in pixels of the image.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops
from keras.utils import bounding_boxes

_VARIANCE = (0.1, 0.1, 0.2, 0.2)
"""Codes are divided by these, which gives them a spread of about 1."""

_MAX_LOG_SCALE = math.log(1000 / 16) / _VARIANCE[2]
"""A larger code for a width or a height would soon be an infinite box."""


def make_anchors(
    image_size: tuple[int, int],
    levels: Sequence[int],
    size: float,
    scales: Sequence[float],
    ratios: Sequence[float],
) -> np.ndarray:
    """The anchors of all places of a feature pyramid.

    Args:
        image_size: height and width, in pixels.
        levels: of the pyramid: a place of level l is for a square of `2**l`
            pixels, in whose middle the centres of its anchors lie.
        size: of a square anchor of scale 1, in places of its level.
        scales: by which anchors are larger than that.
        ratios: of heights to widths, at the same area.

    Returns:
        float32 `[anchors, 4]`, in the order of levels, rows, columns, scales
        and ratios. Some reach beyond the image.
    """
    found = []
    for level in levels:
        stride = 2**level
        halves = np.array(
            [
                (side / math.sqrt(ratio) / 2, side * math.sqrt(ratio) / 2)
                for side in (size * stride * scale for scale in scales)
                for ratio in ratios
            ]
        )
        rows, columns = (-(-pixels // stride) for pixels in image_size)
        y, x = np.mgrid[:rows, :columns] * stride + stride / 2
        centres = np.stack([x, y], axis=-1)[:, :, None]
        corners = np.concatenate([centres - halves, centres + halves], axis=-1)
        found.append(corners.reshape(-1, 4))
    return np.concatenate(found).astype("float32")


class Targets(NamedTuple):
    """What each anchor is to find.

    Attributes:
        classes: `[batch, anchors]`, int32: the class of its box; -1 for
            background; -2 where neither is asked for.
        codes: `[batch, anchors, 4]`: its box, as `encode` has it; without
            meaning for other anchors.
    """

    classes: Any
    codes: Any


def match(
    anchors: Any,
    boxes: Any,
    classes: Any,
    positive: float = 0.5,
    negative: float = 0.4,
) -> Targets:
    """Match each anchor with the box that it overlaps most.

    It is to find that box if their IoU is at least `positive`; or if it is the
    (first) anchor of the greatest IoU with some box, so that small and odd
    ones are found too. With less than `negative` it is background, and in
    between it is left alone.

    Args:
        anchors: `[anchors, 4]`.
        boxes: `[batch, objects, 4]`.
        classes: `[batch, objects]`; below 0 is no object.
        positive: see above.
        negative: see above.
    """
    is_there = ops.expand_dims(classes >= 0, axis=1)
    overlaps = bounding_boxes.compute_iou(anchors, boxes, "xyxy")
    overlaps = ops.where(is_there, overlaps, -1.0)
    most = ops.max(overlaps, axis=2)
    closest = ops.one_hot(ops.argmax(overlaps, axis=1), len(anchors), axis=1)
    is_closest = ops.any((closest > 0) & (overlaps > 0), axis=2)
    mine = ops.argmax(overlaps, axis=2)
    found = ops.take_along_axis(ops.cast(classes, "int32"), mine, axis=1)
    others = ops.where(most < negative, -1, -2)
    return Targets(
        ops.where((most >= positive) | is_closest, found, others),
        encode(anchors, ops.take_along_axis(boxes, mine[:, :, None], axis=1)),
    )


def encode(anchors: Any, boxes: Any) -> Any:
    """How boxes differ from their anchors.

    Args:
        anchors: `[anchors, 4]`.
        boxes: `[batch, anchors, 4]`.

    Returns:
        `[batch, anchors, 4]`: of the centres' x and y, in widths and heights
        of the anchor, and the logarithms of widths and heights.
    """
    return bounding_boxes.encode_box_to_deltas(
        anchors, boxes, "xyxy", "xyxy", "center_xywh", _VARIANCE
    )


def decode(anchors: Any, codes: Any) -> Any:
    """The boxes of codes; the inverse of `encode`."""
    codes = ops.concatenate(
        [codes[..., :2], ops.minimum(codes[..., 2:], _MAX_LOG_SCALE)], axis=-1
    )
    return bounding_boxes.decode_deltas_to_boxes(
        anchors, codes, "xyxy", "xyxy", "center_xywh", _VARIANCE
    )


def suppress(boxes: Any, classes: Any, threshold: float = 0.5) -> Any:
    """Non-maximum suppression within classes.

    Args:
        boxes: `[batch, boxes, 4]`, the best first.
        classes: `[batch, boxes]`.
        threshold: a box is left out if a better one of its class, which is
            not left out itself, has a greater IoU with it.

    Returns:
        Which boxes are kept, bool `[batch, boxes]`.
    """
    count = boxes.shape[1]
    boxes, classes = map(ops.convert_to_tensor, (boxes, classes))
    same = classes[:, :, None] == classes[:, None, :]
    later = ops.triu(ops.ones((count, count), dtype="bool"), k=1)
    overlaps = bounding_boxes.compute_iou(boxes, boxes, "xyxy")
    # `leaves_out[:, i]`: those that box i leaves out, if it is kept.
    leaves_out = same & later & (overlaps > threshold)

    def next_box(i: Any, kept: Any) -> Any:
        is_kept = ops.take(kept, i, axis=1)[:, None]
        return kept & ~(is_kept & ops.take(leaves_out, i, axis=1))

    kept = ops.ones_like(classes, dtype="bool")
    return ops.fori_loop(0, count, next_box, kept)
