"""Annotations of objects in images, in the format of COCO."""

import json
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from legato.errors import ConfigError, DataError
from legato.files.images import ImageReader, Path_


class CocoDetection:
    """Images with the objects in them, as COCO's annotation files give them.

    `dataset[i]` is `(image, labels)`: a uint8 array `[height, width, 3]`, and
    a dict whose names are those that `legato.metrics.CocoMetric` takes, for n
    objects:

    | key | shape and dtype | |
    |---|---|---|
    | `source_id` | int64 | the image's id |
    | `boxes` | `[n, 4]` float32 | left, top, right, bottom, in pixels of `image` |
    | `classes` | `[n]` int32 | 0 to K - 1: `category_ids` in their order |
    | `is_crowds` | `[n]` bool | |
    | `areas` | `[n]` float32 | in pixels of the original image |
    | `annotation_ids` | `[n]` int64 | |
    | `height`, `width` | int32 | of the original image |
    | `image_scale` | `[2]` float32 | of `image` to the original: y, x |
    | `masks` | `[n, height, width]` bool | with `masks`: original pixels |

    Images come in the order of their ids, and objects in that of theirs.
    Examples have different numbers of objects:
    `collate=legato.Pad(dataset.padding)` makes batches of them, in which the
    class of what is no object is -1.

    Args:
        annotation_file: a JSON file with "images", "annotations" and
            "categories".
        image_dir: the folder of the images' files.
        image_size: `(height, width)` that images, and boxes with them, are
            resized to; None leaves them as they are.
        masks: read the objects' masks too; needs `legato[coco]`.

    Attributes:
        category_ids: the ids of the categories, ascending.
        class_names: their names.
        image_ids: of the images.
        padding: what `legato.Pad` is to fill up with.

    Raises:
        DataError: the file is not what it should be; the message says where.
        ConfigError: another argument is wrong, or a library is missing.
    """  # noqa: E501 - rows of a table

    def __init__(
        self,
        annotation_file: Path_,
        image_dir: Path_,
        *,
        image_size: tuple[int, int] | None = None,
        masks: bool = False,
    ) -> None:
        self._reader = ImageReader(image_size, 3)
        if masks:
            _mask_module()
        self._masks = masks
        self._folder = os.fspath(image_dir)
        self._path = os.fspath(annotation_file)
        file = _File(self._path)
        self.category_ids = sorted(file.categories)
        self.class_names = [file.categories[i] for i in self.category_ids]
        self.image_ids = sorted(file.images)
        self._names = [file.images[i] for i in self.image_ids]
        self._objects = file.objects(self.category_ids, masks=masks)
        fill = {"boxes": 0, "classes": -1, "is_crowds": 0, "areas": 0}
        fill["annotation_ids"] = -1
        if masks:
            fill["masks"] = 0
        self.padding: Any = (None, fill)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        path = os.path.join(self._folder, self._names[index])
        image, (height, width) = self._reader.read(path)
        image_id = self.image_ids[index]
        objects = self._objects.get(image_id, [])
        scale = np.array(
            [image.shape[0] / height, image.shape[1] / width], np.float32
        )
        boxes = np.array([each.box for each in objects]).reshape(-1, 4)
        labels = {
            "source_id": np.int64(image_id),
            "boxes": (boxes * np.tile(scale[::-1], 2)).astype(np.float32),
            "classes": np.array([o.label for o in objects], np.int32),
            "is_crowds": np.array([o.is_crowd for o in objects], bool),
            "areas": np.array([o.area for o in objects], np.float32),
            "annotation_ids": np.array([o.id for o in objects], np.int64),
            "height": np.int32(height),
            "width": np.int32(width),
            "image_scale": scale,
        }
        if self._masks:
            labels["masks"] = self._decoded(objects, height, width)
        return image, labels

    def _decoded(
        self, objects: list["_Object"], height: int, width: int
    ) -> np.ndarray:
        """Masks of the whole image.

        Raises:
            DataError: one is none of an image of that size.
        """
        out = np.zeros((len(objects), height, width), bool)
        for row, each in zip(out, objects, strict=True):
            try:
                row[:] = _mask(each.segmentation, height, width)
            # (What decodes them raises errors of very different classes.)
            except Exception as error:
                raise _wrong(
                    self._path,
                    f"the segmentation of annotation {each.id}",
                    f"is none of an image of the height {height} and the width "
                    f"{width}: {type(error).__name__}: {error}",
                ) from error
        return out


class _Object:
    """One annotation."""

    __slots__ = ("area", "box", "id", "is_crowd", "label", "segmentation")

    def __init__(self, found: dict, box: list[float], label: int) -> None:
        left, top, width, height = box
        self.id = found["id"]
        self.label = label
        self.box = (left, top, left + width, top + height)
        self.is_crowd = bool(found.get("iscrowd", 0))
        self.area = float(found.get("area", width * height))
        self.segmentation: Any = None


