"""What the PyTorch backend does that the others need not."""

import warnings

import keras
import ml_dtypes
import numpy as np
import pytest
import torch
from keras import layers, ops
from tests.contracts import runs
from tests.contracts.scenarios import Classifier

import legato
from legato import backends
from legato.backends.torch import arrays, program, replay
from legato.errors import LegatoWarning, StepError


def host(variable):
    return ops.convert_to_numpy(variable).copy()


def compile_step(step, batches=3, **options):
    """A loop over `step`, whose batch is the row of some operands."""
    operands = np.arange(batches * 2, dtype="float32").reshape(batches, 2)
    loop = backends.current().compile_loop(
        step,
        fetch=lambda resident, operands, index: operands[index],
        resident=None,
        operands=operands,
        mode=None,
        losses_in_step=False,
        **options,
    )
    return loop, operands


def rows(loop, operands, num_steps=3, step=0):
    logs = loop(step, num_steps, operands)
    return backends.current().to_host(logs, num_steps)


# -- arrays ------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    ["float16", "float32", "float64", "int8", "uint8", "int32", "int64",
     "bool", "complex64", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
     ml_dtypes.float8_e5m2],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0, 2), (3, 4)])
def test_every_bit_of_an_array_comes_back(dtype, shape):
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if np.dtype(dtype) == bool:
        array = np.random.default_rng(0).integers(0, 2, shape).astype(bool)
    else:
        # All patterns, NaNs with payloads among them.
        raw = np.random.default_rng(0).bytes(max(count, 1))[:count]
        array = np.frombuffer(raw, np.dtype(dtype)).reshape(shape)
    tensor = arrays.to_tensor(array, torch.device("cpu"))
    back = arrays.to_numpy(tensor, np.dtype(dtype).name)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_unsigned_integers_are_kept_in_wider_ones(dtype):
    largest = np.array([0, np.iinfo(dtype).max], dtype)
    tensor = arrays.to_tensor(largest, torch.device("cpu"))
    assert tensor.dtype in (torch.int32, torch.int64)
    np.testing.assert_array_equal(arrays.to_numpy(tensor, dtype), largest)
    assert arrays.canonical_dtype(np.dtype(dtype)).itemsize > (
        np.dtype(dtype).itemsize
    )


def test_arrays_that_cannot_be_written_or_run_backwards():
    array = np.arange(6.0).reshape(2, 3)[:, ::-1]
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = arrays.to_tensor(array, torch.device("cpu"))
    np.testing.assert_array_equal(tensor.numpy(), array)


# -- examining a step --------------------------------------------------------


def test_examining_a_step_changes_nothing():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [layers.Input((2,)), layers.BatchNormalization(), layers.Dropout(0.5),
         layers.Dense(1)]
    )  # fmt: skip
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build(model.trainable_variables)

    def step(batch, at):
        loss, gradients = legato.value_and_grad(
            lambda: ops.mean(model(batch[None], training=True)),
            model.trainable_variables,
        )
        optimizer.apply(gradients, model.trainable_variables)
        return {"loss": loss}

    variables = [*model.variables, *optimizer.variables]
    before = [host(v) for v in variables]
    generator = torch.get_rng_state()
    loop, operands = compile_step(step)
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(host(variable), value)
    assert torch.equal(torch.get_rng_state(), generator)

    rows(loop, operands)
    changed = {
        id(v)
        for v, value in zip(variables, before, strict=True)
        if not np.array_equal(host(v), value)
    }
    assert changed
    assert changed <= {id(v) for v in loop.updated}
    assert {id(v) for v in loop.variables} >= {id(v) for v in variables} - {
        # Keras's Dropout does not use it on PyTorch.
        id(v)
        for v in variables
        if "seed" in v.path
    }


def test_a_failed_examination_changes_nothing_either():
    variable = keras.Variable(np.zeros(3))
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build([variable])

    def step(batch, at):
        optimizer.apply([ops.ones((3,))], [variable])
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        compile_step(step)
    assert host(variable).tolist() == [0, 0, 0]


def test_what_only_the_other_branch_uses_is_found():
    rare = keras.Variable(0.0, name="rare")
    metric = keras.metrics.F1Score()  # makes its variables when updated

    def step(batch, at):
        def rarely():
            rare.assign_add(1.0)
            metric.update_state(ops.ones((1, 2)), ops.ones((1, 2)))

        ops.cond(at >= 2, rarely, lambda: None)
        return {"at": at}

    loop, operands = compile_step(step)
    used = {id(v) for v in loop.updated}
    assert used == {id(v) for v in (rare, *metric.variables)}
    rows(loop, operands)
    assert float(rare.numpy()) == 1


