"""Objects that a config names, and the keyword arguments that they get."""

import json
import re
from typing import Annotated, Any

import pydantic

OBJECT = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
"""`package.module:Name`."""


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Checks that a mapping can be written to `config.yaml`; copies it."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"must hold plain data only (numbers, strings, lists): {error}"
        ) from None


Arguments = Annotated[dict[str, Any], pydantic.AfterValidator(_plain)]
"""Keyword arguments as they stand in a config."""


def check_class(value: str, package: str, example: str) -> str:
    """Checks that it is `package.module:Class`, or the bare name of a class.

    Args:
        value: what is checked.
        package: where classes with bare names are.
        example: of these.
    """
    if ":" in value:
        return check_object(value)
    if not value.isidentifier():
        raise ValueError(
            'must be "package.module:Class", or the name of a class of '
            f'{package} such as "{example}"'
        )
    return value


def check_object(value: str) -> str:
    """Checks that it is of the form `package.module:Name`."""
    if not OBJECT.fullmatch(value):
        raise ValueError('must be of the form "package.module:Name"')
    return value
