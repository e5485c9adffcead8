"""Data sources: what may be fed, in which order, and how it is resumed.

`source` is the protocol, `arrays` the source for arrays in memory, `feed`
what keeps the device fed.
"""

from legato.data.arrays import ArraySource
from legato.data.feed import Feed
from legato.data.source import ArraySpec, Chunk, DataIterator, DataSource

__all__ = [
    "ArraySource",
    "ArraySpec",
    "Chunk",
    "DataIterator",
    "DataSource",
    "Feed",
]
