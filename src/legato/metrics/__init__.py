"""Metrics: when they are updated, in steps and on the host; their results."""

from legato.metrics.adapters import SklearnMetric, WrappedMetric
from legato.metrics.calibration import ExpectedCalibrationError
from legato.metrics.coco import CocoMetric
from legato.metrics.host import HostMetric
from legato.metrics.in_steps import (
    HostStepMetric,
    StepMetric,
    check_metrics,
    run_recorded,
)
from legato.metrics.results import Results, described, directions, label
from legato.metrics.segmentation import (
    ConfusionMatrix,
    MeanDice,
    MeanIoU,
    PerClassDice,
    PerClassIoU,
)

__all__ = [
    "CocoMetric",
    "ConfusionMatrix",
    "ExpectedCalibrationError",
    "HostMetric",
    "HostStepMetric",
    "MeanDice",
    "MeanIoU",
    "PerClassDice",
    "PerClassIoU",
    "Results",
    "SklearnMetric",
    "StepMetric",
    "WrappedMetric",
    "check_metrics",
    "described",
    "directions",
    "label",
    "run_recorded",
]
