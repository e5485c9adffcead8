"""`legato.capture`: round trips, identity, and hostile trees."""

import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import itertools
import json
import logging
import os
import pathlib
import random
import threading
import time
import types
import uuid
import zoneinfo

import keras
import ml_dtypes
import numpy as np
import pytest

from legato import capture
from legato.errors import DamagedError, RestoreError

CALLS = []


class Color(enum.Enum):
    RED = 1
    BLUE = "blue"


class Bits(enum.Flag):
    A = 1
    B = 2


Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass
class Record:
    name: str
    values: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    a: int
    b: tuple = ()


class Slotted:
    __slots__ = ("__hidden", "x")

    def __init__(self):
        self.x = 1
        self.__hidden = 2


class Tricky:
    """Records every piece of its code that a restore would run."""

    def __init__(self):
        CALLS.append("init")
        self.value = 0

    def __new__(cls):
        CALLS.append("new")
        return super().__new__(cls)

    def __setstate__(self, state):
        CALLS.append("setstate")

    def __setattr__(self, name, value):
        CALLS.append("setattr")
        object.__setattr__(self, name, value)

    def __reduce__(self):
        CALLS.append("reduce")
        return object.__reduce__(self)


class MyList(list):
    def extend(self, items):
        CALLS.append("extend")

    def __setitem__(self, key, value):
        CALLS.append("setitem")


class MyDict(dict):
    pass


class Node:
    def __init__(self):
        self.next = None

    def method(self):
        return self


class Holder:
    """Holds whatever a test puts into it."""


def top_level(x):
    return x + 1


def round_trip(obj, new=None, **kwargs):
    captured = capture.capture(obj, **kwargs)
    text = json.dumps(captured.tree)
    new = Holder() if new is None else new
    return new, capture.restore(
        new, json.loads(text), captured.arrays, **kwargs
    )


def restored(value):
    holder = Holder()
    holder.value = value
    return round_trip(holder)[0].value


VALUES = [
    None,
    True,
    0,
    -(2**63),
    2**63,
    -(10**4000),
    1.5,
    -0.0,
    float("inf"),
    1e-320,
    complex(1, -0.0),
    complex("nan+infj"),
    "",
    "é\ud800",
    b"\x00\xff",
    bytearray(b"ab"),
    [],
    [1, [2.5, ["x"]]],
    (),
    (1, (2, [3])),
    {1, 2, "x"},
    frozenset({(1, 2), "a"}),
    {"b": 1, "a": 2, 3: [4], (1, "x"): {}, None: 0, 2.5: True},
    collections.OrderedDict([("z", 1), ("a", 2)]),
    collections.Counter("hello"),
    collections.deque([1, 2, 3], maxlen=5),
    collections.defaultdict(list, {"a": [1]}),
    range(3, 20, 4),
    slice(None, 5, -1),
    datetime.datetime(2024, 2, 29, 1, 2, 3, 4, tzinfo=datetime.UTC, fold=1),
    datetime.datetime(
        2024, 7, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=-3), "X")
    ),
    datetime.date(2024, 1, 2),
    datetime.time(1, 2, 3, 456),
    datetime.timedelta(-3, 5, 7),
    datetime.timezone(datetime.timedelta(minutes=90)),
    decimal.Decimal("1.10"),
    decimal.Decimal("NaN"),
    fractions.Fraction(-3, 7),
    pathlib.Path("a/b"),
    pathlib.PurePosixPath("/x"),
    uuid.UUID(int=5),
    Color.BLUE,
    Bits.A | Bits.B,
    Bits(0),
    Point(1, [2]),
    Frozen(3, (4,)),
    int,
    Record,
    top_level,
    np.add,
    keras.ops.less,
    max,
    np.float32(1.1),
    np.int64(-3),
    np.str_("x"),
    np.datetime64("2024-01-01"),
    ml_dtypes.bfloat16(1.5),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_round_trip_of_values(value):
    back = restored(value)
    assert type(back) is type(value)
    if isinstance(value, set | frozenset):
        assert back == value  # their order is the process's
    else:
        assert repr(back) == repr(value)


