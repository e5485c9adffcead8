"""Ground truth in a file of COCO's format."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from legato.errors import ConfigError
from legato.metrics.coco_figures import Truths, compress


class AnnotationFile:
    """What a file says about its images.

    Args:
        path: of the JSON file.
        with_masks: whether masks are needed.

    Attributes:
        categories: names by id.
        sizes: heights and widths in pixels, by the images' ids; None where
            the file has none.

    Raises:
        ConfigError: the file cannot be read, or is not of COCO's format.
    """

    def __init__(self, path: Path, *, with_masks: bool) -> None:
        self._path = path
        self._with_masks = with_masks
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"CocoMetric(annotation_file={str(path)!r}) cannot be read as "
                f"JSON: {error}"
            ) from error
        try:
            self._read(content)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"CocoMetric(annotation_file={str(path)!r}) is not of COCO's "
                "format, which has lists `images`, `annotations` (with "
                "`image_id`, `category_id`, `bbox`, `area`, and "
                "`segmentation` for masks) and `categories` (with `id` and "
                f"`name`): {type(error).__name__}: {error}"
            ) from error

    def _read(self, content: Any) -> None:
        categories = content["categories"]
        self.categories = {
            _id(each["id"]): str(each["name"]) for each in categories
        }
        if len(self.categories) < len(categories):
            raise ValueError("two categories have one id")
        self.sizes: dict[int, tuple[int, int] | None] = {}
        for image in content["images"]:
            size = (image.get("height"), image.get("width"))
            if self._with_masks and None in size:
                raise KeyError(f"no height and width of image {image['id']}")
            self.sizes[_id(image["id"])] = None if None in size else size
        if len(self.sizes) < len(content["images"]):
            raise ValueError("two images have one id")
        self._rows: dict[int, list[dict[str, Any]]] = {}
        needed = ["category_id", "bbox", "area"]
        needed += ["segmentation"] * self._with_masks
        for row in content["annotations"]:
            kept = {key: row[key] for key in needed}
            kept["iscrowd"] = bool(row.get("iscrowd", 0))
            kept["category_id"] = _id(row["category_id"])
            if kept["category_id"] not in self.categories:
                raise ValueError(f"no category {row['category_id']}")
            image = _id(row["image_id"])
            numbers = [*row["bbox"], row["area"]]
            if len(numbers) != 5 or not all(map(math.isfinite, numbers)):
                raise ValueError(
                    f"image {image} has an object with bbox {row['bbox']} and "
                    f"area {row['area']}: they must be four finite numbers, "
                    "and one"
                )
            if min(numbers[2:]) < 0:
                raise ValueError(
                    f"image {image} has an object with bbox {row['bbox']} and "
                    f"area {row['area']}: width, height and area must be at "
                    "least 0"
                )
            if self._with_masks and isinstance(row["segmentation"], dict):
                rle = compress(row["segmentation"])
                size = self.sizes.get(image)
                if size is not None and tuple(rle["size"]) != size:
                    raise ValueError(
                        f"image {image} has run lengths of the size "
                        f"{rle['size']}, and is of {size}"
                    )
                kept["segmentation"] = rle
            self._rows.setdefault(image, []).append(kept)

    def truths(self, key: int) -> Truths:
        """The objects of an image, in the order of the file."""
        rows = self._rows.get(key, [])
        return Truths(
            boxes=np.array([row["bbox"] for row in rows], np.float64).reshape(
                -1, 4
            ),
            categories=np.array([row["category_id"] for row in rows], np.int64),
            areas=np.array([row["area"] for row in rows], np.float64),
            crowds=np.array([row["iscrowd"] for row in rows], bool),
            masks=(
                [row["segmentation"] for row in rows]
                if self._with_masks
                else None
            ),
        )


def _id(value: Any) -> int:
    """An id, which some write as text.

    Raises:
        ValueError: it is no whole number.
    """
    number = int(value)
    if not isinstance(value, str) and number != value:
        raise ValueError(f"the id {value!r} is no whole number")
    return number
