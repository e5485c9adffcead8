"""COCO's figures, from what was found in images and what is there.

The matching and the curves are faster-coco-eval's. It is imported when it is
first needed.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from legato.errors import ConfigError

RLE = dict[str, Any]
"""A mask, as `{"size": [height, width], "counts": bytes}`."""

# Of each figure: recall or precision, at which IoU (None: the mean over all,
# 0: 0.5, 5: 0.75), of which objects (0: all, 1: small, 2: medium, 3: large),
# and with how many detections in an image (0: 1, 1: 10, 2: 100).
_FIGURES = {
    "AP": ("precision", None, 0, 2),
    "AP50": ("precision", 0, 0, 2),
    "AP75": ("precision", 5, 0, 2),
    "APs": ("precision", None, 1, 2),
    "APm": ("precision", None, 2, 2),
    "APl": ("precision", None, 3, 2),
    "AR1": ("recall", None, 0, 0),
    "AR10": ("recall", None, 0, 1),
    "AR100": ("recall", None, 0, 2),
    "ARs": ("recall", None, 1, 2),
    "ARm": ("recall", None, 2, 2),
    "ARl": ("recall", None, 3, 2),
}


@dataclasses.dataclass(frozen=True)
class Truths:
    """The objects that are in an image.

    Attributes:
        boxes: float64 of `[objects, 4]`: left, top, width, height in pixels.
        categories: int64 of `[objects]`, ids.
        areas: float64 of `[objects]`, in square pixels.
        crowds: bool of `[objects]`: a region of many, which detections may
            be in without being wrong.
        masks: one for each object, as faster-coco-eval reads them, or None.
    """

    boxes: np.ndarray
    categories: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray
    masks: list[Any] | None


@dataclasses.dataclass(frozen=True)
class Detections:
    """What a model found in an image.

    Attributes:
        boxes: float64 of `[objects, 4]`: left, top, width, height in pixels.
        categories: int64 of `[objects]`, ids.
        scores: float64 of `[objects]`.
        masks: one for each object, or None.
    """

    boxes: np.ndarray
    categories: np.ndarray
    scores: np.ndarray
    masks: list[RLE] | None


@dataclasses.dataclass(frozen=True)
class Image:
    """An image, with what is in it and what was found.

    Attributes:
        size: height and width in pixels; needed where there are masks.
        truths: what is there.
        detections: what was found.
    """

    size: tuple[int, int] | None
    truths: Truths
    detections: Detections


def require_library() -> None:
    """Import faster-coco-eval.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "CocoMetric needs faster-coco-eval, which cannot be imported: run "
            "pip install 'legato[coco]'."
        ) from error


def encode(masks: np.ndarray) -> list[RLE]:
    """Masks as run lengths.

    Args:
        masks: bool of `[objects, height, width]`.
    """
    from faster_coco_eval import mask

    if not len(masks):
        return []
    columns = np.asfortranarray(masks.transpose(1, 2, 0), np.uint8)
    return mask.encode(columns)  # pyright: ignore[reportReturnType]


def compress(rle: Any) -> RLE:
    """Run lengths, given as a list, str or bytes, with counts as bytes.

    Raises:
        ValueError: they are none, or not those of an image of this size. (The
            library would read on behind them, or never come back.)
    """
    from faster_coco_eval import mask

    if not isinstance(rle, Mapping) or not {"size", "counts"} <= rle.keys():
        raise ValueError(
            f"{rle!r:.60} are no run lengths, which are a dict of `size` and "
            "`counts`"
        )
    size = [whole(each) for each in rle["size"]]
    if len(size) != 2 or min(size) < 1:
        raise ValueError(
            f"run lengths have the size {rle['size']!r:.60}: it must be a "
            "height and a width of at least 1"
        )
    counts = rle["counts"]
    if isinstance(counts, str | bytes):
        # (A str may hold anything; what is not ASCII is no run length.)
        code = counts.encode() if isinstance(counts, str) else counts
        runs = _decoded(code)
    else:
        runs = [whole(each) for each in counts]
    if min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
        raise ValueError(
            f"run lengths of the size {size} add up to {sum(runs)}, and the "
            f"least is {min(runs, default=0)}: they must be at least 0, and "
            f"add up to height * width, {size[0] * size[1]}"
        )
    if isinstance(counts, str | bytes):
        return {"size": size, "counts": code}
    plain = {"size": size, "counts": runs}
    return mask.frPyObjects(plain, *size)  # pyright: ignore


