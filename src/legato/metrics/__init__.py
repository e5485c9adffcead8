"""Metrics: when they are updated, in steps and on the host; their results."""

from legato.metrics.host import HostMetric
from legato.metrics.in_steps import (
    HostStepMetric,
    StepMetric,
    check_metrics,
    run_recorded,
)
from legato.metrics.results import Results, directions

__all__ = [
    "HostMetric",
    "HostStepMetric",
    "Results",
    "StepMetric",
    "check_metrics",
    "directions",
    "run_recorded",
]