def test_a_branch_not_taken_draws_no_random_numbers():
    def step(batch, at):
        noise = ops.cond(at < 0, lambda: torch.rand(()), lambda: ops.zeros(()))
        return {"noise": noise}

    loop, operands = compile_step(step)
    before = torch.get_rng_state()
    rows(loop, operands)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_of_the_branch_not_taken_are_zeros_in_a_step():
    left, right = (keras.Variable(2.0, name=n) for n in ("left", "right"))
    seen = []

    def step(batch, at):
        _, gradients = legato.value_and_grad(
            lambda: ops.cond(
                at < 2, lambda: left * left, lambda: right * right
            ),
            [left, right],
        )
        seen.append([None if g is None else float(g) for g in gradients])
        return {}

    loop, operands = compile_step(step)
    seen.clear()
    assert rows(loop, operands).shape == (3, 0)
    assert seen == [[4, 0], [4, 0], [0, 4]]


# -- memory ------------------------------------------------------------------


def test_what_was_read_stays_when_the_variable_is_assigned():
    variable = keras.Variable(1.0)

    def step(batch, at):
        before = variable.value
        variable.assign(before * 3)
        return {"before": before, "after": variable.value}

    loop, operands = compile_step(step)
    assert rows(loop, operands, 2).tolist() == [[1, 3], [3, 9]]


def test_what_was_read_stays_when_an_optimizer_changes_it():
    variable = keras.Variable(1.0)
    optimizer = keras.optimizers.SGD(1.0)

    def step(batch, at):
        before = variable.value
        optimizer.apply([ops.ones(())], [variable])
        return {"before": before, "after": variable.value}

    loop, operands = compile_step(step)
    assert rows(loop, operands, 2).tolist() == [[1, 0], [0, -1]]


def test_a_variable_assigned_from_another_has_its_own_memory():
    slow, fast = keras.Variable(0.0), keras.Variable(1.0)
    optimizer = keras.optimizers.SGD(1.0)

    def step(batch, at):
        slow.assign(fast.value)
        optimizer.apply([ops.ones(())], [fast])
        return {"slow": slow.value, "fast": fast.value}

    loop, operands = compile_step(step)
    assert rows(loop, operands, 2).tolist() == [[1, 0], [0, -1]]
    assert (float(slow.numpy()), float(fast.numpy())) == (0, -1)


def test_what_forward_used_may_be_assigned_in_it():
    # In place, autograd would miss the old value.
    weight, count = keras.Variable(3.0), keras.Variable(1.0)

    def step(batch, at):
        def forward():
            loss = weight * count
            count.assign(count * 2)
            return loss

        loss, (gradient,) = legato.value_and_grad(forward, [weight])
        return {"loss": loss, "gradient": gradient}

    loop, operands = compile_step(step)
    assert rows(loop, operands, 2).tolist() == [[3, 1], [6, 2]]


def test_a_call_that_fails_midway_is_told():
    variable, other = keras.Variable(1.0), keras.Variable(1.0)
    fails = []

    def step(batch, at):
        variable.assign_add(1.0)
        if fails and int(at) == 1:
            raise RuntimeError("out of memory")
        return {"sum": variable + other}

    loop, operands = compile_step(step)
    backend = backends.current()
    fails.append(True)
    with pytest.raises(RuntimeError, match="out of memory"):
        loop(0, 3, operands)
    assert backend.lost_variables([variable, other]) == [variable]
    backend.write([variable], [np.float32(5)])
    assert backend.lost_variables([variable, other]) == []
    assert float(variable.numpy()) == 5


# -- compiled ----------------------------------------------------------------


class Rates(keras.callbacks.Callback):
    """Another learning rate for every step."""

    def on_train_batch_begin(self, batch, logs=None):
        self.model.optimizer.learning_rate = 0.1 / (batch + 1)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_new_learning_rate_compiles_nothing(optimizer, tmp_path):
    class Rated(Classifier):
        def build_optimizer(self):
            return getattr(keras.optimizers, optimizer)(0.1)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    legato.Trainer(
        Rated(),
        run_dir=tmp_path,
        config=legato.TrainerConfig(
            train_steps=23,
            torch_compile=True,
            validation_interval=None,
            progress="none",
        ),
        callbacks=[Rates()],
    ).train()
    counted = torch._dynamo.utils.counters
    # One graph for the full batch and one for the partial one.
    assert counted["stats"]["unique_graphs"] == 2
    assert not counted["recompile_limit"], counted
    assert not counted["graph_break"], counted


