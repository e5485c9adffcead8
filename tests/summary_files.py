"""Summaries as TensorBoard's own reader gives them."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

EVERYTHING = {"scalars": 0, "tensors": 0, "images": 0, "histograms": 0}


def read(directory):
    """Tag -> steps and values, of all kinds.

    Pictures are arrays as nested lists, texts are str.
    """
    if not Path(directory).exists():
        return {}
    events = EventAccumulator(str(directory), size_guidance=EVERYTHING)
    events.Reload()
    tags = events.Tags()
    found = {}
    for tag in tags["scalars"]:
        found[tag] = [(e.step, e.value) for e in events.Scalars(tag)]
    for tag in tags["images"]:
        found[tag] = [
            (e.step, pixels(e.encoded_image_string).tolist())
            for e in events.Images(tag)
        ]
    for tag in tags["tensors"]:
        found[tag] = [
            (e.step, e.tensor_proto.string_val[0].decode())
            for e in events.Tensors(tag)
        ]
    for tag in tags["histograms"]:
        found[tag] = [
            (e.step, _numbers(e.histogram_value))
            for e in events.Histograms(tag)
        ]
    return found


def read_below(directory):
    """Those of each directory with any, by its path in this one."""
    folders = {p.parent for p in Path(directory).rglob("*tfevents*")}
    found = {
        folder.relative_to(directory).as_posix(): read(folder)
        for folder in sorted(folders)
    }
    return {path: series for path, series in found.items() if series}


def pixels(png):
    return np.asarray(PIL.Image.open(io.BytesIO(png)))


def _numbers(value):
    """Minimum, maximum, number, sum, squares; limits of buckets, buckets."""
    return (
        value.min,
        value.max,
        value.num,
        value.sum,
        value.sum_squares,
        tuple(value.bucket_limit),
        tuple(value.bucket),
    )