def test_zone_info():
    try:
        zone = zoneinfo.ZoneInfo("Europe/Paris")
    except zoneinfo.ZoneInfoNotFoundError:
        pytest.skip("no time zones here")
    moment = datetime.datetime(2024, 7, 1, tzinfo=zone)
    assert restored(moment) == moment


def test_count_goes_on():
    count = itertools.count(3, 2)
    next(count)
    assert next(restored(count)) == 5
    assert next(restored(itertools.count(0.5))) == 0.5


@pytest.mark.parametrize(
    "dtype",
    [
        *("?", "i1", "u8", "f2", "f4", "f8", ">f4", "c8", "c16"),
        *("M8[ns]", "S3", "U4", "V3", "g"),
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.int4,
        [("a", "<i4"), ("b", ">f8", (2,))],
    ],
    ids=str,
)
def test_arrays_of_every_dtype(dtype):
    rng = np.random.default_rng(0)
    if isinstance(dtype, type):
        array = np.arange(12).reshape(3, 4).astype(dtype)
    else:
        dtype = np.dtype(dtype)
        array = np.frombuffer(
            rng.integers(0, 2, 12 * dtype.itemsize, np.uint8).tobytes(), dtype
        ).reshape(3, 4)
    for case in (array, array[:0], array[1, 2:3], np.asfortranarray(array)):
        back = restored(case)
        assert back.dtype == case.dtype and back.shape == case.shape
        assert back.tobytes() == case.tobytes()
        assert back.flags.fnc == case.flags.fnc
        assert back.flags.writeable


def test_arrays_are_snapshots_and_restored_in_place():
    holder = Holder()
    holder.a = np.arange(3.0)
    captured = capture.capture(holder)
    alias = holder.a
    holder.a[:] = 7
    assert captured.arrays["a"].tolist() == [0, 1, 2]
    capture.restore(holder, captured.tree, captured.arrays)
    assert holder.a is alias and alias.tolist() == [0, 1, 2]
    holder.a = np.zeros(2)
    capture.restore(holder, captured.tree, captured.arrays)
    holder.a[0] = 9
    assert captured.arrays["a"][0] == 0


def test_tensors_variables_and_seed_generators():
    def make(value):
        holder = Holder()
        holder.tensor = keras.ops.full((2,), value, dtype="bfloat16")
        holder.variable = keras.Variable(value, dtype="float32")
        holder.seeds = keras.random.SeedGenerator(3)
        holder.metric = keras.metrics.Mean()
        holder.later = None
        return holder

    old, new = make(1.0), make(2.0)
    keras.random.normal((2,), seed=old.seeds)
    old.metric.update_state([3.0, 5.0])
    old.later = keras.Variable([1.0, 2.0], trainable=False)
    alias = new.variable
    round_trip(old, new)
    assert new.variable is alias and float(alias.value) == 1.0
    assert keras.backend.standardize_dtype(new.tensor.dtype) == "bfloat16"
    assert float(new.metric.result()) == 4.0
    to_numpy = keras.ops.convert_to_numpy
    assert to_numpy(new.later).tolist() == [1, 2] and not new.later.trainable
    assert np.array_equal(
        to_numpy(keras.random.normal((2,), seed=new.seeds)),
        to_numpy(keras.random.normal((2,), seed=old.seeds)),
    )


BIT_GENERATORS = ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"]


@pytest.mark.parametrize("name", BIT_GENERATORS)
@pytest.mark.parametrize("live", [True, False])
def test_numpy_generators(name, live):
    def make(seed):
        holder = Holder()
        holder.rng = np.random.Generator(getattr(np.random, name)(seed))
        holder.bits = holder.rng.bit_generator
        holder.draw = holder.rng.random
        return holder

    old = make(1)
    old.rng.integers(0, 9, 3, dtype=np.uint32)  # leaves half a word behind
    old.rng.spawn(2)
    new = make(1) if live else Holder()
    alias = getattr(new, "rng", None)
    round_trip(old, new)
    assert alias is None or new.rng is alias
    assert new.bits is new.rng.bit_generator
    assert new.draw.__self__ is new.rng
    draws = [(g.rng.integers(9), g.draw(), g.rng.normal()) for g in (old, new)]
    assert draws[0] == draws[1]
    spawned = [g.rng.spawn(1)[0].random() for g in (old, new)]
    assert spawned[0] == spawned[1]


