"""What becomes of a value: a curve, a text, a picture, a histogram.

A value is looked at, and copied if it can change, where it is given; what
takes time (drawing, compressing, counting) is left to a function that the
worker calls.
"""

import dataclasses
import functools
import io
import math
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from legato.compat.masked_arrays import without_mask
from legato.errors import SummaryError
from legato.summaries.events import clean_tag, protos, scalar_values

RULES = (
    "a number or an array of shape [] (a curve), a str (a text), an array of "
    "uint8 or floats of shape [H, W, C] or [N, H, W, C] with C of 1, 3 or 4 "
    "(pictures), another array of numbers (a histogram), a Matplotlib Figure "
    "(a picture), or a dict of these (a group)"
)
"""What can be written, as messages say it."""

MAX_IMAGES = 8
BINS = 30

_INSTALL = "pip install 'legato[plot]'"

# Matplotlib is not made for threads: one figure at a time is drawn.
_drawing = threading.Lock()
_given: "weakref.WeakSet[Any]" = weakref.WeakSet()


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """A value that nobody else changes any more.

    Attributes:
        make: makes the event's values of it.
        is_quick: whether that takes no longer than handing it over.
    """

    make: Callable[[], list[Any]]
    is_quick: bool


def prepare(name: str, value: Any) -> Prepared:
    """Take a value as its type and shape say; see `RULES`.

    Raises:
        SummaryError: it is none of these.
    """
    if isinstance(value, str):
        return prepare_text(name, value)
    if is_figure(value):
        return prepare_figure(name, value)
    array = None if isinstance(value, int | float) else as_array(value)
    if array is not None and array.ndim:
        if is_image(array):
            return prepare_image(name, array)
        if _is_numeric(array.dtype):
            return prepare_histogram(name, array)
    return prepare_scalar(name, value if array is None else array)


def prepare_scalar(name: str, value: Any) -> Prepared:
    """Take a number.

    Raises:
        SummaryError: it is none.
    """
    number = _as_number(name, value)
    return Prepared(lambda: scalar_values([(name, number)]), is_quick=True)


def _as_number(name: str, value: Any) -> float:
    if not isinstance(value, int | float):
        array = as_array(value)
        if array is None or array.ndim or not _is_numeric(array.dtype):
            raise refused(name, value)
        value = array
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def prepare_text(name: str, value: Any) -> Prepared:
    """Take a text, which TensorBoard shows as Markdown.

    Raises:
        SummaryError: it is none.
    """
    if not isinstance(value, str):
        raise refused(name, value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SummaryError(
            f"The summary {name!r} is no Unicode text: {error}."
        ) from error

    def make() -> list[Any]:
        from tensorboardX.summary import text

        values = list(text(name, value).value)
        values[0].tag = clean_tag(name)  # without the suffix that it adds
        return values

    return Prepared(make, is_quick=True)


def prepare_image(
    name: str, value: Any, max_images: int = MAX_IMAGES
) -> Prepared:
    """Take a picture, or the first ones of several; a copy.

    Raises:
        SummaryError: it is none.
    """
    array = as_array(value)
    if array is None or not is_image(array):
        raise refused(name, value)
    if 0 in array.shape[-3:]:
        raise SummaryError(
            f"The summary {name!r} is of shape {array.shape}: a picture must "
            "have at least one pixel. Leave it out."
        )
    _require_pillow(name)
    if array.ndim == 3:
        names, images = [name], array[None].copy()
    else:
        images = array[:max_images].copy()
        names = [f"{name}/{k}" for k in range(len(images))]

    def make() -> list[Any]:
        return [
            _image_value(each, _as_bytes(image))
            for each, image in zip(names, images, strict=True)
        ]

    return Prepared(make, is_quick=False)


def prepare_histogram(name: str, value: Any, bins: int = BINS) -> Prepared:
    """Take numbers; a copy of them.

    Raises:
        SummaryError: they are none.
    """
    array = as_array(value)
    if array is None or not _is_numeric(array.dtype):
        raise refused(name, value)
    numbers = array.flatten()  # a copy
    return Prepared(
        lambda: [_histogram_value(name, numbers, bins)], is_quick=False
    )


def prepare_figure(name: str, figure: Any) -> Prepared:
    """Take a Matplotlib figure, which is the summaries' from now on.

    It is closed, so that pyplot draws on another one next, and drawn later.

    Raises:
        SummaryError: it is none, or was given before.
    """
    if not is_figure(figure):
        raise refused(name, figure)
    if figure in _given:
        raise SummaryError(
            f"The summary {name!r} is a figure that was given before: a "
            "figure is drawn in the background, and must not change meanwhile. "
            "Make a new one for each summary."
        )
    _require_pillow(name)
    _given.add(figure)
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)
    return Prepared(lambda: [_image_value(name, _draw(figure))], is_quick=False)


