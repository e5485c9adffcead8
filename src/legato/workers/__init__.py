"""Batches of examples, made in other threads and processes.

Nothing here imports Keras or a backend, so that a worker process is there in
a tenth of a second: `recipe` says how a batch is made of examples, `collating`
how examples become a batch, `threads` and `processes` are the two kinds of
workers, `child` is what a worker process runs, `sharing` the memory that it
shares with its parent, and `seeding` what the global generators give there.
"""

from legato.workers.collating import Pad, UnevenError, stack
from legato.workers.recipe import Findings, Job, Recipe, Workers

__all__ = [
    "Findings",
    "Job",
    "Pad",
    "Recipe",
    "UnevenError",
    "Workers",
    "stack",
]