@pytest.mark.parametrize("live", [True, False])
def test_other_generators(live):
    old, new = Holder(), Holder()
    for holder in (old, new) if live else (old,):
        holder.random = random.Random(1)
        holder.state = np.random.RandomState(2)
    old.random.gauss(0, 1)
    old.state.randn()
    round_trip(old, new)
    for _ in range(3):
        assert old.random.gauss(0, 1) == new.random.gauss(0, 1)
        assert old.state.randn() == new.state.randn()


def test_identity_and_cycles():
    old = Holder()
    old.a = shared = [1]
    old.b = {"x": shared}
    old.me = old
    old.ring = ring = []
    ring.append((ring, shared))
    old.node = node = Node()
    node.next = node
    old.bound = node.method
    old.push = shared.append
    old.partial = functools.partial(top_level, 3)
    new, _ = round_trip(old)
    assert new.a is new.b["x"] is new.ring[0][1]
    assert new.me is new and new.ring[0][0] is new.ring
    assert new.node.next is new.node is new.bound()
    new.push(2)
    assert new.a == [1, 2]
    assert new.partial() == 4


def test_deep_chains():
    old = Holder()
    old.first = node = Node()
    for _ in range(5000):
        node.next = Node()
        node = node.next
    old.nested = []
    inner = old.nested
    for _ in range(5000):
        inner.append([])
        inner = inner[0]
    new, _ = round_trip(old)
    node, count = new.first, 0
    while node.next is not None:
        node, count = node.next, count + 1
    assert count == 5000


def test_too_deep_tuples_are_left_out():
    holder = Holder()
    holder.deep = ()
    for _ in range(3000):
        holder.deep = (holder.deep,)
    assert any(
        "too deep" in why for why in capture.capture(holder).left_out.values()
    )


def test_in_place():
    def make():
        holder = Holder()
        holder.list, holder.dict, holder.set = [1], {"a": [1]}, {1}
        holder.deque = collections.deque([1], maxlen=3)
        holder.record = Record("x", [1])
        holder.bytes = bytearray(b"x")
        holder.my = MyList([1])
        return holder

    old, new = make(), make()
    old.list[:] = [1, 2]
    old.dict["a"].append(2)
    old.dict["b"] = 3
    old.set.add(2)
    old.deque.extend([2, 3, 4])
    old.record.values.append(5)
    old.bytes += b"y"
    list.append(old.my, 2)
    old.my.extra = "e"
    before = dict(vars(new))
    inner = new.dict["a"]
    CALLS.clear()
    round_trip(old, new)
    assert not CALLS
    for name, value in before.items():
        assert getattr(new, name) is value
        assert value == getattr(old, name)
    assert new.dict["a"] is inner and new.my.extra == "e"


def test_two_lists_stay_two_where_the_program_has_one():
    old, new = Holder(), Holder()
    old.a, old.b = [1], [2]
    new.a = new.b = []
    round_trip(old, new)
    assert (new.a, new.b) == ([1], [2])


def test_configuration_objects_of_libraries():
    def make(rate):
        holder = Holder()
        holder.space = types.SimpleNamespace(a=rate)
        holder.loss = keras.losses.MeanSquaredError()
        holder.schedule = keras.optimizers.schedules.CosineDecay(rate, 10)
        holder.policy = keras.dtype_policies.DTypePolicy("mixed_float16")
        holder.optimizer = keras.optimizers.Adam(rate)
        holder.inner = keras.callbacks.EarlyStopping(patience=3)
        return holder

    old, new = make(0.5), make(0.25)
    old.inner.wait = 2
    old.inner.monitor_op = keras.ops.less
    round_trip(old, new)
    assert new.space.a == new.schedule.initial_learning_rate == 0.5
    assert float(new.optimizer.learning_rate) == 0.5
    assert new.inner.wait == 2 and new.inner.monitor_op is keras.ops.less


def test_removed_attributes_are_removed_and_named():
    old, new = Holder(), Holder()
    new.extra, new.lock = 1, threading.Lock()
    result = round_trip(old, new)[1]
    assert vars(new).keys() == {"lock"}
    assert result.removed == ["Holder.extra"]


