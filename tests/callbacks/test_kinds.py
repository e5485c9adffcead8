"""What users' callbacks hold: restored exactly, or named when it changed.

Each kind is made and moved on twice; then a new process gets the state.
"""

import array
import collections
import dataclasses
import datetime
import enum
import functools
import io
import itertools
import json
import random
import types
import warnings

import keras
import numpy as np
import pytest
from driving import events, play, start

from legato.errors import ExactnessError

Callback = keras.callbacks.Callback


class Phase(enum.Enum):
    FIRST = 1
    SECOND = 2


class Slots:
    __slots__ = ("count", "unset")

    def __init__(self):
        self.count = 0


class Property:
    _count = 0

    @property
    def count(self):
        return self._count

    @count.setter
    def count(self, value):
        assert value > 0
        self._count = value


@dataclasses.dataclass
class Point:
    x: int = 0
    path: list = dataclasses.field(default_factory=list)


class Deque(collections.deque):
    label = "none"


def counter():
    count = 0

    def step():
        nonlocal count
        count += 1
        return count

    return step


def moved(method, *args):
    """Changes in place."""

    def advance(obj):
        getattr(obj, method)(*args)
        return obj

    return advance


def set_on(name):
    def advance(obj):
        setattr(obj, name, getattr(obj, name) + 1)
        return obj

    return advance


def item(key=0):
    def advance(obj):
        obj[key] = obj[key] + 1
        return obj

    return advance


def called(obj):
    obj()
    return obj


def nexted(obj):
    next(obj)
    return obj


def values(obj):
    return np.asarray(keras.ops.convert_to_numpy(obj)).tolist()


# name -> how it is made, how it moves on, what can be seen of it
CAPTURED = {
    "enum": (lambda: Phase.FIRST, lambda _: Phase.SECOND, str),
    "slots": (Slots, set_on("count"), lambda o: o.count),
    "property": (Property, set_on("count"), lambda o: o.count),
    "dataclass": (Point, set_on("x"), repr),
    "set": (set, lambda o: {*o, len(o)}, sorted),
    "frozenset": (frozenset, lambda o: o | {len(o)}, sorted),
    "counter": (collections.Counter, moved("update", "ab"), repr),
    "defaultdict": (lambda: collections.defaultdict(int), item("a"), repr),
    "ordered": (
        lambda: collections.OrderedDict(a=1, b=2),
        moved("move_to_end", "a"),
        repr,
    ),
    "chain map": (lambda: collections.ChainMap({0: 0}), item(), repr),
    "user list": (lambda: collections.UserList([0]), item(), repr),
    "user dict": (lambda: collections.UserDict({0: 0}), item(), repr),
    "deque": (lambda: Deque(maxlen=1), moved("append", 1), repr),
    "namespace": (lambda: types.SimpleNamespace(n=1), set_on("n"), repr),
    "date": (
        lambda: datetime.datetime(2020, 1, 1),
        lambda o: o + datetime.timedelta(1),
        repr,
    ),
    "count": (itertools.count, nexted, repr),
    "random": (
        lambda: random.Random(1),
        moved("random"),
        lambda o: o.random(),
    ),
    "generator": (
        lambda: np.random.default_rng(1),
        moved("normal"),
        lambda o: o.normal(),
    ),
    "random state": (
        lambda: np.random.RandomState(1),
        moved("normal"),
        lambda o: o.normal(),
    ),
    "seed generator": (
        lambda: keras.random.SeedGenerator(1),
        moved("next"),
        lambda o: values(o.state),
    ),
    "closure": (counter, called, lambda o: o()),
    "partial": (lambda: functools.partial(counter()), called, lambda o: o()),
    "metric": (
        keras.metrics.Mean,
        moved("update_state", 3.0),
        lambda o: [values(v) for v in o.variables],
    ),
    "variable": (lambda: keras.Variable(0.0), moved("assign_add", 1.0), values),
    "tensor": (lambda: keras.ops.zeros(2), lambda o: o + 1, values),
    "weights": (lambda: [np.zeros(2), np.ones(1)], item(1), repr),
    "structured": (
        lambda: np.zeros(2, [("a", "f4")]),
        lambda o: o.__setitem__(0, (o["a"][0] + 1,)) or o,
        repr,
    ),
}

NAMED = {
    "generator": (lambda: (i for i in range(9)), nexted),
    "cycle": (lambda: itertools.cycle("ab" * 3), nexted),
    "array": (lambda: array.array("d", [0.0]), item()),
    "masked": (lambda: np.ma.zeros(2), item()),
    "mask": (lambda: np.ma.zeros(2), lambda o: np.ma.masked_less(o, 1.0)),
    "matrix": (lambda: np.asmatrix([[0.0]]), item((0, 0))),
    "objects": (lambda: np.array([0, None], object), item()),
    "view": (lambda: memoryview(bytearray(2)), item()),
    "text": (io.StringIO, moved("write", "x")),
    "seeds": (lambda: np.random.SeedSequence(1), moved("spawn", 1)),
}


