"""Images, and folders of them with one class each."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from legato.errors import ConfigError, DataError

_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_OF_ANY_RANGE = {"I": "integers of 32 bits", "F": "floats"}

Path_ = str | os.PathLike[str]


class ImageFolder:
    """A folder with a sub-folder of images for each class.

    `dataset[i]` is `(image, label)`: a uint8 array `[height, width,
    channels]`, and the number of its class, an int32. Of pixels of 16 bits the
    upper 8 are taken, as Keras does. Classes are numbered in the order of their
    names; images come in the order of theirs, class by class, those in
    sub-folders of a class too.

    Args:
        path: the folder.
        image_size: `(height, width)` that each image is resized to, whatever
            its proportions, bilinearly and with antialiasing (JPEGs in part
            while they are decoded, which is quicker); None leaves images as
            they are (and batches of them need a transform, or padding).
        channels: 3 for RGB, 1 for grey, 4 for RGB and alpha.
        class_names: the sub-folders, in the order of their numbers; all, in
            alphabetical order, by default.

    Attributes:
        class_names: the name of each class.
        paths: of the images.
        labels: of the images, int32.

    Raises:
        DataError: there is no such folder, class or image.
        ConfigError: another argument is wrong, or Pillow is not installed.
    """

    def __init__(
        self,
        path: Path_,
        *,
        image_size: tuple[int, int] | None = None,
        channels: int = 3,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self._reader = ImageReader(image_size, channels)
        root = Path(path)
        if not root.is_dir():
            raise DataError(
                f"ImageFolder: {str(root)!r} is no folder. Give the one that "
                "holds a sub-folder for each class."
            )
        found = sorted(
            each.name
            for each in root.iterdir()
            if each.is_dir() and not each.name.startswith(".")
        )
        if class_names is not None:
            if missing := [n for n in class_names if n not in found]:
                raise DataError(
                    f"ImageFolder: class_names holds {missing[0]!r}, and "
                    f"{str(root)!r} has no such sub-folder. It has "
                    f"{', '.join(found[:10]) or 'none'}."
                )
            found = list(class_names)
            if twice := [n for n in found if found.count(n) > 1]:
                raise ConfigError(
                    f"ImageFolder: class_names holds {twice[0]!r} twice: its "
                    "images would be of two classes. Name each once."
                )
        self.class_names = found
        self.paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(found):
            images = _images_below(root / name)
            self.paths += images
            labels += [label] * len(images)
        self.labels = np.array(labels, np.int32)
        if not self.paths:
            raise DataError(
                f"ImageFolder: {str(root)!r} has no images in sub-folders "
                f"({', '.join(sorted(_ENDINGS))}). Each class has a sub-folder "
                "of its own."
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int32]:
        image, _ = self._reader.read(self.paths[index])
        return image, self.labels[index]


class ImageReader:
    """Reads images as arrays of one kind.

    Args:
        image_size: `(height, width)`, or None.
        channels: 1, 3 or 4.

    Raises:
        ConfigError: an argument is wrong, or Pillow is not installed.
    """

    def __init__(
        self, image_size: tuple[int, int] | None, channels: int
    ) -> None:
        if isinstance(channels, bool) or channels not in tuple(_MODES):
            raise ConfigError(
                f"channels={channels!r}: it must be 3 (RGB), 1 (grey) or 4 "
                "(RGB and alpha)."
            )
        if image_size is not None and not _is_size(image_size):
            raise ConfigError(
                f"image_size={image_size!r}: it must be (height, width), each "
                "an int of at least 1, or None."
            )
        self.image_size = image_size
        self._mode = _MODES[channels]
        _pillow()

    def read(self, path: str) -> tuple[np.ndarray, tuple[int, int]]:
        """An image, and its own height and width.

        Returns:
            uint8 of `[height, width, channels]`, and the size in the file.

        Raises:
            DataError: it cannot be read, or its pixels have no known range; it
                is named.
        """
        module = _pillow()
        try:
            with module.open(path) as file:
                size = file.height, file.width
                if self.image_size is not None:
                    # JPEGs get smaller while they are decoded, to no less
                    # than what is wanted: three times as fast.
                    file.draft(self._mode, self.image_size[::-1])
                mode = file.mode
                if mode.startswith("I;16"):  # clipped by Pillow, not scaled
                    upper = np.asarray(file) >> 8
                    file = module.fromarray(upper.astype(np.uint8))
                image = file.convert(self._mode)
        # (Of damaged files Pillow raises errors of very different classes.)
        except Exception as error:
            raise DataError(
                f"The image {path!r} cannot be read: "
                f"{type(error).__name__}: {error}. Replace the file, or leave "
                "it out."
            ) from error
        if mode in _OF_ANY_RANGE:
            raise DataError(
                f"The image {path!r} has {_OF_ANY_RANGE[mode]} as its pixels, "
                "and which of them is white is not known. Save it with 8 or "
                "16 bits, or read it with a dataset of your own."
            )
        if self.image_size is not None:
            height, width = self.image_size
            if image.size != (width, height):
                image = image.resize(
                    (width, height), module.Resampling.BILINEAR
                )
        array = np.asarray(image)
        return array.reshape(*array.shape[:2], -1), size


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(
            isinstance(n, int | np.integer) and not isinstance(n, bool)
            for n in value
        )
        and min(value) >= 1
    )


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            "Images are read by Pillow, which cannot be imported: run "
            "pip install 'legato[images]'."
        ) from error
    return Image


def _images_below(folder: Path) -> list[str]:
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [
            os.path.join(parent, name)
            for name in names
            if os.path.splitext(name)[1].lower() in _ENDINGS
            and not name.startswith(".")
        ]
    return sorted(found)