def test_a_compiled_run_that_was_killed_is_the_run_that_was_not(tmp_path):
    # Dropout, batch statistics and momentum; metrics in a conditional.
    options = {
        "torch_compile": True,
        "train_steps": 14,
        "train_metrics_interval": 3,
        "keep_last": None,
    }
    runs.train("plateau", tmp_path / "whole", **options)
    runs.train_with_kills(
        "plateau", tmp_path / "killed", kills=1, until=14, seed=1, **options
    )
    found, compared = runs.differences(tmp_path / "whole", tmp_path / "killed")
    assert not found
    assert compared > 5000
    identity = runs.host_state(tmp_path / "whole", 4)["identity"]
    assert identity["program"]["mode"] == "compiled"


def test_a_compiled_step_computes_what_the_eager_one_does(tmp_path):
    losses = {}
    for compiled in (True, False):
        trainer = legato.Trainer(
            Classifier(),
            run_dir=tmp_path / str(compiled),
            config=legato.TrainerConfig(
                epochs=4,
                torch_compile=compiled,
                train_metrics_interval=3,
                progress="none",
            ),
        )
        losses[compiled] = trainer.train().history
    assert losses[True].keys() == losses[False].keys()
    for name, values in losses[False].items():
        assert losses[True][name] == pytest.approx(values, rel=1e-5), name


class Ranked(Classifier):
    """Its metric alone looks for the greatest."""

    def build_metrics(self, training):
        return [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]


def test_a_metric_that_is_not_due_is_not_computed(tmp_path, monkeypatch):
    found = []

    def counted(graph):
        names = [str(node.target) for node in graph.graph.nodes]

        def run(*arguments):
            found.append(names.count("aten.argmax.default"))
            return graph(*arguments)

        return run

    monkeypatch.setattr(program, "_compiled", counted)
    short(
        tmp_path,
        Ranked(),
        train_steps=9,
        train_metrics_interval=4,
        steps_per_loop=3,
        torch_compile=True,
    )
    # (Each was tried before; the last batch of an epoch has its own two.)
    tried = [1, 0]
    assert found[:2] == tried
    assert found[-9:].count(1) == 2
    assert len(found) == 9 + 2 * len(tried)