class _File:
    """A file of annotations, checked."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                f"The annotation file {path!r} cannot be read: "
                f"{type(error).__name__}: {error}."
            ) from error
        if not isinstance(found, dict):
            raise self._wrong("it", "is no object with images, annotations")
        self._found = found
        self.categories = {
            each["id"]: self._text(each, "name", where)
            for where, each in self._entries("categories")
        }
        self.images = {
            each["id"]: self._text(each, "file_name", where)
            for where, each in self._entries("images")
        }
        for kind, entries in (
            ("categories", self.categories),
            ("images", self.images),
        ):
            if not entries:
                raise self._wrong(kind, "is empty")

    def objects(
        self, category_ids: list[int], *, masks: bool
    ) -> dict[int, list[_Object]]:
        """The objects of each image that has any."""
        labels = {key: label for label, key in enumerate(category_ids)}
        found: dict[int, list[_Object]] = {}
        for where, each in self._entries("annotations"):
            for key, known in (
                ("image_id", self.images),
                ("category_id", labels),
            ):
                if not _is_hashable(each.get(key)) or each[key] not in known:
                    kind = "images" if key == "image_id" else "categories"
                    raise self._wrong(
                        where, f"has {key} {each.get(key)!r:.40}, which none "
                        f"of the {kind} has as its id"
                    )  # fmt: skip
            box = self._box(each, where)
            self._check_rest(each, where)
            made = _Object(each, box, labels[each["category_id"]])
            if masks:
                made.segmentation = each.get("segmentation")
                if not _is_segmentation(made.segmentation):
                    raise self._wrong(
                        where, "has the segmentation "
                        f"{made.segmentation!r:.80}, and masks=True: it must "
                        "be polygons of at least three points, [[x, y, ...], "
                        '...], or run lengths, {"size": [height, width], '
                        '"counts": ...}'
                    )  # fmt: skip
            found.setdefault(each["image_id"], []).append(made)
        for objects in found.values():
            objects.sort(key=lambda each: each.id)
        return found

    def _entries(self, kind: str) -> Iterator[tuple[str, dict]]:
        entries = self._found.get(kind)
        if not isinstance(entries, list):
            raise self._wrong(repr(kind), "is missing, or is no list")
        seen = set()
        for number, each in enumerate(entries):
            where = f"{kind}[{number}]"
            if not isinstance(each, dict):
                raise self._wrong(where, "is no object")
            key = each.get("id")
            if isinstance(key, bool) or not isinstance(key, int):
                raise self._wrong(where, f"has the id {key!r:.40}: no int")
            if not 0 <= key < 2**63:
                # (-1 is no image and no object where batches are padded.)
                raise self._wrong(
                    where, f"has the id {key!r:.40}: it must be 0 or more, "
                    "and below 2**63"
                )  # fmt: skip
            if key in seen:
                raise self._wrong(where, f"has the id {key} of another one")
            seen.add(key)
            yield where, each

    def _text(self, each: dict, key: str, where: str) -> str:
        if not isinstance(each.get(key), str):
            raise self._wrong(where, f"has no {key}")
        return each[key]

    def _box(self, each: dict, where: str) -> list[float]:
        box = each.get("bbox")
        if (
            not isinstance(box, list)
            or len(box) != 4
            or not all(map(_is_finite, box))
            or min(box[2:]) < 0
        ):
            raise self._wrong(
                where, f"has the bbox {box!r:.80}: it must be four finite "
                "numbers, [left, top, width, height]"
            )  # fmt: skip
        return box

    def _check_rest(self, each: dict, where: str) -> None:
        area = each.get("area", 0)
        if not _is_finite(area) or area < 0:
            raise self._wrong(
                where, f"has the area {area!r:.40}: it must be a finite "
                "number, 0 or more"
            )  # fmt: skip
        if each.get("iscrowd", 0) not in (0, 1):
            raise self._wrong(
                where, f"has iscrowd {each['iscrowd']!r:.40}: it must be 0 or 1"
            )

    def _wrong(self, where: str, what: str) -> DataError:
        return _wrong(self._path, where, what)


def _wrong(path: str, where: str, what: str) -> DataError:
    return DataError(
        f"The annotation file {path!r}: {where} {what}. Mend the file; it must "
        "be in the format of COCO's instances."
    )


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float reaches
        return False


def _is_segmentation(value: Any) -> bool:
    if isinstance(value, dict):
        counts = value.get("counts")
        return isinstance(value.get("size"), list) and (
            isinstance(counts, str)
            or (
                isinstance(counts, list)
                and all(type(n) is int and n >= 0 for n in counts)
            )
        )
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all(map(_is_finite, polygon))
            for polygon in value
        )
    )


def _is_hashable(value: Any) -> bool:
    return isinstance(value, int | str)


def _mask_module() -> Any:
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ConfigError(
            "masks=True needs faster-coco-eval, which cannot be imported: run "
            "pip install 'legato[coco]'."
        ) from error
    return mask


def _mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A mask of `[height, width]`, of polygons or run lengths."""
    module = _mask_module()
    if isinstance(segmentation, list):
        parts = module.frPyObjects(segmentation, height, width)
        return module.decode(module.merge(parts))
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its size is {segmentation['size']}")
    if isinstance(segmentation["counts"], list):
        found = module.frPyObjects(segmentation, height, width)
    else:
        found = {**segmentation, "counts": segmentation["counts"].encode()}
    return module.decode(found)
