"""Where the values of a run go: JSON lines, TensorBoard, CSV, and others.

`metrics.jsonl` and the files of the built-in sinks are part of the run's
exact state and are rewound when it is resumed; wall-clock figures are not,
and live apart in `timing.jsonl`.
"""

from legato.sinks.files import CSV, METRICS, CsvSink, JsonLinesSink
from legato.sinks.log import SUMMARIES, TIMING, RunLog
from legato.sinks.managed import EvaluationSink, ManagerSink, check_managers
from legato.sinks.protocol import Sink, SyncedSink

__all__ = [
    "CSV",
    "METRICS",
    "SUMMARIES",
    "TIMING",
    "CsvSink",
    "EvaluationSink",
    "JsonLinesSink",
    "ManagerSink",
    "RunLog",
    "Sink",
    "SyncedSink",
    "check_managers",
]
