import hashlib
import math
from typing import Annotated, Any

import numpy as np
import pydantic
import pytest

import legato.config as config_lib
from legato.config import (
    Config,
    TrainerConfig,
    apply_overrides,
    config_hash,
    dump_yaml,
    load_yaml,
    parse_duration,
    parse_yaml,
    validate,
    validate_mapping,
)
from legato.errors import ConfigError


class Inner(Config):
    rate: Annotated[float, pydantic.Field(gt=0)] = 0.1
    layers: list[int] = pydantic.Field(default_factory=list)


class Outer(Config):
    name: str
    inner: Inner = Inner()
    several: list[Inner] = pydantic.Field(default_factory=list)
    maybe: Inner | None = None
    trainer: TrainerConfig = TrainerConfig()
    free: dict[str, Any] = pydantic.Field(default_factory=dict)


def read(text, *overrides):
    document = apply_overrides(parse_yaml(text, "config.yaml"), overrides)
    return validate(Outer, document, source="config.yaml")


def problems_of(function, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    assert not isinstance(caught.value, pydantic.ValidationError)
    return str(caught.value).splitlines()


# In Python.


def test_a_wrong_call_names_all_problems_at_once():
    assert problems_of(
        TrainerConfig,
        trian_steps=500,
        checkpoint_interval=0,
        keep_last=-1,
        exact="strickt",
        checkpoint_timeout=0,
        best_metric=3,
    ) == [
        "TrainerConfig: checkpoint_interval: must be a number of steps of at "
        'least 1, "epoch", or a duration such as "10min"; a run without '
        "checkpoints could not be resumed (got 0)",
        "TrainerConfig: keep_last: must be a whole number of at least 1, or "
        "null (None) to keep all (got -1)",
        "TrainerConfig: checkpoint_timeout: must be above 0 (got 0)",
        "TrainerConfig: best_metric: must be a string (got 3)",
        "TrainerConfig: exact: must be one of 'strict', 'warn' or 'off' - did "
        "you mean 'strict'? (got 'strickt')",
        "TrainerConfig: trian_steps: not a known argument - did you mean "
        "'train_steps'? (got 500)",
    ]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("train_steps", 0),
        ("train_steps", True),
        ("train_steps", 1.5),
        ("train_steps", "10"),
        ("train_steps", math.nan),
        ("epochs", -3),
        ("seed", -1),
        ("seed", None),
        ("validation_interval", 0),
        ("validation_interval", "epochs"),
        ("validation_interval", False),
        ("validation_steps", 0),
        ("checkpoint_interval", None),
        ("checkpoint_interval", "10 parsecs"),
        ("checkpoint_interval", 2.5),
        ("keep_every", 0),
        ("checkpoint_timeout", math.inf),
        ("summary_interval", -1),
        ("sinks", "tensorboard"),
        ("sinks", ["csv", 3]),
        ("sinks", ["csv", "csv"]),
        ("sinks", ["jsonl"]),
        ("train_metrics_interval", "epoch"),
        ("steps_per_loop", 0),
        ("best_mode", "most"),
        ("resume", True),
        ("nonfinite_loss", "ignore"),
        ("max_time", 0),
        ("max_time", -5.0),
        ("max_time", math.nan),
        ("max_time", "soon"),
        ("progress", "tqdm"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, bad):
    (line,) = problems_of(TrainerConfig, **{name: bad})
    assert line.startswith(f"TrainerConfig: {name}: must be ")
    assert line.endswith(f"(got {bad!r})")


@pytest.mark.parametrize(
    ("name", "good", "becomes"),
    [
        ("train_steps", np.int64(7), 7),
        ("train_steps", 1e5, 100_000),
        ("validation_interval", None, None),
        ("validation_interval", 5, 5),
        ("checkpoint_interval", np.int32(3), 3),
        ("checkpoint_interval", "10min", "10min"),
        ("keep_last", None, None),
        ("summary_interval", 0, 0),
        ("sinks", [], []),
        ("sinks", ("csv", "mine"), ["csv", "mine"]),
        ("train_metrics_interval", 0, 0),
        ("checkpoint_timeout", 60, 60.0),
        ("max_time", 90, 90.0),
        ("max_time", "1.5h", "1.5h"),
    ],
)
def test_a_good_value_is_taken(name, good, becomes):
    value = getattr(TrainerConfig(**{name: good}), name)
    assert value == becomes and type(value) is type(becomes)


def test_one_length_at_most_and_one_to_train():
    (line,) = problems_of(TrainerConfig, train_steps=5, epochs=2)
    assert "train_steps=5 and epochs=2 are both given" in line
    (line,) = problems_of(TrainerConfig().require_length)
    assert line.endswith("give train_steps or epochs.")
    TrainerConfig(epochs=2).require_length()


def test_sinks_are_known_when_training_begins():
    TrainerConfig(sinks=["csv", "tensorboard"]).require_sinks()
    config = TrainerConfig(sinks=["csv", "tensorbord"])
    (line,) = problems_of(config.require_sinks)
    assert line == (
        "sinks: there is no sink 'tensorbord' - did you mean 'tensorboard'? "
        "Known are csv, tensorboard; a package offers others by entry points "
        "of the group 'legato.sinks'."
    )
    (line,) = problems_of(TrainerConfig(sinks=["x"]).require_sinks)
    assert line.startswith("sinks: there is no sink 'x'. Known are csv,")


def test_durations():
    config = TrainerConfig(checkpoint_interval="10min", max_time="1h30min")
    assert config.checkpoint_seconds == 600
    assert config.max_seconds == 5400
    assert TrainerConfig().checkpoint_seconds is None
    assert TrainerConfig(checkpoint_interval=5).checkpoint_seconds is None
    assert TrainerConfig(max_time=5).max_seconds == 5


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("10min", 600),
        (" 10 Minutes ", 600),
        ("1.5h", 5400),
        ("2d", 172_800),
        ("1h 30m", 5400),
    ],
)
def test_parse_duration(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "10", "min", "-1s", "1e3s", "0s", "1h x", "9" * 400 + "d"]
)
def test_parse_duration_refuses(text):
    (line,) = problems_of(parse_duration, text)
    assert "must be a duration above zero" in line


