"""Data sources: what may be fed, in which order, and how it is resumed.

`source` is the protocol, `arrays` the source for arrays, `random_access` that
for datasets of examples, `fitting` makes sources of all that
`keras.Model.fit` takes, `feed` keeps the device fed, `state` takes the
iterators' states apart for checkpoints.
"""

from legato.data.arrays import ArraySource
from legato.data.beside import HostValue
from legato.data.buckets import Buckets
from legato.data.checks import InputChecks
from legato.data.feed import Feed
from legato.data.fitting import (
    are_arrays,
    fit_source,
    split_validation,
    task_source,
)
from legato.data.random_access import RandomAccessSource
from legato.data.source import (
    ArraySpec,
    Block,
    Chunk,
    DataIterator,
    DataSource,
    DataState,
    Shapes,
    array_specs,
    partial_batches,
    shapes_of,
)
from legato.data.state import join_arrays, split_arrays
from legato.workers.recipe import StoppedWaiting

__all__ = [
    "ArraySource",
    "ArraySpec",
    "Block",
    "Buckets",
    "Chunk",
    "DataIterator",
    "DataSource",
    "DataState",
    "Feed",
    "HostValue",
    "InputChecks",
    "RandomAccessSource",
    "Shapes",
    "StoppedWaiting",
    "are_arrays",
    "array_specs",
    "fit_source",
    "join_arrays",
    "partial_batches",
    "shapes_of",
    "split_arrays",
    "split_validation",
    "task_source",
]
