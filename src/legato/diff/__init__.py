"""What differs between two checkpoints, or between two runs.

Nothing here imports Keras or code of the user's, or changes anything: what is
read is taken for data, wherever it comes from.
"""

from legato.diff.checkpoints import (
    ArrayDifference,
    Difference,
    ValueDifference,
    compare_checkpoints,
)
from legato.diff.runs import Compared, RunComparison, compare_runs

__all__ = [
    "ArrayDifference",
    "Compared",
    "Difference",
    "RunComparison",
    "ValueDifference",
    "compare_checkpoints",
    "compare_runs",
]