def test_replace_checks_and_keeps_the_rest():
    config = TrainerConfig(train_steps=5, seed=3)
    assert config.replace(seed=4) == TrainerConfig(train_steps=5, seed=4)
    assert "did you mean 'seed'" in problems_of(config.replace, sed=1)[0]


def test_configs_are_frozen():
    with pytest.raises(pydantic.ValidationError):
        TrainerConfig().seed = 3  # type: ignore


def test_nested_models_in_python():
    assert problems_of(Outer, name="x", inner={"rat": 1}, several=[1]) == [
        "Outer: inner.rat: not a known argument - did you mean 'rate'? (got 1)",
        "Outer: several.0: must be a mapping (got 1)",
    ]


def test_every_field_is_described():
    for name in TrainerConfig.model_fields:
        assert f"\n        {name}: " in TrainerConfig.__doc__


def test_exported_names_exist():
    assert all(hasattr(config_lib, name) for name in config_lib.__all__)


# In YAML.


def test_all_problems_with_places():
    text = (
        "trainer:\n"
        "  trian_steps: 500\n"
        "  epochs: ten\n"
        "train_steps: 5\n"
        "inner: {rate: -1, layers: [1, x]}\n"
        "several:\n"
        "  - rate: 1\n"
        "  - raet: 2\n"
        "maybe: {rate: a}\n"
        "zebra: 1\n"
    )
    assert sorted(problems_of(read, text, "trainer.seed=no")) == [
        "config.yaml:10:1: zebra: not a known key; known are name, inner, "
        "several, maybe, trainer, free (got 1)",
        "config.yaml:1:1: name: is required, and missing",
        "config.yaml:2:3: trainer.trian_steps: not a known key - did you mean "
        "'train_steps'? (got 500)",
        "config.yaml:3:11: trainer.epochs: must be a whole number of at least "
        "1 (got 'ten')",
        "config.yaml:4:1: train_steps: not a known key - did you mean "
        "'trainer.train_steps'? (got 5)",
        "config.yaml:5:15: inner.rate: must be above 0 (got -1)",
        "config.yaml:5:31: inner.layers.1: must be a whole number (got 'x')",
        "config.yaml:8:5: several.1.raet: not a known key - did you mean "
        "'rate'? (got 2)",
        "config.yaml:9:15: maybe.rate: must be a number (got 'a')",
        "override 'trainer.seed=no': trainer.seed: must be a whole number of "
        "at least 0 (got 'no')",
    ]


