"""Keras's automatic names."""

import collections
import contextlib
from collections.abc import Iterator

from keras.src.backend.common import global_state

_COUNTERS = "object_name_uids"


@contextlib.contextmanager
def fresh_names() -> Iterator[None]:
    """While active: automatic names are counted from the beginning."""
    before = global_state.get_global_attribute(
        _COUNTERS, default=collections.defaultdict(int), set_to_default=True
    )
    global_state.set_global_attribute(_COUNTERS, collections.defaultdict(int))
    try:
        yield
    finally:
        global_state.set_global_attribute(_COUNTERS, before)
