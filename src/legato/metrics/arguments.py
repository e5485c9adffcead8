"""Checks of arguments that several metrics have; they know no metric."""

from legato.errors import ConfigError


def require_bools(called: str, **flags: object) -> None:
    """Check arguments that must be True or False.

    Args:
        called: what they are arguments of, for the message.
        **flags: by the name of the argument.

    Raises:
        ConfigError: one is something else.
    """
    for name, value in flags.items():
        if type(value) is not bool:
            raise ConfigError(
                f"{called}({name}={value!r:.80}): it must be True or False."
            )