def test_compiled_weights_do_not_depend_on_when_metrics_are_due(tmp_path):
    class Whole(Ranked):
        has_partial_batches = False

    weights = {}
    for interval, graphs in ((0, 1), (3, 2)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = short(
            tmp_path / str(interval),
            Whole(),
            train_steps=10,
            train_metrics_interval=interval,
            torch_compile=True,
        )
        counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert counted == graphs
        weights[interval] = [host(v).tobytes() for v in trainer.model.variables]
    assert weights[0] == weights[3]


class Noisy(Classifier):
    def __init__(self):
        self.noise = keras.random.SeedGenerator(3)

    def build_losses(self, labels, model_outputs, aux_losses=None):
        noise = keras.random.normal((), seed=self.noise)
        return super().build_losses(labels, model_outputs) + 0 * noise


def short(run_dir, task=None, train_steps=3, **config):
    trainer = legato.Trainer(
        task or Classifier(),
        run_dir=run_dir,
        config=legato.TrainerConfig(
            train_steps=train_steps,
            validation_interval=None,
            progress="none",
            **config,
        ),
    )
    trainer.train()
    return trainer


def test_a_step_that_cannot_be_compiled(tmp_path):
    with pytest.raises(StepError, match=r"SeedGenerator.*torch_compile=False"):
        short(tmp_path / "asked", Noisy(), torch_compile=True)
    with pytest.warns(LegatoWarning, match="runs without being compiled"):
        begin_long(tmp_path / "auto", Noisy())


def test_a_step_that_takes_long_to_compile(tmp_path, monkeypatch):
    """Is not, unless that is asked for."""
    monkeypatch.setattr(program, "MAX_OPERATIONS", 20)
    with pytest.warns(LegatoWarning, match=r"operations.*torch_compile=True"):
        begin_long(tmp_path / "auto", Classifier())
    short(tmp_path / "asked", Classifier(), torch_compile=True)


def begin_long(run_dir, task):
    with pytest.raises(legato.errors.Stopped):
        short(run_dir, task, train_steps=5000, max_time=1e-6)


def test_the_choice_is_kept(tmp_path):
    short(tmp_path, torch_compile=False)
    with pytest.warns(LegatoWarning, match="eager from the beginning"):
        short(tmp_path, train_steps=6, torch_compile=True)
    # Without a word where nothing else was asked for, however long it is.
    begin_long(tmp_path, Classifier())


def test_dropout_goes_on_with_the_generator_that_was_saved(tmp_path):
    runs.train("plateau", tmp_path / "whole", train_steps=9)
    runs.train("plateau", tmp_path / "two", train_steps=4)
    runs.train("plateau", tmp_path / "two", train_steps=9)
    whole, two = (
        (tmp_path / run / "final" / "state.safetensors").read_bytes()
        for run in ("whole", "two")
    )
    assert whole == two


# -- found in review ---------------------------------------------------------


def aliasing_step():
    """A step in which nearly all values are copies of others."""
    a, b, c, fast, slow, doubled = (
        keras.Variable(float(i), name=f"v{i}") for i in range(6)
    )
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([fast, doubled])

    def step(batch, at):
        first, second, third = a.value, b.value, c.value
        a.assign(second)
        b.assign(third)
        c.assign(first)
        slow.assign(ops.stop_gradient(fast))
        new = doubled * 2.0
        doubled.assign(new)
        before = fast.value
        optimizer.apply([ops.ones(()), ops.ones(())], [fast, doubled])
        return {
            "a": a, "b": b, "c": c, "slow": slow, "before": before,
            "fast": fast, "new": new, "doubled": doubled,
        }  # fmt: skip

    return step


EXPECTED = [
    [1, 2, 0, 3, 3, 2, 10, 9],
    [2, 0, 1, 2, 2, 1, 18, 17],
    [0, 1, 2, 1, 1, 0, 34, 33],
]


@pytest.mark.parametrize("compilation", ["never", "always"])
def test_copies_of_variables_are_copies(compilation):
    loop, operands = compile_step(aliasing_step(), compilation=compilation)
    assert rows(loop, operands).tolist() == EXPECTED


@pytest.mark.parametrize("compilation", ["never", "replay", "always"])
def test_what_is_put_back_may_be_changed_after(compilation, monkeypatch):
    # As in sharpness-aware minimisation: the copy is what the optimizer gets.
    monkeypatch.setattr(replay, "AFTER_STEPS", 1)
    weight, times = keras.Variable(9.0), keras.Variable(0.0)
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([weight])

    def count():
        times.assign_add(1.0)

    def step(batch, at):
        before = weight.value
        weight.assign(before + 1.0)
        weight.assign(before)
        ops.cond(at % 3 == 0, count, lambda: None)
        optimizer.apply([ops.ones(())], [weight])
        return {"weight": weight, "times": times}

    loop, operands = compile_step(step, batches=7, compilation=compilation)
    expected = [[8 - i, 1 + i // 3] for i in range(7)]
    found = [rows(loop, operands[i:], 1, i)[0].tolist() for i in range(7)]
    assert found == expected


def test_conditionals_in_conditionals():
    times = [keras.Variable(0.0) for _ in range(3)]
    weight = keras.Variable(1.0)

    def count(number):
        def add():
            times[number].assign_add(1.0)

        return add

    def step(batch, at):
        def inner():
            ops.cond(at % 4 == 0, count(0), count(1))

        ops.cond(at % 2 == 0, inner, lambda: None)
        # (Of what depends on more, both run.)
        ops.cond(weight > 0, count(2), lambda: None)
        return {str(i): v for i, v in enumerate(times)}

    loop, operands = compile_step(step, batches=8, compilation="always")
    assert rows(loop, operands, 8).tolist() == [
        [1 + i // 4, (i + 2) // 4, 1 + i] for i in range(8)
    ]


def test_options_are_those_of_every_program():
    for _ in range(2):
        loop, operands = compile_step(aliasing_step(), compilation="always")
        rows(loop, operands)
    assert program._OPTIONS.keys() >= {"guard_filter_fn", "size_asserts"}


def test_a_variable_that_lies_otherwise_is_refused():
    weight = keras.Variable(np.ones((2, 3), "float32"))
    loop, operands = compile_step(
        lambda batch, at: {"sum": ops.sum(weight)}, compilation="always"
    )
    rows(loop, operands)
    weight._value.data = weight._value.data.t().contiguous().t()
    with pytest.raises(StepError, match="layout in memory"):
        rows(loop, operands)


def test_what_forward_gives_away_is_no_variables_memory():
    weight = keras.Variable(2.0)
    optimizer = keras.optimizers.SGD(1.0)

    def step(batch, at):
        def forward():
            return weight * weight, ops.stop_gradient(weight)

        (_, aux), gradients = legato.value_and_grad(forward, [weight])
        optimizer.apply(gradients, [weight])
        return {"aux": aux}

    loop, operands = compile_step(step)
    assert rows(loop, operands, 2).tolist() == [[2], [-2]]


def test_a_change_in_place_is_refused():
    weight = keras.Variable(2.0, name="weight")

    def step(batch, at):
        weight.value.clamp_(-1, 1)
        return {}

    with pytest.raises(StepError, match=r"'weight' in place.*assign"):
        compile_step(step)


def test_differentiating_in_branches():
    a, b, c = (keras.Variable(2.0, name=n) for n in "abc")
    seen = []

    def gradients_of(*variables):
        _, gradients = legato.value_and_grad(
            lambda: variables[0] * variables[0], variables
        )
        seen.append([None if g is None else float(g) for g in gradients])
        return ops.zeros(())

    def step(batch, at):
        ops.cond(
            at % 2 == 0, lambda: gradients_of(a), lambda: gradients_of(b, c)
        )
        gradients_of(c, a)
        return {}

    loop, operands = compile_step(step)
    seen.clear()
    rows(loop, operands)
    assert seen == [
        [4], [4, None],
        [4, None], [4, None],
        [4], [4, None],
    ]  # fmt: skip


def test_a_variable_that_was_not_examined_is_refused():
    often, seldom = (keras.Variable(0.0, name=n) for n in ("often", "seldom"))

    def step(batch, at):
        often.assign_add(1.0)
        if int(at) == 1:
            seldom.assign_add(1.0)
        return {}

    loop, operands = compile_step(step)
    with pytest.raises(StepError, match=r"used seldom.*keras.ops.cond"):
        loop(0, 3, operands)


def test_autograd_of_the_users_own_is_refused():
    weight = keras.Variable(2.0)

    def step(batch, at):
        (weight * weight).backward()
        return {}

    with pytest.raises(StepError, match=r"legato.value_and_grad"):
        compile_step(step)


class Wrapped(Classifier):
    """A module of PyTorch's between Keras layers."""

    def __init__(self, module):
        self.make_module = lambda: module

    def build_model(self):
        return keras.Sequential(
            [
                layers.Input((8,)),
                layers.Dense(4),
                keras.layers.TorchModuleWrapper(self.make_module()),
                layers.Dense(3),
            ]
        )


@pytest.mark.parametrize("compiled", [True, False])
def test_a_module_of_pytorchs_is_trained(compiled, tmp_path):
    module = torch.nn.Linear(4, 4)
    before = module.weight.detach().clone()
    short(tmp_path, Wrapped(module), torch_compile=compiled)
    assert not torch.equal(module.weight.detach(), before)


def test_a_module_with_buffers_is_refused(tmp_path):
    with pytest.raises(StepError, match=r"buffers \(running_mean"):
        short(tmp_path, Wrapped(torch.nn.BatchNorm1d(4)))


class Mean(Classifier):
    """Keeps a mean in a plain attribute."""

    def __init__(self):
        self.mean = torch.zeros(())

    def train_step(self, inputs, model, optimizer, metrics=None):
        self.mean = self.mean + ops.mean(inputs[0])
        return super().train_step(inputs, model, optimizer, metrics)


def test_a_tensor_that_changes_on_the_task_is_refused(tmp_path):
    with pytest.raises(StepError, match=r"Mean.mean.*keras.Variable"):
        short(tmp_path, Mean())


def test_without_a_compiler_a_long_run_is_eager(tmp_path, monkeypatch):
    def compile_(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: no g++")

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.warns(LegatoWarning, match="InvalidCxxCompiler"):
        begin_long(tmp_path, Classifier())
    with pytest.raises(StepError, match=r"no g\+\+.*torch_compile=False"):
        short(tmp_path / "asked", torch_compile=True)
