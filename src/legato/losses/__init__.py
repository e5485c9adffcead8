"""Losses that Keras lacks, and a sum of several that logs its parts.

All are `keras.losses.Loss` objects (but `WeightedSum`), written with
`keras.ops`: they run inside compiled steps on each backend. They take logits,
compute in float32 at least, and leave out entries that are marked as ignored.
"""

from legato.losses.classification import SmoothedCrossentropy
from legato.losses.detection import SigmoidFocalLoss, SmoothL1Loss
from legato.losses.segmentation import DiceLoss
from legato.losses.weighted import WeightedSum

__all__ = [
    "DiceLoss",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
    "SmoothedCrossentropy",
    "WeightedSum",
]
