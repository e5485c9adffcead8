"""Boxes, masks and what belongs to them, read from a batch's arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from legato.errors import DataError
from legato.metrics import coco_figures
from legato.metrics.coco_figures import RLE
from legato.metrics.host import to_numpy

_TO_XYWH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "xyxy": lambda b: np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], axis=1),
    "yxyx": lambda b: _TO_XYWH["xyxy"](b[:, [1, 0, 3, 2]]),
    "xywh": lambda b: b,
}
BOX_FORMATS = tuple(_TO_XYWH)


class Batch:
    """One side of a batch: a dict of arrays, checked as they are read.

    Args:
        tree: the dict.
        role: "labels" or "outputs", for messages.

    Attributes:
        size: how many examples all arrays must have; set by the first.

    Raises:
        DataError: it is no dict.
    """

    def __init__(self, tree: Any, role: str) -> None:
        if not isinstance(tree, Mapping):
            raise DataError(
                f"CocoMetric: the {role} are of type {type(tree).__name__}: "
                "they must be a dict of arrays."
            )
        self._tree = tree
        self._role = role
        self.size: int | None = None

    def find(self, key: str, *shapes: tuple[int | None, ...]) -> Any:
        """An array of one of the shapes after the batch's axis, or None."""
        if self._tree.get(key) is None:
            return None
        array = to_numpy(self._tree[key])
        fits = array.ndim > 0 and (self.size in (None, len(array)))
        if not fits or not any(
            array.ndim == len(shape) + 1
            and all(map(_equal, array.shape[1:], shape))
            for shape in shapes
        ):
            batch = "batch" if self.size is None else self.size
            expected = " or ".join(
                str([batch, *("?" if n is None else n for n in shape)])
                for shape in shapes
            ).replace("'", "")
            raise DataError(
                f"CocoMetric: {self._role}[{key!r}] has the shape "
                f"{array.shape}: it must be {expected}."
            )
        self.size = len(array)
        return array

    def get(self, key: str, *shapes: tuple[int | None, ...]) -> np.ndarray:
        """An array that must be there."""
        array = self.find(key, *shapes)
        if array is None:
            raise DataError(
                f"CocoMetric: the {self._role} have no {key!r}; they have "
                f"{sorted(self._tree)}."
            )
        return array

    def classes(self, key: str, count: int) -> np.ndarray:
        """Category ids as int64; floats must be whole."""
        array = self.get(key, (count,))
        whole = np.asarray(array).astype(np.int64)
        if array.dtype.kind not in "iu" and not np.array_equal(whole, array):
            raise DataError(
                f"CocoMetric: {self._role}[{key!r}] has fractions: it must "
                "hold category ids."
            )
        return whole

    def counted(self, count: int) -> np.ndarray:
        """Which of the rows `num_detections` says are there: bool."""
        there = self.find("num_detections", ())
        if there is None:
            there = np.full(self.size or 0, count)
        # (Whatever NaN is compared with, it is wrong.)
        right = (there >= 0) & (there <= count) & (there == np.floor(there))
        if not right.all():
            raise DataError(
                f"CocoMetric: {self._role}['num_detections'] holds "
                f"{there[~right][0]}: it must be a whole number from 0 to "
                f"{count}, the number of rows of boxes."
            )
        return np.arange(count) < there[:, None]

    def masks(self, key: str, count: int) -> Any:
        """Arrays, or for each image a list of run lengths."""
        given = self._tree.get(key)
        if isinstance(given, Sequence) and not all(
            isinstance(each, np.ndarray) for each in given
        ):
            if len(given) != self.size or any(
                len(rles) != count for rles in given
            ):
                raise DataError(
                    f"CocoMetric: {self._role}[{key!r}] must have {count} run "
                    f"lengths for each of {self.size} images, as there are "
                    "boxes."
                )
            return given
        return self.get(key, (count, None, None))


