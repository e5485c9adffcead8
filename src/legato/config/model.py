"""The base of all configs, and what pydantic's errors become."""

import difflib
import hashlib
import io
import json
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

import pydantic
import pydantic_core

from legato.config.document import Document, Path
from legato.errors import ConfigError


class Config(pydantic.BaseModel):
    """A frozen, strict pydantic model whose mistakes are `ConfigError`s."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        # Names such as `model_dir` are the user's to choose.
        protected_namespaces=(),
    )

    # Type checkers must see the keywords that pydantic makes of the fields.
    if not typing.TYPE_CHECKING:

        def __init__(self, /, **data: Any) -> None:
            try:
                super().__init__(**data)
            except pydantic.ValidationError as error:
                name = type(self).__name__
                lines = describe_errors(error, Document(data), type(self))
                raise ConfigError(
                    "\n".join(f"{name}: {line}" for line in lines)
                ) from None

        # Without this mark pydantic calls `__init__` for nested models too,
        # and their errors would lose their places (a test holds this).
        __init__.__pydantic_base_init__ = True

    def changed(self) -> set[str]:
        """The fields that do not have their default values.

        (`model_fields_set` has those too that a resolved config wrote out.)
        """
        return {
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name)
            != field.get_default(call_default_factory=True, validated_data={})
        }

    def replace(self, **changes: Any) -> typing.Self:
        """Returns a copy with some fields changed, checked like a new one.

        Raises:
            ConfigError: if a name or value is wrong.
        """
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**(fields | changes))


ConfigType = TypeVar("ConfigType", bound=pydantic.BaseModel)


def validate(
    model_type: type[ConfigType], doc: Document, *, source: str
) -> ConfigType:
    """Makes a config of a document.

    Args:
        model_type: the config's class.
        doc: what was read.
        source: the name for a problem that lies nowhere in the document.

    Raises:
        ConfigError: if any value is wrong; one line for each, with its place.
    """
    try:
        return model_type.model_validate(doc.data)
    except pydantic.ValidationError as error:
        lines = describe_errors(error, doc, model_type, source=source)
        raise ConfigError("\n".join(lines)) from None


def validate_mapping(
    fields: dict[str, Any],
    data: dict[str, Any],
    *,
    required: Iterable[str] = (),
    open_ended: bool = False,
    doc: Document | None = None,
    at: Path = (),
    source: str,
) -> dict[str, Any]:
    """Checks keyword arguments that came from a config.

    The types are read as in strict JSON: a list may become a tuple and a
    string a path, but `"10"` is no number.

    Args:
        fields: names and type annotations of the arguments.
        data: the arguments; plain JSON data.
        required: the names that have no default.
        open_ended: whether names that are not in `fields` are let through.
        doc: the document that `data` is a part of, for places.
        at: where in it `data` lies.
        source: the name for messages where there is no document.

    Returns:
        The arguments that were given, as their annotations ask for them.

    Raises:
        ConfigError: if any name or value is wrong, with all problems.
    """
    needed = frozenset(required)
    # The arguments are aliases, because a field cannot have any name.
    names = {f"argument_{index}": name for index, name in enumerate(fields)}
    arguments = pydantic.create_model(
        "Arguments",
        __config__=pydantic.ConfigDict(
            extra="allow" if open_ended else "forbid",
            strict=True,
            arbitrary_types_allowed=True,
        ),
        **{
            field: (
                fields[name],
                pydantic.Field(... if name in needed else None, alias=name),
            )
            for field, name in names.items()
        },  # pyright: ignore[reportArgumentType, reportCallIssue]
    )
    try:
        model = arguments.model_validate_json(json.dumps(data))
        given = {
            names[field]: getattr(model, field)
            for field in model.model_fields_set & names.keys()
        }
        return (model.model_extra or {}) | given
    except pydantic.ValidationError as error:
        lines = describe_errors(
            error, doc or Document({}), fields, source=source, at=at
        )
        raise ConfigError("\n".join(lines)) from None


def dump_yaml(model: pydantic.BaseModel) -> str:
    """Returns a config as YAML in the order of its fields; it reads back."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore
    stream = io.StringIO()
    yaml.dump(model.model_dump(mode="json"), stream)
    return stream.getvalue()


