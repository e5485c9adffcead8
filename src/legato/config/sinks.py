"""The names of sinks: where a run writes, beside its own JSON lines.

They are checked without making one: that needs more than a config does.
"""

import importlib.metadata
from typing import Any

from legato.config.model import nearest
from legato.errors import ConfigError

BUILT_IN = ("csv", "tensorboard")
GROUP = "legato.sinks"
"""The group of entry points by which other packages offer sinks."""

# "metrics.jsonl" is always written.
_ALWAYS = "jsonl"


def check_names(value: Any) -> list[str]:
    """Checks that it is a list of different names.

    Raises:
        ValueError: what it must be.
    """
    if not isinstance(value, list | tuple) or not all(
        isinstance(name, str) and name for name in value
    ):
        raise ValueError(
            'must be a list of the names of sinks, such as ["tensorboard", '
            '"csv"]'
        )
    if _ALWAYS in value:
        raise ValueError("must be without 'jsonl', which is always written")
    if len(set(value)) < len(value):
        raise ValueError("must be different names")
    return list(value)


def plug_ins() -> dict[str, importlib.metadata.EntryPoint]:
    """The sinks that installed packages offer, by name."""
    found = importlib.metadata.entry_points(group=GROUP)
    return {each.name: each for each in found if each.name not in BUILT_IN}


def require_known(names: list[str]) -> None:
    """Checks that there is such a sink for each name.

    Raises:
        ConfigError: there is none; the message names those that there are.
    """
    unknown = [name for name in names if name not in BUILT_IN]
    known = [*BUILT_IN, *(sorted(plug_ins()) if unknown else ())]
    for name in unknown:
        if name in known:
            continue
        meant = nearest(name, known)
        raise ConfigError(
            f"sinks: there is no sink {name!r}"
            + (f" - did you mean {meant!r}?" if meant else ".")
            + f" Known are {', '.join(known)}; a package offers others by "
            f"entry points of the group {GROUP!r}."
        )
