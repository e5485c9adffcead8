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
        file = _File(os.fspath(annotation_file))
        self.category_ids = sorted(file.categories)
        self.class_names = [file.categories[i] for i in self.category_ids]
        self.image_ids = sorted(file.images)
        self._names = [file.images[i] for i in self.image_ids]
        self._objects = file.objects(self.category_ids, masks=masks)
        fill = {"boxes": 0, "classes": -1, "is_crowds": 0, "areas": 0}
        fill["annotation_ids"] = -1
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
            labels["masks"] = _decoded(objects, height, width)
        return image, labels


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
            made = _Object(each, self._box(each, where), 0)
            made.label = labels[each["category_id"]]
            if masks:
                made.segmentation = each.get("segmentation")
                if not isinstance(made.segmentation, list | dict):
                    raise self._wrong(
                        where, "has no segmentation, and masks=True"
                    )
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
            or not all(
                isinstance(n, int | float) and math.isfinite(n) for n in box
            )
            or min(box[2:]) < 0
        ):
            raise self._wrong(
                where, f"has the bbox {box!r:.80}: it must be four finite "
                "numbers, [left, top, width, height]"
            )  # fmt: skip
        return box

    def _wrong(self, where: str, what: str) -> DataError:
        return DataError(
            f"The annotation file {self._path!r}: {where} {what}. Mend the "
            "file; it must be in the format of COCO's instances."
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


def _decoded(objects: list[_Object], height: int, width: int) -> np.ndarray:
    """Masks of whole images, of polygons or run lengths."""
    module = _mask_module()
    out = np.zeros((len(objects), height, width), bool)
    for row, each in zip(out, objects, strict=True):
        found = each.segmentation
        if isinstance(found, list):
            found = module.merge(module.frPyObjects(found, height, width))
        elif isinstance(found["counts"], list):
            found = module.frPyObjects(found, height, width)
        else:
            found = {**found, "counts": found["counts"].encode()}
        row[:] = module.decode(found)
    return out
