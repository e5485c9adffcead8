"""YAML 1.2 documents that know where each of their values was written.

Only plain data come out of here: mappings with string keys, sequences,
strings, numbers, booleans and null. Tags are refused, so that no text of a
file can name a type to make.
"""

import copy
import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

from legato.errors import ConfigError

Path = tuple[str | int, ...]
"""Where a value lies in a document: `("callbacks", 0, "type")`."""

# A config is written by hand. These bounds are far above any such file, and
# keep a hostile or mistaken one (aliases that double each other, a data set
# given as a config) from taking the machine's memory or minutes of its time.
_MAX_BYTES = 256 * 1024
_MAX_VALUES = 50_000
_MAX_DEPTH = 50

_TAG = "tag:yaml.org,2002:"


@dataclasses.dataclass(frozen=True)
class Document:
    """Plain data, and where each part of them was written.

    Attributes:
        data: the root mapping.
        keys: for each path, where its key was written, as a prefix for a
            message: `"config.yaml:3:3"` or `"override 'trainer.seed=1'"`.
        values: the same for its value.
    """

    data: dict[str, Any]
    keys: dict[Path, str] = dataclasses.field(default_factory=dict)
    values: dict[Path, str] = dataclasses.field(default_factory=dict)

    def place(self, path: Path, *, of_key: bool = False) -> str | None:
        """Returns where `path`, or what contains it, was written."""
        table = self.keys if of_key else self.values
        while path not in table:
            if not path:
                return None
            path, table = path[:-1], self.values
        return table[path]


def load_yaml(path: str | pathlib.Path) -> Document:
    """Reads a YAML file whose root is a mapping.

    Raises:
        ConfigError: if the file cannot be read, is empty, too large, is not
            valid YAML 1.2, repeats a key, or holds more than plain data. The
            message has line and column.
    """
    source = str(path)
    try:
        if pathlib.Path(path).is_dir():
            raise ConfigError(f"{source}: is a directory, not a YAML file.")
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{source}: there is no such file.") from None
    except OSError as error:
        raise ConfigError(
            f"{source}: cannot be read: {error.strerror}."
        ) from error
    if len(raw) > _MAX_BYTES:
        raise ConfigError(
            f"{source}: is larger than {_MAX_BYTES // 1024} KiB, too large "
            "for a config. Is it the right file?"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source}: is not UTF-8 text (byte {error.start})."
        ) from None
    return parse_yaml(text, source)


def parse_yaml(text: str, source: str) -> Document:
    """Reads YAML text; `source` is the file's name for messages.

    Raises:
        ConfigError: as `load_yaml` does.
    """
    root = _compose(text, source)
    if root is None:
        raise ConfigError(
            f"{source}: is empty; a config is a mapping such as 'task: digits'."
        )
    reader = _Reader(lambda line, column: f"{source}:{line}:{column}")
    data = reader.read(root, ())
    if not isinstance(data, dict):
        reader.problem(
            root, "the root must be a mapping such as 'task: digits'"
        )
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    assert isinstance(data, dict)
    return Document(data, reader.keys, reader.values)


def apply_overrides(doc: Document, overrides: Iterable[str]) -> Document:
    """Returns `doc` with values put in from texts such as `"trainer.seed=1"`.

    The part before `=` is a path of keys and indices joined by dots, and what
    follows is read as YAML. Mappings on the way are made where they are
    missing: whether a key is a known one is for `validate` to say.

    Raises:
        ConfigError: if an override has no `=`, its value is not valid YAML, or
            its path leads through something that is no mapping or sequence.
            All such problems are reported at once.
    """
    result = Document(copy.deepcopy(doc.data), dict(doc.keys), dict(doc.values))
    problems = []
    for override in overrides:
        try:
            _apply(result, override)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return result


def _apply(doc: Document, override: str) -> None:
    place = f"override {override!r}"
    dotted, equals, text = override.partition("=")
    names = dotted.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(
            f"{place}: must be KEY=VALUE, such as trainer.train_steps=1000."
        )
    reader = _Reader(lambda line, column: place)
    root = _compose(text, place)
    value = None if root is None else reader.read(root, ())
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))

    container: Any = doc.data
    path: Path = ()
    for depth, name in enumerate(names):
        key = _key_in(container, name, path, place)
        path = (*path, key)
        # A null on the way is an empty mapping written without its braces.
        missing = isinstance(key, str) and container.get(key) is None
        if missing:
            doc.keys[path] = doc.values[path] = place
        if depth == len(names) - 1:
            _forget(doc, path)
            container[key] = value
            doc.keys[path] = place
            doc.values.update({(*path, *at): place for at in reader.values})
            doc.keys.update({(*path, *at): place for at in reader.keys})
            doc.values[path] = place
        else:
            if missing:
                container[key] = {}
            container = container[key]