class Holds(Callback):
    def __init__(self, held):
        super().__init__()
        self.thing = held


def move_on(make, advance, **kwargs):
    runner, model = start(
        lambda model: [Holds(make())], resuming=False, **kwargs
    )
    runner.get_state()
    for _ in range(2):
        runner.callbacks[0].thing = advance(runner.callbacks[0].thing)
    return runner, model


@pytest.mark.parametrize("kind", CAPTURED)
def test_captured(kind):
    make, advance, look = CAPTURED[kind]
    runner, _ = move_on(make, advance, exact="strict")
    tree, arrays = runner.get_state()
    tree = json.loads(json.dumps(tree))
    resumed, _ = start(
        lambda model: [Holds(make())], resuming=True, exact="strict"
    )
    resumed.set_state(tree, arrays)
    one, other = runner.callbacks[0].thing, resumed.callbacks[0].thing
    assert type(one) is type(other)
    before = look(make())
    assert look(one) == look(other) != before
    # It can be used as before, and is captured again.
    for each in (runner, resumed):
        each.callbacks[0].thing = advance(each.callbacks[0].thing)
    trees = [json.dumps(r.get_state()[0]) for r in (runner, resumed)]
    assert trees[0] == trees[1]


@pytest.mark.parametrize("kind", NAMED)
def test_named(kind):
    runner, _ = move_on(*NAMED[kind], exact="strict")
    with pytest.raises(ExactnessError, match="`thing"):
        runner.get_state()
    runner, _ = move_on(NAMED[kind][0], lambda o: o, exact="strict")
    runner.get_state()  # nothing changed


def foreign_tensors():
    torch = pytest.importorskip("torch")
    tf = pytest.importorskip("tensorflow")
    return {
        "torch": (lambda: torch.zeros(2), moved("add_", 1.0)),
        "parameter": (
            lambda: torch.nn.Parameter(torch.zeros(2)),
            lambda o: o.data.add_(1.0) is None or o,
        ),
        "buffers": (
            lambda: torch.nn.BatchNorm1d(2),
            lambda o: o.running_mean.add_(1.0) is None or o,
        ),
        "torch generator": (
            torch.Generator,
            lambda o: torch.rand(1, generator=o) is None or o,
        ),
        "tensorflow": (lambda: tf.zeros(2), lambda o: o + 1.0),
        "tf variable": (
            lambda: tf.Variable([0.0]),
            lambda o: o.assign_add([1.0]) is None or o,
        ),
        "tf generator": (
            lambda: tf.random.Generator.from_seed(1),
            lambda o: o.normal([1]) is None or o,
        ),
    }


@pytest.mark.parametrize(
    "kind",
    [
        *("torch", "parameter", "buffers", "torch generator"),
        *("tensorflow", "tf variable", "tf generator"),
    ],
)
def test_tensors_of_any_framework(kind):
    """Those of the backend are restored, in place; others are named."""
    make, advance = foreign_tensors()[kind]
    of_the_backend = {
        "torch": ("torch", "parameter", "buffers"),
        "tensorflow": ("tensorflow", "tf variable", "tf generator"),
    }.get(keras.backend.backend(), ())
    runner, _ = move_on(make, advance, exact="strict")
    try:
        tree, arrays = runner.get_state()
    except ExactnessError as error:
        assert "`thing" in str(error)
        assert kind not in of_the_backend
        return
    assert kind in of_the_backend
    resumed, _ = start(
        lambda model: [Holds(make())], resuming=True, exact="strict"
    )
    live = resumed.callbacks[0].thing
    resumed.set_state(tree, arrays)
    thing = resumed.callbacks[0].thing
    if kind != "tensorflow":
        assert thing is live
    if kind == "buffers":
        assert thing.running_mean.tolist() == [2.0, 2.0]
    elif "generator" not in kind:
        assert set(values(thing)) == {2.0}
    advance(thing)


def test_a_class_attribute_that_counts():
    class Counts(Callback):
        seen = 0

        def on_train_batch_end(self, batch, logs=None):
            Counts.seen += 1

    runner, model = start(lambda model: [Counts(), Counts()], resuming=False)
    for event in list(events())[:3]:
        play(runner, model, event)
    tree, arrays = runner.get_state()
    assert Counts.seen == 4
    Counts.seen = 0
    runner, model = start(lambda model: [Counts(), Counts()], resuming=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner.set_state(tree, arrays)
    assert Counts.seen == 4


def test_an_open_file_is_left_as_it_is(tmp_path):
    def make(model):
        return [Holds((tmp_path / "log").open("a"))]

    runner, _ = start(make, resuming=False, exact="strict")
    runner.callbacks[0].thing.write("x")
    tree, arrays = runner.get_state()
    resumed, _ = start(make, resuming=True, exact="strict")
    own = resumed.callbacks[0].thing
    resumed.set_state(tree, arrays)
    assert resumed.callbacks[0].thing is own and not own.closed