def make_counter():
    count, history = 0, []

    def step(by=[1]):  # noqa: B006
        nonlocal count
        count += by[0]
        by[0] += 1
        history.append(count)
        return count

    def peek():
        return count

    return step, peek, history


def test_closures_defaults_and_lambdas():
    def make():
        holder = Holder()
        holder.step, holder.peek, history = make_counter()
        holder.choices = [lambda: 1, lambda: 2]
        holder.chosen = holder.choices[0]
        return holder, history

    (old, _), (new, history) = make(), make()
    defaults = make_counter()[0].__defaults__
    for _ in range(3):
        old.step()
    old.step.calls = 3
    old.chosen = old.choices[1]
    round_trip(old, new)
    assert new.peek() == old.peek() == 6 and history == [1, 3, 6]
    assert new.step.calls == 3
    assert new.step() == old.step() == 10
    assert new.chosen is new.choices[1]
    assert defaults == ([1],)


TOTAL = 0


def add_to_total():
    global TOTAL
    TOTAL += 1


def test_globals_that_a_function_assigns():
    global TOTAL
    holder = Holder()
    holder.call = add_to_total
    TOTAL = 5
    captured = capture.capture(holder)
    TOTAL = 0
    holder.call()
    capture.restore(holder, captured.tree, captured.arrays)
    assert TOTAL == 5
    # Those that it does not assign are none of the file's business.
    tree = copy.deepcopy(captured.tree)
    node = next(n for n in tree["objects"] if n["kind"] == "function")
    node["globals"] = {"CALLS": None}
    capture.restore(holder, tree, captured.arrays)
    assert CALLS is not None


def test_state_of_classes():
    def make():
        count = 0

        class Local(Holder):
            seen = []  # noqa: RUF012
            total = 0

            def step(self):
                nonlocal count
                count += 1
                type(self).total += 10
                self.seen.append(count)
                return count

        return Local()

    old, new = make(), make()
    old.step(), old.step()
    seen = type(new).seen
    round_trip(old, new)
    assert type(new).seen is seen and seen == [1, 2]
    assert type(new).total == 20 and new.step() == 3


def test_references_are_not_captured():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])

    def references(model):
        return capture.References(
            {"model": model},
            lambda: {f"variable {i}": v for i, v in enumerate(model.variables)},
        )

    old, new = Holder(), Holder()
    old.models, old.save = [model], model.save
    old.kernel = model.layers[0].kernel
    captured = capture.capture(old, references=references(model))
    assert not captured.arrays and not captured.left_out
    capture.restore(new, captured.tree, {}, references=references(other))
    assert new.models == [other] and new.save.__self__ is other
    assert new.kernel is other.layers[0].kernel
    with pytest.raises(RestoreError, match="model"):
        capture.restore(new, captured.tree, {})


def test_a_model_of_its_own_is_captured():
    def make(value):
        holder = Holder()
        holder.teacher = keras.Sequential(
            [keras.Input((2,)), keras.layers.Dense(1)]
        )
        holder.teacher.set_weights([np.full((2, 1), value), np.full(1, value)])
        return holder

    old, new = make(1.0), make(2.0)
    round_trip(old, new)
    assert new.teacher.get_weights()[0].tolist() == [[1.0], [1.0]]


def uncapturable(tmp_path):
    holder = Holder()
    holder.file = open(tmp_path / "x", "w")  # noqa: SIM115
    holder.lock = threading.Lock()
    holder.log = logging.getLogger("x")
    holder.module = os
    holder.iterator = iter([1, 2, 3])
    holder.zip = zip([1, 2, 3], "abc", strict=True)
    holder.generator = (i for i in range(5))
    holder.sentinel = object()
    holder.objects = np.array([object()])
    holder.n = 3
    return holder


def test_left_out_and_changed(tmp_path):
    holder = uncapturable(tmp_path)
    before = capture.fingerprint(holder)
    captured = capture.capture(holder)
    assert captured.left_out.keys() == vars(holder).keys() - {"n"}
    assert capture.changed(before, captured.tokens) == []
    next(holder.iterator), next(holder.generator), next(holder.zip)
    holder.file.write("x")
    holder.lock.acquire()
    holder.n = 4
    changed = capture.changed(before, capture.fingerprint(holder))
    assert sorted(changed) == ["generator", "iterator", "zip"]
    holder.sentinel = object()
    holder.file = open(tmp_path / "y", "w")  # noqa: SIM115
    changed = capture.changed(before, capture.fingerprint(holder))
    assert "sentinel" in changed and "file" not in changed
    live = vars(holder).copy()
    live["n"] = 3
    capture.restore(holder, captured.tree, captured.arrays)
    assert vars(holder) == live