def test_yaml_is_version_1_2():
    text = (
        "name: on\nfree: {a: 1e-3, b: 012, c: 12:30:45, d: 0x10, e: 0o14,\n"
        "  f: 1_000, g: 2024-01-01, h: .inf, i: ~, j: true, k: no, l: '1',\n"
        "  m: !!str 5, n: -.INF, o: 1e5, p: +7}\n"
    )
    assert read(text).name == "on"
    assert read(text).free == {
        "a": 0.001,
        "b": 12,
        "c": "12:30:45",
        "d": 16,
        "e": 12,
        "f": 1000,
        "g": "2024-01-01",
        "h": math.inf,
        "i": None,
        "j": True,
        "k": "no",
        "l": "1",
        "m": "5",
        "n": -math.inf,
        "o": 1e5,
        "p": 7,
    }


def test_aliases_work():
    assert read("name: x\nfree: {a: &a [1], b: *a}").free["b"] == [1]


_TEN = "[{}]".format(",".join(["*{}"] * 10))
_BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} {_TEN.format(*[before] * 10)}\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "config.yaml: is empty"),
        ("# nothing\n", "config.yaml: is empty"),
        ("[1]", "config.yaml:1:1: the root must be a mapping"),
        ("text", "config.yaml:1:1: the root must be a mapping"),
        ("a: [1, 2\nb: 3\n", "config.yaml:2:2: is not valid YAML: "),
        ("a: b: c", "config.yaml:1:5: is not valid YAML: "),
        ("a: *b", "config.yaml:1:4: is not valid YAML: "),
        ("a: 1\n---\nb: 1", "config.yaml:2:1: is not valid YAML: "),
        ("a: \x00", "config.yaml: is not valid YAML: "),
        ("a: 1\n\na: 2", "config.yaml:3:1: the key 'a' is given twice (first"),
        ("1: a", "config.yaml:1:1: keys must be strings: put 1 in quotes"),
        ("<<: {a: 1}", "config.yaml:1:1: merge keys ('<<') are not"),
        (
            "a: !!python/object/apply:os.system ['true']",
            "config.yaml:1:4: the tag 'tag:yaml.org,2002:python/object/apply:"
            "os.system' is not allowed",
        ),
        ("a: !mine x", "config.yaml:1:4: the tag '!mine' is not allowed"),
        ("a: !!int x", "config.yaml:1:4: 'x' cannot be read as int"),
        ("a: " + "9" * 5000, "config.yaml:1:4: '9999"),
        ("a: " + "[" * 60 + "]" * 60, "config.yaml:1:54: more than 50 levels"),
        ("a: &a [*a]", "config.yaml:1:4: more than 50 levels"),
        (_BOMB, "more than 50 levels or 50000 values"),
    ],
)
def test_bad_yaml(text, expected):
    (line,) = problems_of(read, text)
    assert expected in line


def test_very_deep_yaml_is_no_recursion_error():
    (line,) = problems_of(read, "a: " + "[" * 5000)
    assert line == "config.yaml: is nested more than 50 levels deep."


def test_files(tmp_path):
    path = tmp_path / "config.yaml"
    assert problems_of(load_yaml, path) == [f"{path}: there is no such file."]
    assert problems_of(load_yaml, tmp_path) == [
        f"{tmp_path}: is a directory, not a YAML file."
    ]
    path.write_bytes(b"name: \xff")
    assert "is not UTF-8 text (byte 6)" in problems_of(load_yaml, path)[0]
    path.write_bytes(b"#" * 300_000)
    assert "is larger than 256 KiB" in problems_of(load_yaml, path)[0]
    path.write_text("name: grün", "utf-8")
    assert load_yaml(path).data == {"name": "grün"}


# Overrides.


def test_overrides_replace_make_and_index():
    config = read(
        "name: x\nseveral: [{rate: 1}]\ntrainer:\n",
        "name=y",
        "several.0.rate=2",
        "trainer.train_steps=10",
        "inner={rate: 3, layers: [1, 2]}",
        "inner.layers.1=5",
        "free.a.b=a=b",
        "free.c=",
    )
    assert config.name == "y"
    assert config.several[0].rate == 2
    assert config.trainer.train_steps == 10
    assert config.inner == Inner(rate=3, layers=[1, 5])
    assert config.free == {"a": {"b": "a=b"}, "c": None}


