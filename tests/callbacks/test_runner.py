"""`CallbackRunner`: users' callbacks, dispatch, audit, exactness."""

import collections
import dataclasses
import json
import time
import warnings

import keras
import numpy as np
import pytest
from driving import (
    PARAMS,
    check_every_cut,
    events,
    finish,
    make_model,
    play,
    start,
)

from legato.callbacks import CallbackRunner
from legato.errors import (
    ConfigError,
    DamagedError,
    ExactnessError,
    ExactnessWarning,
)

Callback = keras.callbacks.Callback


@dataclasses.dataclass
class Row:
    epoch: int
    losses: list


class Everything(Callback):
    """Holds one of each, and lets all of it act on the model."""

    best = None

    def __init__(self, seed=0):
        super().__init__()
        self.count = 0
        self.rng = np.random.default_rng(seed)
        self.window = collections.deque(maxlen=4)
        self.sums = np.zeros(3)
        self.rows = []
        self.by_epoch = collections.defaultdict(list)
        self.variable = keras.Variable(0.0)
        self.metric = keras.metrics.Mean()
        self.alias = self.rows

    def on_train_begin(self, logs=None):
        self.kernel = self.model.layers[0].kernel

    def on_epoch_begin(self, epoch, logs=None):
        self.rows.append(Row(epoch, []))

    def on_train_batch_end(self, batch, logs=None):
        self.count += 1
        self.window.append(logs["loss"])
        self.sums[batch] += sum(self.window)
        self.rows[-1].losses.append(logs["loss"])
        self.by_epoch[len(self.rows)].append(batch)
        self.variable.assign_add(self.rng.normal())
        self.metric.update_state(logs["loss"])
        rate = 0.1 + float(self.variable.value) ** 2 + self.sums.sum()
        self.model.optimizer.learning_rate = rate

    def on_epoch_end(self, epoch, logs=None):
        type(self).best = min(logs["loss"], type(self).best or np.inf)
        logs["mean"] = float(self.metric.result())
        assert self.alias is self.rows


def test_a_users_callback():
    def make(model):
        Everything.best = None
        return [Everything(), Everything(1), keras.callbacks.History()]

    runner = check_every_cut(make)
    assert [callback.count for callback in runner.callbacks[:2]] == [18, 18]
    assert runner.callbacks[0].rows[2].losses[0] > 0


class Leader(Callback):
    def __init__(self):
        super().__init__()
        self.level = 0.0

    def on_train_batch_end(self, batch, logs=None):
        self.level += logs["loss"]


class Follower(Callback):
    def __init__(self, leader):
        super().__init__()
        self.leaders = {"first": leader}
        self.last = None

    def on_epoch_end(self, epoch, logs=None):
        self.last = self.leaders["first"]
        logs["level"] = self.last.level


def test_references_to_other_callbacks():
    def make(model):
        leader = Leader()
        shared = [0]

        def on_epoch_begin(epoch, logs):
            shared[0] += 1

        def on_epoch_end(epoch, logs):
            logs["shared"] = float(shared[0])

        Lambda = keras.callbacks.LambdaCallback
        return [
            [leader, Follower(leader)],
            (Lambda(on_epoch_begin=on_epoch_begin),),
            Lambda(on_epoch_end=on_epoch_end),
            keras.callbacks.History(),
        ]

    runner = check_every_cut(make)
    assert runner.callbacks[1].last is runner.callbacks[0]
    assert runner.callbacks[-1].history["shared"] == [1, 2, 3, 4, 5, 6]
    tree, arrays = runner.get_state()
    assert not arrays and "model" not in json.dumps(tree)


class WithState(Callback):
    def __init__(self):
        super().__init__()
        self._table = {}
        self.generator = (i for i in range(99))

    def on_train_batch_begin(self, batch, logs=None):
        next(self.generator)
        self._table[len(self._table)] = np.full(2, batch)

    def get_state(self):
        return {"table": self._table, "model": self.model, "row": Row(1, [2])}

    def set_state(self, state):
        assert state["model"] is self.model and state["row"] == Row(1, [2])
        self._table = state["table"]


def test_get_state_and_set_state():
    runner = check_every_cut(lambda model: [WithState()], exact="strict")
    assert len(runner.callbacks[0]._table) == 18