def _key_in(container: Any, name: str, path: Path, place: str) -> str | int:
    where = ".".join(map(str, path))
    if isinstance(container, dict):
        return name
    if isinstance(container, list):
        if name.isdecimal() and int(name) < len(container):
            return int(name)
        raise ConfigError(
            f"{place}: {where} is a list of {len(container)}; {name!r} is not "
            "an index of it (they count from 0)."
        )
    raise ConfigError(
        f"{place}: {where} is {container!r}, which has no {name!r} in it."
    )


def _forget(doc: Document, path: Path) -> None:
    """Drops the places of what an override replaces."""
    for table in (doc.keys, doc.values):
        for known in [at for at in table if at[: len(path)] == path]:
            del table[known]


def _compose(text: str, source: str) -> Any:
    """Returns the root node, or None where there is nothing but comments."""
    # Late: `legato --help` needs no YAML.
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = source
        if mark is not None and not source.startswith("override"):
            place = f"{source}:{mark.line + 1}:{mark.column + 1}"
        said = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{place}: is not valid YAML: {said}.") from None
    except YAMLError as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{source}: is not valid YAML: {said}.") from None
    except RecursionError:
        raise ConfigError(
            f"{source}: is nested more than {_MAX_DEPTH} levels deep."
        ) from None


class _Reader:
    """Turns nodes into plain data, and notes where each was written."""

    def __init__(self, place) -> None:
        self.problems: list[str] = []
        self.keys: dict[Path, str] = {}
        self.values: dict[Path, str] = {}
        self._place = place
        self._count = 0
        self._gave_up = False

    def where(self, node: Any) -> str:
        mark = node.start_mark
        return self._place(mark.line + 1, mark.column + 1)

    def problem(self, node: Any, text: str) -> None:
        self.problems.append(f"{self.where(node)}: {text}")

    def read(self, node: Any, path: Path) -> Any:
        self._count += 1
        # An alias shares its node, so a cycle shows as depth and a bomb as
        # a count; either ends the reading at once.
        if len(path) > _MAX_DEPTH or self._count > _MAX_VALUES:
            if not self._gave_up:
                self._gave_up = True
                self.problem(
                    node,
                    f"more than {_MAX_DEPTH} levels or {_MAX_VALUES} values "
                    "(counting what aliases repeat) are too many for a config",
                )
            return None
        if self._gave_up:
            return None
        self.values[path] = self.where(node)
        kind = str(node.tag).removeprefix(_TAG)
        if kind == "map" and isinstance(node.value, list):
            return self._mapping(node, path)
        if kind == "seq" and isinstance(node.value, list):
            return [
                self.read(child, (*path, index))
                for index, child in enumerate(node.value)
            ]
        if isinstance(node.value, str):
            try:
                return _scalar(kind, node.value)
            except ValueError:
                self.problem(
                    node, f"{node.value[:40]!r} cannot be read as {kind}"
                )
                return None
            except KeyError:
                pass
        self.problem(
            node, f"the tag {str(node.tag)!r} is not allowed: only plain data"
        )
        return None

    def _mapping(self, node: Any, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if str(key_node.tag) == f"{_TAG}merge":
                self.problem(
                    key_node,
                    "merge keys ('<<') are not supported: write the keys out",
                )
                continue
            if str(key_node.tag) != f"{_TAG}str":
                shown = key if isinstance(key, str) else "a mapping or list"
                self.problem(
                    key_node, f"keys must be strings: put {shown} in quotes"
                )
                continue
            at = (*path, key)
            if key in mapping:
                self.problem(
                    key_node,
                    f"the key {key!r} is given twice (first at "
                    f"{self.keys[at]})",
                )
                continue
            self.keys[at] = self.where(key_node)
            mapping[key] = self.read(value_node, at)
            if self._gave_up:
                break
        return mapping


def _scalar(kind: str, text: str) -> Any:
    """Returns a scalar's value by the YAML 1.2 core schema.

    Raises:
        KeyError: if `kind` is not one of its types.
        ValueError: if `text` is not of that type.
    """
    match kind:
        # Dates stay text: no config needs them, and JSON has none.
        case "str" | "timestamp" | "value":
            return text
        case "null":
            return None
        case "bool":
            if text.lower() not in ("true", "false"):
                return text  # "yes" and "on" of YAML 1.1
            return text.lower() == "true"
        case "int":
            digits = text.replace("_", "")
            unsigned = digits.lstrip("+-").lower()
            base = {"0x": 16, "0o": 8, "0b": 2}.get(unsigned[:2], 10)
            return int(digits, base)
        case "float":
            digits = text.replace("_", "").lower()
            for name in ("inf", "nan"):
                digits = digits.replace(f".{name}", name)
            return float(digits)
    raise KeyError(kind)
