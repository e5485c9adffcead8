"""Which variables an optimizer leaves out of weight decay.

Its `get_config` does not tell; the private name is touched here.
"""

import re
from typing import Any

import keras


def exempt_from_decay(optimizer: keras.optimizers.Optimizer) -> list[str]:
    """The patterns given to `exclude_from_weight_decay`, sorted."""
    own: Any = optimizer
    while isinstance(own, keras.optimizers.LossScaleOptimizer):
        own = own.inner_optimizer
    found: re.Pattern[str] | None = vars(own).get(
        "_exclude_from_weight_decay_pattern"
    )
    return sorted(found.pattern.split("|")) if found is not None else []
