"""Tasks that come with legato, and experiments of them (YAML files)."""

from legato.tasks.classification import ImageClassificationTask
from legato.tasks.digits import Digits
from legato.tasks.retinanet import RetinaNetTask
from legato.tasks.segmentation import SemanticSegmentationTask
from legato.tasks.sketch_rnn import SketchRNNTask

__all__ = [
    "Digits",
    "ImageClassificationTask",
    "RetinaNetTask",
    "SemanticSegmentationTask",
    "SketchRNNTask",
]