def config_hash(model: pydantic.BaseModel) -> str:
    """Returns the sha256 of a config's canonical JSON, in hexadecimal."""
    canonical = json.dumps(
        model.model_dump(mode="json"), sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def describe_errors(
    error: pydantic.ValidationError,
    doc: Document,
    schema: Any,
    *,
    source: str = "",
    at: Path = (),
) -> list[str]:
    """Returns one line for each of pydantic's errors.

    Args:
        error: what pydantic raised.
        doc: what was read, with places.
        schema: the model, or the names and annotations, that was expected.
        source: the place of a problem that lies nowhere in `doc`.
        at: where in `doc` the validated part lies.
    """
    lines: dict[str, None] = {}  # an ordered set: unions repeat themselves
    for item in error.errors(include_url=False):
        inner = _without_union_tags(item["loc"], schema)
        path = (*at, *inner)
        unknown = item["type"] == "extra_forbidden"
        place = doc.place(path, of_key=unknown) or source
        dotted = ".".join(map(str, path))
        if unknown:
            kind = "key" if place else "argument"
            rule = f"not a known {kind}" + _did_you_mean(schema, inner, at)
        else:
            rule = _rule(item)
        got = "" if item["type"] == "missing" else _got(item["input"])
        prefix = ": ".join(filter(None, (place, dotted)))
        lines[f"{prefix}: {rule}{got}" if prefix else rule + got] = None
    return list(lines)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that `name` was probably meant to be."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, 1, 0.6)
    return by_lower[close[0]] if close else None


_RULES = {
    "missing": "is required, and missing",
    "none_required": "must be null (None)",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "needs_python_object": "cannot be given in a config: it needs a Python "
    "object",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
}


def _rule(item: pydantic_core.ErrorDetails) -> str:
    context = item.get("ctx", {})
    if item["type"] == "value_error":
        return str(context["error"])
    if item["type"] == "literal_error":
        rule = f"must be one of {context['expected']}"
        choices = context["expected"].replace(" or ", ", ").split(", ")
        meant = nearest(str(item["input"]), (c.strip("'") for c in choices))
        return rule + (f" - did you mean {meant!r}?" if meant else "")
    if item["type"] in _RULES:
        return _RULES[item["type"]].format(**context)
    said = item["msg"]
    return said[:1].lower() + said[1:]


def _got(value: Any) -> str:
    if isinstance(value, pydantic.BaseModel):
        return ""
    # Of a mapping or a list the keys below it have told more already.
    if isinstance(value, dict | list) and len(repr(value)) > 60:
        return f" (got a {'mapping' if isinstance(value, dict) else 'list'})"
    shown = repr(value)
    return f" (got {shown if len(shown) <= 80 else shown[:77] + '...'})"


def _did_you_mean(schema: Any, path: Path, at: Path) -> str:
    fields = _fields(_schema_at(schema, path[:-1]))
    name = str(path[-1])
    # `train_steps` at the top was meant to be `trainer.train_steps`.
    deeper = {
        inner: ".".join(map(str, (*at, *path[:-1], outer, inner)))
        for outer, inner_schema in fields.items()
        for inner in _fields(inner_schema)
    }
    meant = deeper.get(name) or nearest(name, fields)
    if meant is None and (inner := nearest(name, deeper)):
        meant = deeper[inner]
    if meant is not None:
        return f" - did you mean {meant!r}?"
    if not fields:
        return "; none is taken here"
    return f"; known are {', '.join(fields)}"


def _schema_at(schema: Any, path: Iterable[str | int]) -> Any:
    for step in path:
        if isinstance(step, int):
            arguments = typing.get_args(_unwrap(schema))
            schema = arguments[0] if arguments else None
        else:
            schema = _fields(schema).get(step)
    return schema


def _fields(schema: Any) -> dict[str, Any]:
    """Returns names and annotations of a model, or of an optional one."""
    schema = _unwrap(schema)
    if isinstance(schema, dict):
        return schema
    if isinstance(schema, type) and issubclass(schema, pydantic.BaseModel):
        return {
            name: field.annotation
            for name, field in schema.model_fields.items()
        }
    return {}


def _unwrap(schema: Any) -> Any:
    """Returns X for `X | None` and for `Annotated[X, ...]`."""
    origin = typing.get_origin(schema)
    if origin is typing.Annotated:
        return _unwrap(typing.get_args(schema)[0])
    if origin in (typing.Union, types.UnionType):
        others = [
            argument
            for argument in typing.get_args(schema)
            if argument is not types.NoneType
        ]
        if len(others) == 1:
            return _unwrap(others[0])
    return schema


def _without_union_tags(location: Path, schema: Any) -> Path:
    """Drops the names of union members that pydantic adds to a path."""
    path: Path = ()
    for step in location:
        fields = _fields(_schema_at(schema, path))
        union = typing.get_origin(_schema_at(schema, path)) in (
            typing.Union,
            types.UnionType,
        )
        if union and not fields:
            break
        path = (*path, step)
    return path