def _decoded(code: bytes) -> list[int]:
    """The run lengths that COCO's compressed form stands for.

    Six bits a character, from the least on: five of the number, and whether
    more follow. From the fourth on a number is the difference from the one
    but one before.

    Raises:
        ValueError: it ends within a number, or has other characters.
    """
    runs: list[int] = []
    number = shift = 0
    for byte in code:
        bits = byte - 48
        if not 0 <= bits < 64:
            raise ValueError(f"run lengths have the character {chr(byte)!r}")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    if shift:
        raise ValueError("run lengths end within a number")
    return runs


def whole(value: Any) -> int:
    """An int, of what may be NumPy's or a whole float.

    Raises:
        ValueError: it is no whole number.
    """
    try:
        number = int(value)
    except OverflowError:
        number = None
    if number is None or number != value:
        raise ValueError(f"{value!r} is no whole number")
    return number


def areas(masks: list[RLE]) -> np.ndarray:
    """How many pixels are in each mask, as float64."""
    from faster_coco_eval import mask

    if not masks:
        return np.zeros(0)
    return np.asarray(mask.area(masks), np.float64)


def figures(
    images: Mapping[int, Image], categories: Iterable[int], *, masks: bool
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """COCO's twelve figures.

    Args:
        images: by id.
        categories: ids of those that count.
        masks: whether to compare masks, not boxes.

    Returns:
        Over all categories, and for each one. What is not defined, because no
        object of the kind is in the images, is -1, as in COCO.
    """
    ids = sorted(categories)
    curves = _curves(images, ids, masks) if images and ids else None

    def read(which: slice) -> dict[str, float]:
        return {
            name: -1.0 if curves is None else _mean(curves, figure, which)
            for name, figure in _FIGURES.items()
        }

    by_category = {
        category: read(slice(index, index + 1))
        for index, category in enumerate(ids)
    }
    return read(slice(None)), by_category


def _mean(
    curves: Mapping[str, np.ndarray],
    figure: tuple[str, int | None, int, int],
    categories: slice,
) -> float:
    which, iou, area, limit = figure
    values = curves[which][..., categories, area, limit]
    if iou is not None:
        values = values[iou]
    defined = values[values > -1]
    return float(np.mean(defined)) if len(defined) else -1.0


def _curves(
    images: Mapping[int, Image], categories: list[int], masks: bool
) -> Mapping[str, np.ndarray]:
    """Precisions by IoU, recall, category, area, limit; recalls likewise."""
    from faster_coco_eval import COCO, COCOeval_faster

    about = {
        "images": [_image(key, image) for key, image in images.items()],
        "categories": [{"id": each, "name": str(each)} for each in categories],
    }
    truths = COCO({**about, "annotations": _of_truths(images, masks)})
    found = COCO({**about, "annotations": _of_detections(images, masks)})
    evaluator = COCOeval_faster(truths, found, "segm" if masks else "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator.eval


def _image(key: int, image: Image) -> dict[str, int]:
    height, width = image.size or (0, 0)
    return {"id": key, "height": height, "width": width}


def _of_truths(
    images: Mapping[int, Image], masks: bool
) -> list[dict[str, Any]]:
    annotations = []
    for key, image in images.items():
        each = image.truths
        for index in range(len(each.boxes)):
            annotation = {
                # From 1: an object with the id 0 counts as not found.
                "id": len(annotations) + 1,
                "image_id": key,
                "category_id": int(each.categories[index]),
                "bbox": each.boxes[index].tolist(),
                "area": float(each.areas[index]),
                "iscrowd": int(each.crowds[index]),
            }
            if masks and each.masks is not None:
                annotation["segmentation"] = each.masks[index]
            annotations.append(annotation)
    return annotations


def _of_detections(
    images: Mapping[int, Image], masks: bool
) -> list[dict[str, Any]]:
    annotations = []
    for key, image in images.items():
        each = image.detections
        if masks and each.masks is not None:
            sizes = areas(each.masks)
        else:
            sizes = each.boxes[:, 2] * each.boxes[:, 3]
        for index in range(len(each.boxes)):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": key,
                "category_id": int(each.categories[index]),
                "bbox": each.boxes[index].tolist(),
                "score": float(each.scores[index]),
                "area": float(sizes[index]),
                "iscrowd": 0,
            }
            if masks and each.masks is not None:
                annotation["segmentation"] = each.masks[index]
            annotations.append(annotation)
    return annotations