def test_whole_or_not_at_all():
    old = Holder()
    old.a, old.b = [1], {"x": object()}
    captured = capture.capture(old)
    new = Holder()
    new.a, new.b = [7], {}
    with pytest.raises(RestoreError, match="object"):
        capture.restore(new, captured.tree, captured.arrays)
    assert (new.a, new.b) == ([7], {})


def test_no_code_of_the_class_runs():
    old = Holder()
    old.tricky = Tricky()
    old.tricky.value = 5
    CALLS.clear()
    new, _ = round_trip(old)
    assert new.tricky.value == 5 and type(new.tricky) is Tricky
    assert CALLS == []


def named(kind, key, module, qualname, **fields):
    return {
        "format": 1,
        "value": {"ref": 0},
        "objects": [
            {
                "kind": "root",
                "class": [__name__, "Holder"],
                "attributes": {"x": {"ref": 1}},
            },
            {"kind": kind, key: [module, qualname], **fields},
        ],
    }


@pytest.mark.parametrize(
    "tree",
    [
        named("named", "name", "os", "system"),
        named("named", "name", __name__, "os.system"),
        named("named", "name", "posix", "system"),
        named("named", "name", "builtins", "eval"),
        named("named", "name", "builtins", "getattr"),
        named("named", "name", "keras.ops", "__builtins__"),
        named("named", "name", "keras.ops", "vectorize.__globals__"),
        named("named", "name", "numpy", "load"),
        named("named", "name", "subprocess", "Popen"),
        named("function", "name", "os", "popen", code=""),
        named("function", "name", __name__, "top_level.__code__", code=""),
        # Imported here, defined elsewhere.
        named("object", "class", __name__, "threading.Thread", attributes={}),
        named("object", "class", __name__, "pytest", attributes={}),
        named("object", "class", "logging", "Logger", attributes={}),
        named("object", "class", "antigravity", "X", attributes={}),
        named("object", "class", __name__, "Color", attributes={}),
        named("object", "class", __name__, "MyList", attributes={}),
        named("object", "class", __name__, "top_level", attributes={}),
        named("enum", "class", __name__, "Color", names=["__class__"]),
        named("enum", "class", __name__, "Color", names=["GREEN"]),
        named("list", "class", __name__, "MyDict", attributes={}, items=[]),
        named("tuple", "class", __name__, "MyList", items=[]),
        named("keras", "class", __name__, "Holder", variables=[]),
    ],
    ids=lambda tree: str(tree["objects"][1])[:70],
)
def test_names_that_are_not_resolved(tree, monkeypatch):
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("ran"))
    holder = Holder()
    with pytest.raises((RestoreError, DamagedError)):
        capture.restore(holder, tree, {})
    assert vars(holder) == {}


def test_hostile_method_of_a_captured_object():
    tree = named("list", "unused", "", "", items=[])
    del tree["objects"][1]["unused"]
    tree["objects"][0]["attributes"]["y"] = {"ref": 2}
    for name in ("__class__", "__reduce__", "nothing"):
        tree["objects"][2:] = [
            {"kind": "builtin method", "self": {"ref": 1}, "name": name}
        ]
        with pytest.raises(RestoreError):
            capture.restore(Holder(), tree, {})


def everything():
    holder = Holder()
    holder.values = list(VALUES)
    holder.array = np.zeros((2, 3), ">f4")
    holder.rng = np.random.default_rng(1)
    holder.state = np.random.RandomState(1)
    holder.random = random.Random(1)
    holder.variable = keras.Variable([1.0, 2.0])
    holder.seeds = keras.random.SeedGenerator(1)
    holder.step, holder.peek, _ = make_counter()
    holder.node = Node()
    holder.bound = holder.node.method
    holder.slotted = Slotted()
    holder.push = [1].append
    holder.partial = functools.partial(top_level, 1)
    holder.lock = threading.Lock()
    holder.tensor = keras.ops.ones(3)
    return holder


