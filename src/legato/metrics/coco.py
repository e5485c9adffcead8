"""Detection and instance segmentation, measured as COCO does."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from legato.errors import ConfigError, DataError, LegatoWarning
from legato.metrics import coco_figures
from legato.metrics.arguments import require_bools
from legato.metrics.coco_batch import (
    BOX_FORMATS,
    Batch,
    check_finite,
    check_scale,
    read_boxes,
    read_masks,
    read_scales,
)
from legato.metrics.coco_figures import Detections, Image, Truths, whole
from legato.metrics.coco_file import AnnotationFile
from legato.metrics.host import HostMetric

BoxFormat = Literal["xyxy", "yxyx", "xywh"]
Size = tuple[int, int]
Rescale = tuple[np.ndarray, np.ndarray]
_T_co = TypeVar("_T_co", covariant=True)


class CocoMetric(HostMetric):
    """The figures of COCO: mean average precision and recall at IoU levels.

    `result()` has twelve of them, as the papers name them: `AP` (over IoU 0.5,
    0.55, ... 0.95), `AP50`, `AP75`, `APs`, `APm` and `APl` (objects below
    32 x 32 pixels, below 96 x 96, and larger), `AR1`, `AR10` and `AR100` (with
    so many detections in an image), `ARs`, `ARm` and `ARl`; the same with
    `mask_` before the name, if there are masks; and with `per_category` all of
    them for each category. A figure that is not defined, since no such object
    is in the images, is -1, as in COCO. The figures are over the images that
    came, also if the annotation file has more.

    Labels and outputs are dicts of NumPy arrays. Of the labels:

    | key | shape | |
    |---|---|---|
    | `source_id` | `[batch]` | the image's id, an int; below 0 is padding |
    | `boxes` | `[batch, N, 4]` | |
    | `classes` | `[batch, N]` | category ids; below 0 is padding |
    | `num_detections` | `[batch]` | optional: how many of the N there are |
    | `is_crowds` | `[batch, N]` | optional: 1 where an object is a crowd |
    | `areas` | `[batch, N]` | optional: in pixels of the original image |
    | `masks` | `[batch, N, H, W]` | with `include_mask` |
    | `height`, `width` | `[batch]` | optional: of the original images |
    | `image_info` | `[batch, 4, 2]` | with `need_rescale_bboxes` |
    | `image_scale` | `[batch]` or `[batch, 2]` | the same in brief: y, x |

    With an annotation file, only `source_id` and the last two are used. Of the
    outputs:

    | key | shape | |
    |---|---|---|
    | `detection_boxes` | `[batch, K, 4]` | |
    | `detection_classes` | `[batch, K]` | category ids; below 0 is padding |
    | `detection_scores` | `[batch, K]` | below 0 is padding |
    | `num_detections` | `[batch]` | optional: how many of the K there are |
    | `detection_masks` | `[batch, K, H, W]` | with `include_mask` |

    Boxes are in pixels. Masks are those of the original image, whole: bool or
    integer arrays (not 0 is inside) or float arrays (above 0.5 is inside),
    whose upper left `height` by `width` pixels count; or, for each image, a
    list of run lengths (`{"size": [height, width], "counts": ...}`). They are
    kept as run lengths. Where no `areas` are given, an object has the area of
    its mask, or without masks that of its box.

    Args:
        annotation_file: path of a JSON file in COCO's format that has the
            ground truth; None takes it from the labels.
        categories: names by category id; None takes them from the file, or
            takes the ids that the labels have as names.
        box_format: what the four numbers of all boxes in arrays are: "xyxy"
            (left, top, right, bottom), "yxyx" or "xywh" (left, top, width,
            height).
        include_mask: whether there are masks, which are then measured too.
        need_rescale_bboxes: whether boxes in arrays are those of a scaled
            image. `image_info` says how it came from the original: its rows
            are the original size, the desired size, the scale and the offset,
            each as y, x, and `scaled = original * scale - offset`.
        per_category: whether `result()` has a group `by_category` with a
            group for each name.
        name: of the metric.

    Raises:
        ConfigError: faster-coco-eval is not installed, the file cannot be read
            or is not of this format, or an argument is out of range.
    """

    def __init__(
        self,
        annotation_file: str | os.PathLike[str] | None = None,
        *,
        box_format: BoxFormat,
        categories: Mapping[int, str] | None = None,
        include_mask: bool = False,
        need_rescale_bboxes: bool = False,
        per_category: bool = False,
        name: str | None = "coco",
    ) -> None:
        super().__init__(name)
        require_bools(
            "CocoMetric",
            include_mask=include_mask,
            need_rescale_bboxes=need_rescale_bboxes,
            per_category=per_category,
        )
        if not isinstance(annotation_file, str | os.PathLike | None):
            raise ConfigError(
                f"CocoMetric(annotation_file={annotation_file!r:.80}): it must "
                "be the path of a file, or None."
            )
        if box_format not in BOX_FORMATS:
            raise ConfigError(
                f'CocoMetric(box_format={box_format!r}): it must be "xyxy", '
                '"yxyx" or "xywh".'
            )
        coco_figures.require_library()
        self._box_format = box_format
        self._include_mask = include_mask
        self._need_rescale = need_rescale_bboxes
        self._per_category = per_category
        self._file = None
        given = "categories=..."
        if annotation_file is not None:
            path = Path(annotation_file)
            self._file = AnnotationFile(path, with_masks=include_mask)
            if categories is None:
                categories = self._file.categories
                given = f"annotation_file={str(path)!r}"
        self._categories = _check_categories(categories, given)
        self._images: dict[int, Image] = {}
        self._warned = False

    def update_state(
        self, labels: Any, outputs: Any, sample_weight: Any = None
    ) -> None:
        """Take a batch.

        Args:
            labels: a dict, see the class.
            outputs: likewise.
            sample_weight: `[batch]`, 1 or 0; what has 0 is padding.

        Raises:
            DataError: something is missing, has another shape, or is not
                finite; a category is unknown; an image came before; ground
                truth has a box that ends before it begins (a detection that
                does counts as an empty one). Padding may be anything.
        """
        labels = Batch(labels, "labels")
        outputs = Batch(outputs, "outputs")
        ids = labels.get("source_id", ())
        if ids.dtype.kind not in "iu":
            raise DataError(
                f"CocoMetric: labels['source_id'] is of dtype {ids.dtype}: ids "
                "of images must be integers; floats lose digits. Number the "
                "images from 0 if their ids are too large for the backend."
            )
        outputs.size = len(ids)
        is_there = ids >= 0
        if sample_weight is not None:
            is_there &= _is_weighted(sample_weight, len(ids))
        scales = read_scales(labels) if self._need_rescale else None
        heights, widths = labels.find("height", ()), labels.find("width", ())
        needs_size = self._include_mask and self._file is None
        read_truths = self._truths(labels) if self._file is None else None
        read_detections = self._detections(outputs)
        # At once at the end: what is refused may be mended, and come again.
        came: dict[int, Image] = {}
        for row in np.flatnonzero(is_there):
            key = int(ids[row])
            if key in self._images or key in came:
                raise DataError(
                    f"CocoMetric: the image with source_id {key} came twice: "
                    "each counts once in a validation. Give each image an id "
                    "of its own, and padding a source_id of -1 or a "
                    "sample_weight of 0."
                )
            rescale = None if scales is None else scales[row]
            if rescale is not None:
                check_scale(rescale, key)
            size: Size | None = None
            if heights is not None and widths is not None and needs_size:
                size = _size(heights[row], widths[row], key)
            if read_truths is not None:
                truths, size = read_truths(int(row), key, size, rescale)
            else:
                truths, size = self._from_file(key)
            found, size = read_detections(int(row), key, size, rescale)
            came[key] = Image(size, truths, found)
        self._images |= came

    def result(self) -> dict[str, Any]:
        """The figures over the images since the last reset; see the class."""
        names = self._categories
        if names is None:
            seen = [each.truths.categories for each in self._images.values()]
            ids = np.unique(np.concatenate([np.zeros(0, int), *seen]))
            names = {int(each): str(each) for each in ids}
        figures: dict[str, Any] = {}
        groups: dict[str, dict[str, float]] = {
            name: {} for name in names.values()
        }
        for prefix, masks in (("", False), ("mask_", True)):
            if masks and not self._include_mask:
                continue
            total, each = coco_figures.figures(self._images, names, masks=masks)
            for group, values in (
                (figures, total),
                *((groups[names[key]], each[key]) for key in names),
            ):
                group |= {prefix + name: values[name] for name in values}
        if self._per_category:
            figures["by_category"] = groups
        return figures

    def reset_state(self) -> None:
        """Forget all images."""
        self._images = {}

    def _from_file(self, key: int) -> tuple[Truths, Size | None]:
        assert self._file is not None
        if key not in self._file.sizes:
            raise DataError(
                f"CocoMetric: there is no image with the id {key} in the "
                f"annotation file, but labels['source_id'] has it. The file "
                f"has {len(self._file.sizes)} images."
            )
        return self._file.truths(key), self._file.sizes[key]

    def _truths(self, labels: Batch) -> "_Read[Truths]":
        boxes = labels.get("boxes", (None, 4))
        count = boxes.shape[1]
        classes = labels.classes("classes", count)
        is_there = labels.counted(count) & (classes >= 0)
        areas = labels.find("areas", (count,))
        crowds = labels.find("is_crowds", (count,))
        masks = labels.masks("masks", count) if self._include_mask else None

        def read(
            row: int, key: int, size: Size | None, rescale: Rescale | None
        ) -> tuple[Truths, Size | None]:
            rows = np.flatnonzero(is_there[row])
            found = read_boxes(boxes[row, rows], self._box_format, rescale)
            check_finite(found, "labels['boxes']", key)
            self._check_known(classes[row, rows], "labels['classes']", key)
            if (found[:, 2:] < 0).any():
                raise DataError(
                    f"CocoMetric: {self._ends_early('labels', 'boxes', key)}"
                )
            rles = None
            if masks is not None:
                rles, size = read_masks(
                    masks[row], rows, size, "labels['masks']"
                )
            if areas is not None:
                area = areas[row, rows].astype(np.float64)
                check_finite(area, "labels['areas']", key)
                if (area < 0).any():
                    raise DataError(
                        f"CocoMetric: labels['areas'] of the image with "
                        f"source_id {key} has {area.min()}: an area must be at "
                        "least 0. What is no object must have a class below 0."
                    )
            elif rles is not None:
                area = coco_figures.areas(rles)
            else:
                area = found[:, 2] * found[:, 3]
            crowd = np.zeros(len(rows), bool)
            if crowds is not None:
                crowd = crowds[row, rows]
                if not np.isin(crowd, (0, 1)).all():
                    raise DataError(
                        f"CocoMetric: labels['is_crowds'] of the image with "
                        f"source_id {key} has {crowd.tolist()!s:.60}: it must "
                        "be 1 where an object is a crowd, and else 0. What is "
                        "no object must have a class below 0."
                    )
                crowd = crowd == 1
            return Truths(found, classes[row, rows], area, crowd, rles), size

        return read

    def _detections(self, outputs: Batch) -> "_Read[Detections]":
        boxes = outputs.get("detection_boxes", (None, 4))
        count = boxes.shape[1]
        classes = outputs.classes("detection_classes", count)
        scores = outputs.get("detection_scores", (count,)).astype(np.float64)
        is_there = outputs.counted(count) & (classes >= 0) & ~(scores < 0)
        masks = None
        if self._include_mask:
            masks = outputs.masks("detection_masks", count)

        def read(
            row: int, key: int, size: Size | None, rescale: Rescale | None
        ) -> tuple[Detections, Size | None]:
            rows = np.flatnonzero(is_there[row])
            found = read_boxes(boxes[row, rows], self._box_format, rescale)
            check_finite(found, "outputs['detection_boxes']", key)
            if (found[:, 2:] < 0).any():
                # (A detector that has learnt little may do so.)
                self._warn_of_order(key)
                found[:, 2:] = np.maximum(found[:, 2:], 0)
            check_finite(scores[row, rows], "outputs['detection_scores']", key)
            self._check_known(
                classes[row, rows], "outputs['detection_classes']", key
            )
            rles = None
            if masks is not None:
                rles, size = read_masks(
                    masks[row], rows, size, "outputs['detection_masks']"
                )
            return (
                Detections(found, classes[row, rows], scores[row, rows], rles),
                size,
            )

        return read

    def _ends_early(self, of: str, what: str, key: int) -> str:
        return (
            f"{of}[{what!r}] of the image with source_id {key} has a box that "
            f"ends before it begins. Is box_format={self._box_format!r} right? "
            "What is no object must have a class below 0."
        )

    def _warn_of_order(self, key: int) -> None:
        if self._warned:
            return
        self._warned = True
        found = self._ends_early("outputs", "detection_boxes", key)
        warnings.warn(
            f"{self.name}: {found} Such boxes count as empty ones. (This is "
            "said once.)",
            LegatoWarning,
            stacklevel=2,
        )

    def _check_known(self, classes: np.ndarray, where: str, key: int) -> None:
        if self._categories is None:
            return
        unknown = sorted({*classes.tolist()} - self._categories.keys())
        if unknown:
            raise DataError(
                f"CocoMetric: {where} of the image with source_id {key} has "
                f"{unknown}, and the ids of categories are "
                f"{_some(sorted(self._categories))}. Outputs must name "
                "categories by their ids, not by their position."
            )


class _Read(Protocol[_T_co]):
    """Reads what is in an image of the batch."""

    def __call__(
        self, row: int, key: int, size: Size | None, rescale: Rescale | None
    ) -> tuple[_T_co, Size | None]: ...


def _size(height: Any, width: Any, key: int) -> Size:
    try:
        size = whole(height), whole(width)
    except (TypeError, ValueError, OverflowError):
        size = 0, 0
    if min(size) < 1:
        raise DataError(
            f"CocoMetric: the image with source_id {key} has the height "
            f"{height} and the width {width}: they must be whole numbers above "
            "0, in pixels of the original image."
        )
    return size


def _some(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 12 else f"{ids[:12]}, ... ({len(ids)})"


def _is_weighted(sample_weight: Any, count: int) -> np.ndarray:
    weights = np.asarray(sample_weight)
    if weights.size != count or not np.isin(weights, (0, 1)).all():
        raise DataError(
            f"CocoMetric: sample_weight is of shape {weights.shape}, with "
            f"{np.unique(weights).tolist()!s:.60}: it must be one number for "
            f"each of {count} images, 0 for padding and 1 for others. COCO's "
            "figures have no weights."
        )
    return weights.reshape(-1) == 1


def _check_categories(
    categories: Mapping[int, str] | None, given: str
) -> dict[int, str] | None:
    if categories is None:
        return None
    names = list(categories.values()) if isinstance(categories, Mapping) else []
    if (
        not names
        or len(set(names)) < len(names)
        or not all(isinstance(each, str) for each in names)
        or not all(type(each) is int and each >= 0 for each in categories)
    ):
        raise ConfigError(
            f"CocoMetric({given}): the categories are {categories!r}. They "
            "must be a dict that is not empty, with different names by ids "
            'that are at least 0. Give such as categories={1: "person", 3: '
            '"car"}.'
        )
    return dict(categories)
