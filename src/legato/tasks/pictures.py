"""What tasks have predicted, drawn for summaries: uint8 arrays of RGB."""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np

from legato.errors import ConfigError

_IGNORED = np.array([128, 128, 128], np.uint8)


def colour_of(index: int) -> tuple[int, int, int]:
    """A colour for a class; neighbours have colours that are far apart."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.381966 % 1, 0.8, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def painted(labels: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Class indices as colours.

    Args:
        labels: class indices `[...]`; 0 is black.
        ignored: which are to be grey, whatever they are, bool `[...]`.

    Returns:
        uint8 `[..., 3]`.
    """
    labels = np.where(ignored, 0, labels).astype(int)
    colours = [colour_of(index) for index in range(labels.max(initial=0) + 1)]
    palette = np.array(colours, np.uint8)
    palette[0] = 0
    return np.where(ignored[..., None], _IGNORED, palette[labels])


def enlarged(images: np.ndarray, times: int = 2) -> np.ndarray:
    """Images in RGB, with larger pixels.

    Args:
        images: numbers from 0 to 255, `[batch, height, width, channels]`, of
            one channel (grey) or three.
        times: how much larger.
    """
    images = np.clip(np.round(images), 0, 255).astype(np.uint8)
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    return images.repeat(times, axis=1).repeat(times, axis=2)


def with_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    texts: Sequence[str],
    times: int = 3,
) -> np.ndarray:
    """An image, enlarged, with boxes and a text at each.

    Args:
        image: numbers from 0 to 255, `[height, width, channels]`.
        boxes: left, top, right, bottom, in pixels of the image, `[n, 4]`.
        classes: which decide the colours, `[n]`.
        texts: one for each box.
        times: how much larger.

    Raises:
        ConfigError: Pillow is not installed.
    """
    image_module, draw_module = _pillow()
    drawn = image_module.fromarray(enlarged(image[None], times)[0])
    pen = draw_module.Draw(drawn)
    for box, index, text in zip(boxes, classes, texts, strict=True):
        left, top, right, bottom = (round(float(x) * times) for x in box)
        colour = colour_of(int(index))
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        pen.rectangle(corners, outline=colour)
        pen.text((left + 2, top), text, fill=colour)
    return np.asarray(drawn)


def confusions(counts: np.ndarray, names: Sequence[str]) -> Any:
    """A Matplotlib figure of a confusion matrix.

    Args:
        counts: of labels (rows) and predictions (columns), whole numbers
            `[classes, classes]`.
        names: of the classes.

    Raises:
        ConfigError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            "The picture of the confusion matrix needs Matplotlib, which is "
            "not installed: pip install 'legato[plot]'."
        ) from error
    inches = min(2 + 0.3 * len(names), 12)
    figure = Figure(figsize=(inches, inches), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    places = range(len(names))
    axes.set_xticks(places, names, rotation=90 if len(names) > 10 else 0)
    axes.set_yticks(places, names)
    for row, column in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[row, column] > 0.5 else "black"
        count = str(counts[row, column])
        axes.text(column, row, count, ha="center", va="center", color=colour)
    return figure


def sketches(drawings: np.ndarray, size: int = 96) -> np.ndarray:
    """Drawings side by side, each in a square.

    Args:
        drawings: in "stroke-5", `[n, points, 5]`: see `legato.tasks.strokes`.
        size: of a square, in pixels.

    Returns:
        uint8 `[size, n * size, 3]`, black on white.

    Raises:
        ConfigError: Pillow is not installed.
    """
    image_module, draw_module = _pillow()
    sheet = image_module.new("RGB", (size * len(drawings), size), "white")
    pen = draw_module.Draw(sheet)
    for column, drawing in enumerate(drawings):
        ends = np.flatnonzero(drawing[:, 4] > 0)
        points = drawing[: ends[0] if len(ends) else len(drawing)]
        places = np.cumsum(points[:, :2], axis=0)
        low, high = places.min(axis=0), places.max(axis=0)
        scale = (size - 16) / max(*(high - low), 1e-6)
        middle = np.array([column * size + size / 2, size / 2])
        places = (places - (low + high) / 2) * scale + middle
        for at in range(1, len(points)):
            if points[at - 1, 3] == 0:  # the pen was not lifted before
                line = (*places[at - 1].tolist(), *places[at].tolist())
                pen.line(line, fill="black", width=2)
    return np.asarray(sheet)


def _pillow() -> tuple[Any, Any]:
    """Pillow's modules `Image` and `ImageDraw`."""
    try:
        from PIL import Image, ImageDraw
    except ModuleNotFoundError as error:
        raise ConfigError(
            "The pictures of this task need Pillow, which is not installed: "
            "pip install 'legato[plot]'. (Or draw none: shown=0.)"
        ) from error
    return Image, ImageDraw
