"""What can stand in a config: each field's path, type, default and meaning.

The meaning is the field's entry in the docstring of its class, so that it is
written once; a field without one is a mistake that a test finds.
"""

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

import pydantic
import pydantic_core

from legato.config.model import Config

_WIDTH = 80
_ENTRY = re.compile(r"^(\w+): (.*(?:\n +.*)*)", re.MULTILINE)
_PLAIN = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    dict: "mapping",
    list: "list",
    types.NoneType: "null",
}


@dataclasses.dataclass(frozen=True)
class Field:
    """One line of a config.

    Attributes:
        path: such as "trainer.train_steps"; capitals stand for any key.
        kind: what its value may be, in words.
        default: as in YAML; None where it must be given.
        meaning: a sentence or two, with the unit.
    """

    path: str
    kind: str
    default: str | None
    meaning: str


def fields(model: type[Config], start: str = "") -> Iterator[Field]:
    """All fields of a config and of the sections in it, in their order.

    Args:
        model: the config's class.
        start: what stands before their names.

    Raises:
        KeyError: a field has no entry in the docstring of its class.
    """
    meanings = _meanings(model)
    for name, field in model.model_fields.items():
        path = f"{start}{name}"
        yield Field(
            path=path,
            kind=_kind(field.annotation),
            default=_default(field),
            meaning=meanings[name],
        )
        section, key = _section(field.annotation)
        if section is not None:
            yield from fields(section, f"{path}.{key}")


def describe(model: type[Config]) -> str:
    """The fields of a config as text, of at most 80 columns."""
    lines = []
    for field in fields(model):
        default = field.default
        given = "required" if default is None else f"default: {default}"
        lines += textwrap.wrap(
            f"{field.path}  ({field.kind}; {given})",
            _WIDTH,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += textwrap.wrap(
            field.meaning[:1].upper() + field.meaning[1:],
            _WIDTH,
            initial_indent="    ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
    return "\n".join(lines) + "\n"


def _meanings(model: type[Config]) -> dict[str, str]:
    text = inspect.getdoc(model) or ""
    _, _, attributes = text.partition("\nAttributes:\n")
    return {
        match[1]: _as_yaml(" ".join(match[2].split()))
        for match in _ENTRY.finditer(textwrap.dedent(attributes))
    }


def _as_yaml(sentence: str) -> str:
    """Python's None is YAML's null."""
    return re.sub(r"\bNone\b", "null", sentence.replace("null (None)", "null"))


def _default(field: pydantic.fields.FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, pydantic.BaseModel):
        return "see below"
    return pydantic_core.to_json(value).decode()


def _kind(annotation: Any) -> str:
    origin, arguments = (
        typing.get_origin(annotation),
        typing.get_args(annotation),
    )
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_kind, arguments)))
    if _is_config(annotation):
        return "section"
    if origin is list:
        (each,) = arguments
        return (
            "list of sections" if _is_config(each) else f"list of {_kind(each)}"
        )
    if origin is dict and _is_config(arguments[1]):
        return "sections by name"
    return _PLAIN.get(origin or annotation, "any")


def _section(annotation: Any) -> tuple[type[Config] | None, str]:
    """The section in a field, and what comes before the names in it."""
    origin, arguments = (
        typing.get_origin(annotation),
        typing.get_args(annotation),
    )
    if _is_config(annotation):
        return annotation, ""
    if origin is dict and _is_config(arguments[1]):
        return arguments[1], "SPLIT."
    if origin is list and _is_config(arguments[0]):
        return arguments[0], "N."
    if origin in (typing.Annotated, typing.Union, types.UnionType):
        for each in arguments:
            section, key = _section(each)
            if section is not None:
                return section, key
    return None, ""


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)
