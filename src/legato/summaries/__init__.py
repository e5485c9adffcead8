"""Summaries: curves, texts, pictures and histograms, for TensorBoard.

A `SummaryManager` writes nested results; the functions here write one value
each to the writer that is current, which in a `summary_fn` is the right one.
"""

from legato.summaries.managers import SummaryManager, SummaryManagerInterface
from legato.summaries.writers import (
    SummaryWriter,
    as_step,
    by_type,
    current_step,
    figure,
    histogram,
    image,
    scalar,
    text,
)

__all__ = [
    "SummaryManager",
    "SummaryManagerInterface",
    "SummaryWriter",
    "as_step",
    "by_type",
    "current_step",
    "figure",
    "histogram",
    "image",
    "scalar",
    "text",
]