def is_figure(value: Any) -> bool:
    """Whether it is a Matplotlib figure."""
    module = sys.modules.get("matplotlib.figure")
    # (Where it was never imported, there is none.)
    return module is not None and isinstance(value, module.Figure)


def as_array(value: Any) -> np.ndarray | None:
    """An array or a tensor in NumPy; None for anything else."""
    if isinstance(value, np.ma.MaskedArray):
        return without_mask(value)
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    keras = sys.modules.get("keras")
    if keras is None:
        return None
    tensor = value.value if isinstance(value, keras.Variable) else value
    if not keras.ops.is_tensor(tensor):
        return None
    # Late: it imports Keras, which there may be none of.
    from legato.compat.keras_arrays import to_numpy

    return to_numpy(tensor)


def is_image(array: np.ndarray) -> bool:
    """Whether it has the dtype and the shape of pictures."""
    return (
        array.ndim in (3, 4)
        and array.shape[-1] in (1, 3, 4)
        and (array.dtype == np.uint8 or _is_float(array.dtype))
    )


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or (_is_extended(dtype) and "float" in dtype.name)


def _is_numeric(dtype: np.dtype) -> bool:
    return dtype.kind in "fiub" or _is_extended(dtype)


def _is_extended(dtype: np.dtype) -> bool:
    """Whether it is one such as bfloat16."""
    return dtype.type.__module__ == "ml_dtypes"


def refused(name: str, value: Any) -> SummaryError:
    """What is to be said of a value that is none of `RULES`."""
    kind = type(value)
    what = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    array = as_array(value)
    if array is not None:
        what += f" of dtype {array.dtype} and shape {array.shape}"
    return SummaryError(
        f"The summary {name!r} is a {what}: it must be {RULES}; and each "
        "function of legato.summaries takes its own kind alone. Convert it, "
        "for example with numpy.asarray, or leave it out."
    )


def _require_pillow(name: str) -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise SummaryError(
            f"The summary {name!r} is a picture, and Pillow, which writes "
            f"them, is not installed: {_INSTALL}."
        ) from error


def _as_bytes(image: np.ndarray) -> np.ndarray:
    """Pixels from 0 to 255; floats are from 0 to 1."""
    if image.dtype == np.uint8:
        return image
    numbers = np.nan_to_num(image.astype("float32"), nan=0.0)
    return np.rint(numbers.clip(0.0, 1.0) * 255.0).astype("uint8")


def _image_value(name: str, pixels: np.ndarray) -> Any:
    import PIL.Image

    height, width, channels = pixels.shape
    png = io.BytesIO()
    flat = pixels[..., 0] if channels == 1 else pixels
    PIL.Image.fromarray(flat).save(png, format="PNG")
    return protos().Value(
        tag=clean_tag(name),
        image=protos().Image(
            height=height,
            width=width,
            colorspace=channels,
            encoded_image_string=png.getvalue(),
        ),
    )


def _histogram_value(name: str, numbers: np.ndarray, bins: int) -> Any:
    """In buckets of one width; what is not finite is left out."""
    numbers = numbers.astype("float64")
    numbers = numbers[np.isfinite(numbers)]
    histogram = functools.partial(protos().Histogram, num=numbers.size)
    if numbers.size:
        with np.errstate(all="ignore"):
            try:
                counts, edges = np.histogram(numbers, bins)
            except ValueError:  # too close together, or too far apart
                counts, edges = np.array([numbers.size]), numbers[:1].repeat(2)
            histogram = functools.partial(
                histogram,
                min=numbers.min(),
                max=numbers.max(),
                sum=numbers.sum(),
                sum_squares=numbers.dot(numbers),
                bucket_limit=edges[1:].tolist(),
                bucket=counts.tolist(),
            )
    return protos().Value(tag=clean_tag(name), histo=histogram())


def _draw(figure: Any) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with _drawing:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