JUNK = [
    *(None, True, -1, 10**30, 1e308, float("nan"), "", "x" * 1000, [], {}),
    *({"ref": 0}, {"ref": 10**9}, {"ref": -1}, {"ref": True}, {"ref": "0"}),
    *({"reference": "x"}, {"ref": 0, "x": 1}, [[]], ["os", "system"], "O"),
    {"array": "nothing"},
]


def test_mutated_trees_raise_only_our_errors():
    """Random damage: any outcome but another exception is fine."""
    captured = capture.capture(everything())
    text = json.dumps(captured.tree)
    rng = random.Random(0)
    target = everything()
    outcomes = collections.Counter()
    for _ in range(1500):
        tree = json.loads(text)
        for _ in range(rng.choice([1, 1, 2, 5])):
            place = tree
            while True:
                keys = list(
                    place if isinstance(place, dict) else range(len(place))
                )
                key = rng.choice(keys)
                inner = place[key]
                if (
                    isinstance(inner, dict | list)
                    and inner
                    and rng.random() < 0.8
                ):
                    place = inner
                    continue
                place[key] = copy.deepcopy(rng.choice(JUNK))
                break
            if not isinstance(tree.get("objects"), list):
                break
            if not tree["objects"]:
                break
        try:
            capture.restore(target, tree, captured.arrays)
            outcomes["restored"] += 1
        except (DamagedError, RestoreError) as error:
            outcomes[type(error).__name__] += 1
    assert outcomes["DamagedError"] > 300


@pytest.mark.parametrize(
    "tree",
    [
        None,
        [],
        {},
        {"format": 2, "value": None, "objects": []},
        {"format": 1, "value": {"ref": 0}, "objects": []},
        {"format": 1, "value": {"ref": 0}, "objects": [[]]},
        {"format": 1, "value": {"ref": 0}, "objects": [{"kind": "root"}]},
        {
            "format": 1,
            "value": {"ref": 0},
            "objects": [{"kind": "tuple", "items": [{"ref": 0}]}],
        },
        {
            "format": 1,
            "value": {"ref": 0},
            "objects": [
                {"kind": "tuple", "items": [{"ref": i + 1}]}
                for i in range(50_000)
            ]
            + [{"kind": "tuple", "items": []}],
        },
        named("int", "is", "", "") | {},
    ],
)
def test_broken_trees(tree):
    with pytest.raises((DamagedError, RestoreError)):
        capture.restore(Holder(), tree, {})
    with pytest.raises((DamagedError, RestoreError)):
        capture.decode(tree, {})


def test_arrays_that_lie():
    holder = Holder()
    holder.a = np.zeros(2, "c16")
    captured = capture.capture(holder)
    for shape, dtype in [
        ([10**12], "<c16"),
        ([2, -1], "<c16"),
        ([2], "|O"),
        ([2], [["a", "|O", 0], 16]),
        ([4], "<c16"),
        ([2], "x" * 1000),
    ]:
        tree = copy.deepcopy(captured.tree)
        tree["objects"][1].update(shape=shape, dtype=dtype)
        with pytest.raises(DamagedError):
            capture.restore(holder, tree, captured.arrays)
    with pytest.raises(DamagedError, match="missing"):
        capture.restore(holder, captured.tree, {})


def test_equal_states_are_equal_trees():
    assert json.dumps(capture.capture(everything()).tree) == json.dumps(
        capture.capture(everything()).tree
    )


def test_decode_makes_new_values():
    state = {"a": [1, 2], "p": Point(1, 2), "arr": np.arange(3)}
    captured = capture.capture(state)
    assert not captured.left_out
    back = capture.decode(captured.tree, captured.arrays, like=Holder)
    assert back["a"] == [1, 2] and back["p"] == Point(1, 2)
    with pytest.raises(RestoreError, match="Point"):
        capture.decode(captured.tree, captured.arrays)


def test_it_is_cheap():
    holder = Holder()
    for i in range(10):
        setattr(holder, f"a{i}", i)
    capture.capture(holder)
    start = time.thread_time()
    for _ in range(100):
        capture.capture(holder)
    assert (time.thread_time() - start) / 100 < 1e-3
