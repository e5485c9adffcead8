"""Durations as people write them: "30s", "10min", "1h30min", "2d"."""

import re

from legato.errors import ConfigError

_SECONDS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
}
RULE = 'must be a duration above zero, such as "30s", "10min", "1.5h" or "2d"'
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.ASCII)


def parse_duration(text: str) -> float:
    """Returns the seconds that a duration such as `"1h30min"` stands for.

    Args:
        text: numbers with units, added up. The units are `s`, `min` (or `m`),
            `h` and `d`, and their English names.

    Raises:
        ConfigError: if the text is not a duration, or is no time at all.
    """
    seconds = seconds_of(text)
    if seconds is None:
        raise ConfigError(f"{RULE} (got {text!r})")
    return seconds


def seconds_of(text: str) -> float | None:
    """Returns the seconds of a duration, or None where `text` is none."""
    seconds, position = 0.0, 0
    stripped = text.strip().lower()
    while part := _PART.match(stripped, position):
        number, unit = part.groups()
        if unit not in _SECONDS:
            break
        seconds += float(number) * _SECONDS[unit]
        position = part.end()
    if position < len(stripped) or not 0 < seconds < float("inf"):
        return None
    return seconds