def read_boxes(
    boxes: np.ndarray,
    box_format: str,
    rescale: tuple[np.ndarray, np.ndarray] | None,
) -> np.ndarray:
    """Boxes of an image as left, top, width and height, in float64.

    Args:
        boxes: `[objects, 4]`.
        box_format: what they are.
        rescale: scale and offset (each as y, x) that led to these; None where
            they are of the original image.
    """
    # What is not finite is refused later, by the name of its image.
    with np.errstate(invalid="ignore", divide="ignore"):
        boxes = _TO_XYWH[box_format](boxes.astype(np.float64))
        if rescale is None:
            return boxes
        scale, offset = (each.astype(np.float64)[::-1] for each in rescale)
        corner = (boxes[:, :2] + offset) / scale
        return np.concatenate([corner, boxes[:, 2:] / scale], axis=1)


def read_masks(
    masks: Any, rows: np.ndarray, size: tuple[int, int] | None, where: str
) -> tuple[list[RLE], tuple[int, int] | None]:
    """Masks of an image as run lengths, and the image's size.

    Args:
        masks: all of the image: an array, or a list of run lengths.
        rows: which of them to read.
        size: of the image; None takes that of the masks.
        where: they are, for messages.

    Raises:
        DataError: they have another size, or are no masks.
    """
    if not isinstance(masks, np.ndarray):
        try:
            rles = [coco_figures.compress(masks[row]) for row in rows]
        except (TypeError, ValueError) as error:
            raise DataError(f"CocoMetric: {where}: {error}.") from error
        for rle in rles:
            size = size or (rle["size"][0], rle["size"][1])
            if tuple(rle["size"]) != size:
                raise DataError(
                    f"CocoMetric: {where} has run lengths of size "
                    f"{rle['size']}, and the image has {list(size)}."
                )
        return rles, size
    size = size or (masks.shape[1], masks.shape[2])
    if masks.shape[1] < size[0] or masks.shape[2] < size[1]:
        raise DataError(
            f"CocoMetric: {where} has masks of {list(masks.shape[1:])} pixels, "
            f"and the image has {list(size)}: masks must be those of the whole "
            "original image."
        )
    chosen = masks[rows, : size[0], : size[1]]
    if chosen.dtype.kind == "f" and np.isnan(chosen).any():
        raise DataError(
            f"CocoMetric: {where} has NaN: a mask must be bool, integers, or "
            "floats of which those above 0.5 are inside."
        )
    return coco_figures.encode(
        chosen > 0.5 if chosen.dtype.kind == "f" else chosen != 0
    ), size


def read_scales(labels: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each image the scale and the offset, as y and x.

    Raises:
        DataError: neither `image_info` nor `image_scale` is there.
    """
    info = labels.find("image_info", (4, 2))
    if info is not None:
        return [(each[2], each[3]) for each in info]
    scale = labels.find("image_scale", (), (2,))
    if scale is None:
        raise DataError(
            "CocoMetric(need_rescale_bboxes=True): the labels have neither "
            "'image_info' nor 'image_scale', which say how images were scaled."
        )
    return [(np.broadcast_to(each, 2), np.zeros(2)) for each in scale]


def check_scale(rescale: tuple[np.ndarray, np.ndarray], image: int) -> None:
    """Refuse what cannot have led to an image.

    Raises:
        DataError: a scale is not above 0, or something is not finite.
    """
    scale, offset = rescale
    is_finite = np.isfinite(scale).all() and np.isfinite(offset).all()
    if not is_finite or not (scale > 0).all():
        raise DataError(
            f"CocoMetric: the image with source_id {image} has the scale "
            f"{scale.tolist()} and the offset {offset.tolist()} (image_info or "
            "image_scale): they must be finite, and the scale above 0."
        )


def check_finite(values: np.ndarray, key: str, image: int) -> None:
    """Refuse what would be compared wrongly in silence.

    Raises:
        DataError: one is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise DataError(
            f"CocoMetric: {key} of the image with source_id {image} are not "
            "finite: there are NaN or infinite numbers among them. Clip boxes "
            "to the image, or mark what is no object with a class below 0."
        )


def _equal(size: int, expected: int | None) -> bool:
    return expected is None or size == expected