def test_half_a_state_and_bad_states():
    class Half(Callback):
        def get_state(self):
            return {}

    class Bad(Callback):
        def get_state(self):
            return [1]

        def set_state(self, state):
            pass

    class Opaque(Bad):
        def get_state(self):
            return {"x": [object()]}

    with pytest.raises(ConfigError, match="set_state"):
        start(lambda model: [Half()], resuming=False)
    for cls in (Bad, Opaque):
        runner, _ = start(lambda model, cls=cls: [cls()], resuming=False)
        with pytest.raises(ConfigError, match=cls.__name__):
            runner.get_state()


class Feeder(Callback):
    def __init__(self):
        super().__init__()
        self.source = (i for i in range(1000))
        self.idle = (i for i in range(1000))
        self.count = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.count = next(self.source)


class Feeders(keras.callbacks.Callback):
    """Holds a thousand of them."""

    def __init__(self):
        super().__init__()
        self.sources = [(i for i in range(9)) for _ in range(1000)]

    def on_train_batch_begin(self, batch, logs=None):
        for source in self.sources:
            next(source)


def test_not_all_of_a_thousand_attributes_are_named():
    runner, model = start(lambda model: [Feeders()], resuming=False)
    finish(runner, model, list(events())[:3])
    with pytest.warns(ExactnessWarning, match=r"`sources\[") as caught:
        runner.get_state()
        runner.get_state()
    assert len(caught) == 8
    assert "More of callback Feeders.0 is not named" in str(caught[-1].message)


