"""Legato: training runs that can be killed at any instant and go on exactly.

Names are imported when they are first used, so that `import legato` costs
nothing and the Keras backend can still be chosen.
"""

import importlib
from typing import TYPE_CHECKING, Any

from legato.version import __version__

if TYPE_CHECKING:
    from legato import (
        errors,
        files,
        losses,
        metrics,
        optimizers,
        summaries,
    )
    from legato.backends import value_and_grad
    from legato.config import TrainerConfig
    from legato.data import (
        ArraySource,
        Buckets,
        DataIterator,
        DataSource,
        RandomAccessSource,
    )
    from legato.experiment import Experiment, run_experiment
    from legato.exporting import export
    from legato.fitting import evaluate, fit
    from legato.metrics import HostMetric
    from legato.profiling import profile
    from legato.summaries import SummaryManager, SummaryManagerInterface
    from legato.task import Task
    from legato.trainer import Trainer
    from legato.when import Every, Sample
    from legato.workers import Pad

__all__ = [
    "ArraySource",
    "Buckets",
    "DataIterator",
    "DataSource",
    "Every",
    "Experiment",
    "HostMetric",
    "Pad",
    "RandomAccessSource",
    "Sample",
    "SummaryManager",
    "SummaryManagerInterface",
    "Task",
    "Trainer",
    "TrainerConfig",
    "__version__",
    "errors",
    "evaluate",
    "export",
    "files",
    "fit",
    "losses",
    "metrics",
    "optimizers",
    "profile",
    "run_experiment",
    "summaries",
    "value_and_grad",
]

_HOMES = {
    "ArraySource": "legato.data",
    "Buckets": "legato.data",
    "DataIterator": "legato.data",
    "DataSource": "legato.data",
    "Every": "legato.when",
    "Experiment": "legato.experiment",
    "HostMetric": "legato.metrics",
    "Pad": "legato.workers",
    "RandomAccessSource": "legato.data",
    "Sample": "legato.when",
    "SummaryManager": "legato.summaries",
    "SummaryManagerInterface": "legato.summaries",
    "Task": "legato.task",
    "Trainer": "legato.trainer",
    "TrainerConfig": "legato.config",
    "evaluate": "legato.fitting",
    "export": "legato.exporting",
    "fit": "legato.fitting",
    "profile": "legato.profiling",
    "run_experiment": "legato.experiment",
    "value_and_grad": "legato.backends",
}
# These need no Keras, and so leave the choice of its backend open.
_LIGHT = {
    "Every",
    "Experiment",
    "Pad",
    "Sample",
    "SummaryManager",
    "SummaryManagerInterface",
    "TrainerConfig",
    "run_experiment",
}
_MODULES = {
    "errors",
    "files",
    "losses",
    "metrics",
    "optimizers",
    "summaries",
}
_LIGHT_MODULES = {"errors", "files", "summaries"}


def __getattr__(name: str) -> Any:
    if name in _LIGHT_MODULES:
        return importlib.import_module(f"legato.{name}")
    home = f"legato.{name}" if name in _MODULES else _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'legato' has no attribute {name!r}")
    if name not in _LIGHT:
        from legato.backend_choice import default_backend

        default_backend()
    module = importlib.import_module(home)
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