def test_overrides_leave_the_document_alone():
    document = parse_yaml("name: x\nfree: {a: [1]}", "config.yaml")
    apply_overrides(document, ["free.a.0=2"])
    assert document.data == {"name": "x", "free": {"a": [1]}}


def test_bad_overrides_are_all_named():
    assert problems_of(
        read,
        "name: x\nseveral: [{}]",
        "name",
        "=1",
        "trainer..seed=1",
        "name.x=1",
        "several.1.rate=1",
        "several.first.rate=1",
        "inner=[",
    ) == [
        "override 'name': must be KEY=VALUE, such as trainer.train_steps=1000.",
        "override '=1': must be KEY=VALUE, such as trainer.train_steps=1000.",
        "override 'trainer..seed=1': must be KEY=VALUE, such as "
        "trainer.train_steps=1000.",
        "override 'name.x=1': name is 'x', which has no 'x' in it.",
        "override 'several.1.rate=1': several is a list of 1; '1' is not an "
        "index of it (they count from 0).",
        "override 'several.first.rate=1': several is a list of 1; 'first' is "
        "not an index of it (they count from 0).",
        "override 'inner=[': is not valid YAML: while parsing a flow node, "
        "expected the node content, but found '<stream end>'.",
    ]


def test_an_unknown_override_names_the_nearest():
    assert problems_of(read, "name: x", "trainr.seed=1", "seed=1") == [
        "override 'trainr.seed=1': trainr: not a known key - did you mean "
        "'trainer'? (got {'seed': 1})",
        "override 'seed=1': seed: not a known key - did you mean "
        "'trainer.seed'? (got 1)",
    ]


def test_a_replaced_value_is_placed_at_its_override():
    assert problems_of(read, "name: x\ninner:\n  rate: 1", "inner={rte: 2}")[
        0
    ].startswith("override 'inner={rte: 2}': inner.rte: ")


# Arguments of a signature.


def test_validate_mapping_reads_as_strict_json():
    fields = {"sizes": tuple[int, ...], "copy": float, "any": Any, "no": int}
    data = {"sizes": [1, 2], "copy": 1, "any": {"a": None}}
    assert validate_mapping(fields, data, source="task") == {
        "sizes": (1, 2),
        "copy": 1.0,
        "any": {"a": None},
    }
    assert problems_of(
        validate_mapping,
        fields,
        {"sizes": ["1"], "copyy": 2},
        required=["any"],
        source="task",
    ) == [
        "task: sizes.0: must be a whole number (got '1')",
        "task: any: is required, and missing",
        "task: copyy: not a known key - did you mean 'copy'? (got 2)",
    ]
    assert validate_mapping(
        fields, {"b": [1]}, open_ended=True, source="task"
    ) == {"b": [1]}


# Dumping.


def test_dump_reads_back(tmp_path):
    config = Outer(
        name="yes",
        inner=Inner(rate=1e-05, layers=[3, 1]),
        trainer=TrainerConfig(
            train_steps=5, checkpoint_interval="10min", best_metric="1e3"
        ),
        free={"b": "a: b", "a": ["", "null", None, 1.0, "2024-01-01", "ü"]},
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config), "utf-8")
    again = validate(Outer, load_yaml(path), source=str(path))
    assert again == config
    assert dump_yaml(again) == dump_yaml(config)
    keys = [line.split(":")[0] for line in dump_yaml(config).splitlines()]
    assert [key for key in keys if key in Outer.model_fields] == list(
        Outer.model_fields
    )


def test_hash_is_of_values_and_stable():
    one = Outer(name="x", free={"a": 1, "b": 2})
    assert config_hash(one) == config_hash(
        Outer(free={"b": 2, "a": 1}, name="x", inner=Inner())
    )
    assert config_hash(one) != config_hash(one.replace(name="y"))
    assert (
        config_hash(Inner())
        == hashlib.sha256(b'{"layers":[],"rate":0.1}').hexdigest()
    )
