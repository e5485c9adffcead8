"""Handwritten digits scattered over textured canvases, with labels.

Small data for segmentation and detection that need no download: the digits
are those that scikit-learn ships. Canvases of training show digits of the
training split only, and each is a function of the seed and its index.
"""

from typing import Any, NamedTuple

import numpy as np

from legato.errors import ConfigError
from legato.tasks.digits import load_digits

CLASS_NAMES = ("background", *(str(digit) for digit in range(10)))
"""Of the labels of pixels."""

IGNORED = 255
"""The label of pixels on the edge of a digit, which are neither."""

MAX_DIGITS = 8
_TRIES = 30  # to place them
_SMALLEST, _LARGEST = 16, 30  # height and width of a digit's square, in pixels
_INK, _PAPER = 0.5, 0.2  # what is darker is digit, what is lighter is not


class Scene(NamedTuple):
    """A canvas and what is on it.

    Attributes:
        image: uint8 `[size, size, 3]`.
        pixels: uint8 `[size, size]`: 0 is background, `d + 1` the digit d, and
            255 the edge between both.
        boxes: float32 `[8, 4]`: left, top, right, bottom, in pixels, tight
            around the ink; 0 where there is no digit.
        classes: int32 `[8]`: the digits; -1 where there is none.
    """

    image: np.ndarray
    pixels: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray


def segmentation(
    split: str, scenes: int, size: int = 64, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Canvases with a label for each pixel.

    Args:
        split: "train" or "validation".
        scenes: how many.
        size: height and width, in pixels; at least 32.
        seed: of what is on them.

    Returns:
        Images, uint8 `[scenes, size, size, 3]`, and labels, uint8 `[scenes,
        size, size]`; see `Scene`.
    """
    made = _make(split, scenes, size, seed)
    return (
        np.stack([each.image for each in made]),
        np.stack([each.pixels for each in made]),
    )


def detection(
    split: str, scenes: int, size: int = 96, seed: int = 0
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Canvases with a box around each digit.

    Args:
        split: "train" or "validation".
        scenes: how many.
        size: height and width, in pixels; at least 32.
        seed: of what is on them.

    Returns:
        Images, uint8 `[scenes, size, size, 3]`, and labels by name as
        `legato.metrics.CocoMetric` takes them: `source_id`, `boxes`
        ("xyxy") and `classes`; see `Scene`.
    """
    made = _make(split, scenes, size, seed)
    return np.stack([each.image for each in made]), {
        "source_id": np.arange(scenes, dtype="int32"),
        "boxes": np.stack([each.boxes for each in made]),
        "classes": np.stack([each.classes for each in made]),
    }


def _make(split: str, scenes: int, size: int, seed: int) -> list[Scene]:
    if size < _LARGEST:
        raise ConfigError(
            f"size={size}: it must be at least {_LARGEST}, or the digits do "
            "not fit."
        )
    images, labels = load_digits(split)
    glyphs = images.reshape(-1, 8, 8)
    # (The splits have other digits, and other canvases too.)
    key = (seed, int(split == "train"))
    return [
        make_scene(glyphs, labels, size, np.random.default_rng((*key, index)))
        for index in range(scenes)
    ]


def make_scene(
    glyphs: np.ndarray, labels: np.ndarray, size: int, rng: np.random.Generator
) -> Scene:
    """Scatter some digits over a canvas.

    Args:
        glyphs: images of digits, `[digits, height, width]`, ink is 1.
        labels: which digits they are, `[digits]`.
        size: of the canvas, in pixels.
        rng: decides everything.
    """
    canvas = _texture(size, rng)
    pixels = np.zeros((size, size), np.uint8)
    boxes = np.zeros((MAX_DIGITS, 4), np.float32)
    classes = np.full(MAX_DIGITS, -1, np.int32)
    free = np.ones((size, size), bool)
    wanted, count = rng.integers(2, MAX_DIGITS + 1), 0
    for _ in range(_TRIES):
        if count == wanted:
            break
        chosen = rng.integers(len(glyphs))
        side = int(rng.integers(_SMALLEST, _LARGEST + 1))
        top, left = rng.integers(0, size - side + 1, 2)
        colour = rng.uniform(0.6, 1.0, 3)
        ink = _turned(glyphs[chosen], side, rng.uniform(-0.25, 0.25))
        rows, columns = np.nonzero(ink >= _INK)
        square = np.s_[top : top + side, left : left + side]
        if not len(rows) or not free[square][ink > _PAPER].all():
            continue  # it would cover another
        free[square] &= ink <= _PAPER
        canvas[square] += ink[:, :, None] * (colour - canvas[square])
        shown = pixels[square]
        shown[ink > _PAPER] = IGNORED
        shown[ink >= _INK] = labels[chosen] + 1
        boxes[count] = (
            left + columns.min(),
            top + rows.min(),
            left + columns.max() + 1,
            top + rows.max() + 1,
        )
        classes[count] = labels[chosen]
        count += 1
    if rng.random() < 0.5:
        canvas = 1 - canvas  # dark ink on light paper
    image = np.round(255 * np.clip(canvas, 0, 1)).astype(np.uint8)
    return Scene(image, pixels, boxes, classes)


def _texture(size: int, rng: np.random.Generator) -> np.ndarray:
    """Clouds of colour with some grain, of about 0.05 to 0.55."""
    clouds = _resized(rng.uniform(0.1, 0.5, (6, 6, 3)), size)
    return clouds + rng.normal(scale=0.03, size=(size, size, 3))


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    """A square image of another size, `[size, size, channels]`."""
    at = np.linspace(0, len(image) - 1, size)
    return _sampled(image, *np.meshgrid(at, at, indexing="ij"))


def _turned(glyph: np.ndarray, side: int, angle: float) -> np.ndarray:
    """A glyph of another size, turned by an angle in radians."""
    middle = (len(glyph) - 1) / 2
    at = (np.arange(side) - (side - 1) / 2) * len(glyph) / side
    y, x = np.meshgrid(at, at, indexing="ij")
    sine, cosine = np.sin(angle), np.cos(angle)
    return _sampled(
        np.pad(glyph, 2)[:, :, None],  # paper around it
        cosine * y - sine * x + middle + 2,
        sine * y + cosine * x + middle + 2,
    )[:, :, 0]


def _sampled(image: np.ndarray, y: Any, x: Any) -> np.ndarray:
    """Bilinear interpolation at places within an image."""
    y = np.clip(y, 0, image.shape[0] - 1)
    x = np.clip(x, 0, image.shape[1] - 1)
    top = np.minimum(y.astype(int), image.shape[0] - 2)
    left = np.minimum(x.astype(int), image.shape[1] - 2)
    down, right = (y - top)[..., None], (x - left)[..., None]
    above = image[top, left] * (1 - right) + image[top, left + 1] * right
    below = (
        image[top + 1, left] * (1 - right) + image[top + 1, left + 1] * right
    )
    return above * (1 - down) + below * down