def test_an_attribute_that_changed_and_cannot_be_saved():
    runner, model = start(lambda model: [Feeder()], resuming=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner.get_state()
    finish(runner, model, list(events())[:3])
    with pytest.warns(ExactnessWarning, match=r"Feeder\.0: `source`") as caught:
        tree, arrays = runner.get_state()
    assert len(caught) == 1
    play(runner, model, list(events())[3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner.get_state()  # once per attribute

    for exact in ("strict", "off"):
        runner, model = start(
            lambda model: [Feeder()], resuming=False, exact=exact
        )
        finish(runner, model, list(events())[:3])
        if exact == "strict":
            with pytest.raises(ExactnessError, match="get_state"):
                runner.get_state()
        else:
            runner.get_state()

    runner, model = start(lambda model: [Feeder()], resuming=True)
    audit = runner.set_state(json.loads(json.dumps(tree)), arrays)
    found = [(entry.name, str(entry.status)) for entry in audit]
    assert found == [
        ("Feeder.0", "restored"),
        ("Feeder.0.source", "not resumable"),
    ]


def test_objects_of_a_foreign_class_are_named():
    class Local:
        pass

    class Collector(Callback):
        def __init__(self):
            super().__init__()
            self.first = Local()
            self.items = []

        def on_epoch_begin(self, epoch, logs=None):
            self.items.append(Local())

    runner, model = start(
        lambda model: [Collector()], resuming=False, exact="strict"
    )
    runner.get_state()
    play(runner, model, next(events()))
    with pytest.raises(ExactnessError, match="items"):
        runner.get_state()


def test_audit_of_other_callbacks():
    runner, _ = start(lambda model: [Leader(), Leader()], resuming=False)
    runner.callbacks[0].level, runner.callbacks[1].level = 1.0, 2.0
    tree, arrays = runner.get_state()
    runner, _ = start(
        lambda model: [Leader(), keras.callbacks.History()], resuming=True
    )
    audit = runner.set_state(tree, arrays)
    assert {entry.name: str(entry.status) for entry in audit} == {
        "Leader.0": "restored",
        "History.0": "new",
        "Leader.1": "missing",
    }
    assert runner.callbacks[0].level == 1.0


def test_a_callback_is_restored_whole_or_not_at_all():
    class Stopping(keras.callbacks.EarlyStopping):
        extra = None

        def __init__(self, extra=None):
            super().__init__()
            self.zextra = extra

    with pytest.warns(ExactnessWarning):
        runner, _ = start(lambda model: [Stopping(1)], resuming=False)
        runner.callbacks[0].zextra = [object()]
        runner.callbacks[0].wait = 5
        tree, arrays = runner.get_state()
    for exact in ("warn", "strict"):
        runner, _ = start(
            lambda model: [Stopping(1)], resuming=True, exact=exact
        )
        if exact == "strict":
            with pytest.raises(ExactnessError, match="not restored"):
                runner.set_state(tree, arrays)
        else:
            with pytest.warns(ExactnessWarning, match="not restored"):
                audit = runner.set_state(tree, arrays)
            assert audit[0].status == "not resumable"
        assert runner.callbacks[0].wait == 0
        assert runner.callbacks[0].zextra == 1


@pytest.mark.parametrize(
    "value, match",
    [
        ([Leader(), 3], r"callbacks\[1\] is 3"),
        ([Leader(), [Leader]], r"callbacks\[1\]\[0\].*Leader\(\)"),
        (Callback, "Callback"),
        ({"a": Leader(), "b": 3}, r"callbacks\['b'\] is 3"),
    ],
)
def test_what_is_no_callback(value, match):
    model = make_model()
    with pytest.raises(ConfigError, match=match):
        CallbackRunner(value, model=model, params=PARAMS)
    with pytest.raises(ConfigError, match="exact"):
        CallbackRunner([], model=model, params=PARAMS, exact="maybe")


def test_nested_lists_and_callback_lists():
    first, second, third = Leader(), Leader(), Leader()
    model = make_model()
    nested = keras.callbacks.CallbackList([second], add_history=False)
    runner = CallbackRunner(
        [first, [nested, (third,)]], model=model, params=PARAMS
    )
    assert runner.callbacks == [first, second, third]
    assert first.model is model and first.params == PARAMS


def test_active_hooks():
    class OldName(Callback):
        seen = 0

        def on_batch_end(self, batch, logs=None):
            self.seen += 1

    class Epochs(Callback):
        def on_epoch_end(self, epoch, logs=None):
            pass

    class Tests(Callback):
        def on_test_batch_end(self, batch, logs=None):
            pass

    Lambda = keras.callbacks.LambdaCallback
    for callback, train, test in [
        (OldName(), True, False),
        (Epochs(), False, False),
        (Tests(), False, True),
        (Lambda(on_epoch_end=print), False, False),
        (Lambda(on_train_batch_end=lambda batch, logs: None), True, False),
        (Lambda(on_batch_end=lambda batch, logs: None), True, False),
        (keras.callbacks.TerminateOnNaN(), True, False),
        (keras.callbacks.RemoteMonitor(), False, False),
    ]:
        runner = CallbackRunner([callback], model=make_model(), params=PARAMS)
        assert runner.batch_hooks_active == train, callback
        assert runner.test_batch_hooks_active == test, callback
    old = OldName()
    runner, model = start(lambda model: [old], resuming=False)
    finish(runner, model, events())
    assert old.seen == 18


@pytest.mark.parametrize(
    "tree",
    [
        None,
        {},
        {"format": 1, "callbacks": []},
        {"format": 2, "callbacks": {}},
    ],
)
def test_hostile_states(tree):
    runner, _ = start(lambda model: [Leader()], resuming=True)
    with pytest.raises(DamagedError):
        runner.set_state(tree, {})


@pytest.mark.parametrize(
    "parts",
    [
        None,
        {},
        {"own": {}},
        {"attributes": {"format": 1, "value": 3, "objects": []}},
        {"attributes": None, "lost": {}},
        {"attributes": {}, "lost": []},
    ],
)
def test_hostile_parts(parts):
    runner, _ = start(lambda model: [Leader()], resuming=True)
    with pytest.warns(ExactnessWarning):
        audit = runner.set_state(
            {"format": 1, "callbacks": {"Leader.0": parts}}, {}
        )
    assert audit[0].status == "not resumable"


def test_the_state_is_a_snapshot():
    runner, _ = start(lambda model: [Everything()], resuming=False)
    _, arrays = runner.get_state()
    runner.callbacks[0].sums += 1
    assert arrays["Everything.0.attributes.sums"].tolist() == [0, 0, 0]


def test_ten_small_callbacks_cost_little():
    runner, _ = start(
        lambda model: [Leader() for _ in range(10)], resuming=False
    )
    runner.get_state()
    times = []
    for _ in range(20):
        began = time.perf_counter()
        runner.get_state()
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-3


class Patient(Callback):
    """Stores its arguments; some change, some are shared."""

    def __init__(
        self, patience, names=(), budget=10.0, window=None, probe=None
    ):
        super().__init__()
        self.patience = patience
        self._names = list(names)
        self.budget = budget
        self.window = [] if window is None else window
        self.alias = self.window
        self.noise = np.random.default_rng().normal(size=3)
        self.drawn = np.random.default_rng()
        # Given, but not the same each time: state.
        self.probe = [np.random.default_rng().normal(size=3)]

    def on_epoch_end(self, epoch, logs=None):
        self.budget -= 1


def resumed(make, saved, **kwargs):
    runner, model = start(make, resuming=True, **kwargs)
    tree, arrays = json.loads(json.dumps(saved[0])), saved[1]
    return runner, model, runner.set_state(tree, arrays)


def test_arguments_that_did_not_change_are_the_programs():
    runner, model = start(
        lambda model: [Patient(3, ["a"], window=[1])], resuming=False
    )
    first = runner.callbacks[0]
    finish(runner, model, list(events())[:5])
    saved = runner.get_state()

    # The same program: nothing to be said.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner, _, audit = resumed(
            lambda model: [Patient(3, ["a"], window=[1])], saved, exact="strict"
        )
    assert audit[0].detail == ""

    # Another one: what changed in the run is the run's all the same, and so
    # is what a program draws anew.
    with pytest.warns(ExactnessWarning) as caught:
        runner, _, audit = resumed(
            lambda model: [Patient(5, ["b", "c"], 99.0, [2])], saved
        )
    told = sorted(str(warning.message) for warning in caught)
    assert len(told) == 2
    assert "`_names` is another than when the run began, and" in told[0]
    assert "`patience` is another than when the run began (3 -> 5)" in told[1]
    now = runner.callbacks[0]
    assert (now.patience, now._names, now.budget) == (5, ["b", "c"], 9.0)
    # Two attributes that are one list are state: they could not be told apart.
    assert now.window == [1] and now.alias is now.window
    assert now.noise.tolist() == first.noise.tolist()
    assert now.drawn.normal() == first.drawn.normal()
    assert now.probe[0].tolist() == first.probe[0].tolist()
    with pytest.raises(ExactnessError, match="patience"):
        resumed(lambda model: [Patient(5, ["a"])], saved, exact="strict")


def test_what_changed_in_an_earlier_process_stays_changed():
    def make(model):
        return [Patient(3, budget=10.0)]

    runner, model = start(make, resuming=False)
    finish(runner, model, list(events())[:5])  # an epoch: changed once
    saved = runner.get_state()
    for _ in range(3):  # processes in which nothing changes
        runner, _, audit = resumed(make, saved, exact="strict")
        assert runner.callbacks[0].budget == 9.0
        saved = runner.get_state()
    assert audit[0].status == "restored"


def test_what_changed_and_changed_back_is_the_programs():
    def make(budget):
        return lambda model: [Patient(3, budget=budget)]

    runner, model = start(make(10.0), resuming=False)
    finish(runner, model, list(events())[:5])
    runner.callbacks[0].budget = 10.0
    saved = runner.get_state()
    with pytest.warns(ExactnessWarning, match=r"budget.*10\.0 -> 20\.0"):
        runner, _, _ = resumed(make(20.0), saved)
    assert runner.callbacks[0].budget == 20.0
    # It is changed from now on: by its own program's measure.
    runner.callbacks[0].budget = 10.0
    runner, _, _ = resumed(make(20.0), runner.get_state(), exact="strict")
    assert runner.callbacks[0].budget == 10.0


class HoldsData(Callback):
    """What is large, and set where."""

    def __init__(self, data):
        super().__init__()
        self.data = data
        self.nested = {"copy": data + 1, "ref": 3}

    def on_train_begin(self, logs=None):
        self.initial = self.data * 2  # not by the constructor: state

    def on_epoch_end(self, epoch, logs=None):
        self.nested["ref"] += 1


def test_large_arrays_that_do_not_change_are_not_saved(monkeypatch):
    monkeypatch.setattr("legato.callbacks.entries._LARGE_BYTES", 1 << 10)
    data = np.arange(1000.0)

    def make(model):
        return [HoldsData(data.copy())]

    runner, model = start(make, resuming=False)
    saved = runner.get_state()
    assert sorted(saved[1]) == ["HoldsData.0.attributes.initial"]
    finish(runner, model, list(events())[:5])
    saved = runner.get_state()
    assert sorted(saved[1]) == [
        "HoldsData.0.attributes.initial",
        "HoldsData.0.attributes.nested.copy",
    ]
    runner, model, _ = resumed(make, saved, exact="strict")
    saved = runner.get_state()
    runner, model, _ = resumed(make, saved, exact="strict")
    now = runner.callbacks[0]
    assert now.data.tolist() == data.tolist()
    assert now.initial.tolist() == (data * 2).tolist()
    assert now.nested["ref"] == 4 and now.nested["copy"][0] == 1

    # Changed in training: state; changed in the program: it is told.
    now.data[3] = -1.0
    changed = runner.get_state()
    assert "HoldsData.0.attributes.data" in changed[1]
    runner, _, _ = resumed(make, changed, exact="strict")
    assert runner.callbacks[0].data[3] == -1.0
    with pytest.warns(ExactnessWarning, match="`data` is another"):
        runner, _, _ = resumed(lambda model: [HoldsData(data * 3)], saved)
    assert runner.callbacks[0].data[1] == 3.0


class Names:
    def __init__(self, array):
        self.ref, self.array = 1, array


class Refers(Callback):
    """Attributes by names that the format uses, in all kinds of holders."""

    def __init__(self, ref=0, array="a", function=None):
        super().__init__()
        self.ref = ref
        self.array = Names(array)
        self.function = function
        self.me = [self.on_test_end]


def make_refers(ref=0, array="a", cell=4):
    def function(ref=cell):
        return ref + cell

    return lambda model: [Refers(ref, array, function)]


@pytest.mark.parametrize(
    "other", [{"ref": 1}, {"array": "b"}, {"cell": 5}], ids=str
)
def test_names_that_the_format_uses(other):
    runner, _ = start(make_refers(), resuming=False)
    saved = runner.get_state()
    resumed(make_refers(), saved, exact="strict")
    name = "function" if "cell" in other else next(iter(other))
    with pytest.warns(ExactnessWarning, match=f"`{name}` is") as caught:
        resumed(make_refers(**other), saved)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "unchanged",
    [3, {"level": 3}, {"level": ["x", 1]}, {"level": [1, True]}],
)
def test_hostile_unchanged(unchanged):
    runner, _ = start(lambda model: [Leader()], resuming=False)
    tree, arrays = runner.get_state()
    tree["callbacks"]["Leader.0"]["unchanged"] = unchanged
    runner, _ = start(lambda model: [Leader()], resuming=True)
    with pytest.warns(ExactnessWarning, match="not restored"):
        runner.set_state(tree, arrays)


def test_history_is_the_models():
    model = make_model()
    given = keras.callbacks.History()
    runner = CallbackRunner([given], model=model, params=PARAMS)
    assert model.history is given is runner.history
    runner = CallbackRunner([], model=model, params=PARAMS, add_history=True)
    assert model.history is runner.history is runner.callbacks[-1] is not given
    runner = CallbackRunner(
        [given, Leader()], model=model, params=PARAMS, add_history=True
    )
    assert model.history is given and len(runner.callbacks) == 2
    assert CallbackRunner([], model=model, params=PARAMS).history is None


def test_who_looks_at_the_logs_of_a_batch():
    class Begins(Callback):
        def on_train_batch_begin(self, batch, logs=None):
            pass

        def on_test_batch_begin(self, batch, logs=None):
            pass

    class Ends(keras.callbacks.EarlyStopping):
        def on_batch_end(self, batch, logs=None):
            pass

    class EndsTests(Callback):
        def on_test_batch_end(self, batch, logs=None):
            pass

    class SavesEpochs(keras.callbacks.ModelCheckpoint):
        extra = 1

    Saves = keras.callbacks.ModelCheckpoint
    for callback, batches, logs, test_logs in [
        (Begins(), True, False, False),
        (Ends(), True, True, False),
        (EndsTests(), False, False, True),
        (keras.callbacks.TerminateOnNaN(), True, True, False),
        (keras.callbacks.ProgbarLogger(), False, False, False),
        (Saves("x.keras"), False, False, False),
        (Saves("x.keras", save_freq=3), True, True, False),
        (SavesEpochs("x.keras"), False, False, False),
        (keras.callbacks.History(), False, False, False),
    ]:
        runner = CallbackRunner([callback], model=make_model(), params=PARAMS)
        assert runner.batch_hooks_active == batches, callback
        assert runner.wants_batch_logs == logs, callback
        assert runner.wants_test_batch_logs == test_logs, callback


def test_no_params_are_not_set():
    bar = keras.callbacks.ProgbarLogger()
    CallbackRunner([bar], model=make_model(), params={})  # as in `evaluate`
    assert bar.epochs == 1
