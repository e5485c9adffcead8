"""Data in files, read by the libraries that are made for them.

Datasets of single examples for `legato.RandomAccessSource`, and arrays for
`legato.ArraySource`. Nothing here imports Keras: worker processes start fast.
"""

from legato.files.coco import CocoDetection
from legato.files.images import ImageFolder
from legato.files.npz import npz

__all__ = ["CocoDetection", "ImageFolder", "npz"]
