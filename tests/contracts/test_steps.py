"""One stateful-looking train_step: what it computes, and what it may do."""

import inspect
import itertools
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import legato
from legato.errors import StepError
from legato.training import TrainSteps
from tests.contracts import by_hand
from tests.contracts.by_hand import HAND, WITH_CALLBACKS
from tests.contracts.scenarios import GAN, SCENARIOS, Classifier, Plateau

# One epoch of five steps, of which the last may be partial, and two more.
STEPS = 7

# How steps reach a CPU, without and with a convolution. Eager ones run as
# Python each time, and not only when they are traced; and what they make
# lazily is there at once, so that the first trace is enough.
PLAIN_MODE, CONVOLUTIONAL_MODE = {
    "jax": ("fused", "stepwise"),
    "tensorflow": ("fused", "fused"),
    "torch": ("eager", "eager"),
}[keras.config.backend()]


class AtEnd(keras.callbacks.Callback):
    """Notes variables after the last step, before averages replace them."""

    def __init__(self):
        super().__init__()
        # The optimizer makes its variables only when the step is traced.
        self.find_variables = list
        self.values = []

    def on_train_end(self, logs=None):
        self.values = [host(v) for v in self.find_variables()]

    # Nothing of it is to be saved.
    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def all_variables(task, model, optimizer):
    """Everything that a step may change, in an order that is always so."""
    found = []
    for part in (model, optimizer):
        for each in part.values() if isinstance(part, dict) else [part]:
            found += each.variables
    for value in vars(task).values():
        if isinstance(value, keras.Variable):
            found.append(value)
        elif isinstance(value, keras.random.SeedGenerator):
            found.append(value.state)
    return found


def host(value):
    return np.array(ops.convert_to_numpy(value))


def train_log(run_dir, kind="train"):
    lines = Path(run_dir, "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [r for r in records if r["kind"] == kind]


def assert_close(actual, expected, what, relative=1e-6):
    # Elements that cancel to nearly nothing carry the rounding errors of the
    # large ones, so the floor is a share of the array's largest element.
    floor = relative * np.max(np.abs(expected), initial=0)
    np.testing.assert_allclose(
        np.asarray(actual, "float64"),
        np.asarray(expected, "float64"),
        rtol=relative,
        atol=floor,
        err_msg=what,
    )


@pytest.mark.parametrize("name", HAND)
def test_updates_equal_those_written_by_hand(name, tmp_path):
    scenario = SCENARIOS[name]
    steps = 14 if name == "half_precision" else STEPS
    seed = scenario.config["seed"]
    task = scenario.make_task()
    at_end = AtEnd()
    callbacks = scenario.make_callbacks(task) if name in WITH_CALLBACKS else []
    trainer = legato.Trainer(
        task,
        run_dir=tmp_path,
        config=legato.TrainerConfig(
            **{
                **scenario.config,
                "train_steps": steps,
                "summary_interval": 1,
                "checkpoint_interval": 1000,
                "validation_interval": None,
                "best_metric": None,
            }
        ),
        callbacks=[*callbacks, at_end],
    )

    own_task = scenario.make_task()
    keras.utils.set_random_seed(seed)
    model = own_task.build_model()
    optimizer = own_task.build_optimizer()
    step = HAND[name](own_task, model, optimizer)
    for ours, theirs in zip(
        all_variables(own_task, model, {}),
        all_variables(trainer.task, trainer.model, {}),
        strict=True,
    ):
        np.testing.assert_array_equal(host(ours), host(theirs))

    at_end.find_variables = lambda: all_variables(
        trainer.task, trainer.model, trainer.optimizer
    )
    trainer.train()

    logs = by_hand.train(step, own_task, seed, steps)

    expected = all_variables(own_task, model, optimizer)
    moved = 0
    for i, (variable, actual) in enumerate(
        zip(expected, at_end.values, strict=True)
    ):
        assert_close(actual, host(variable), f"{i}: {variable.path}")
        moved += bool(np.any(actual))
    assert moved
    for record, own in zip(train_log(tmp_path), logs, strict=True):
        for log, value in own.items():
            assert_close(record[log], value, f"{log} at {record['step']}")


def test_half_precision_overflows_and_recovers(tmp_path):
    trainer = SCENARIOS["half_precision"].trainer(
        tmp_path, train_steps=14, summary_interval=1
    )
    trainer.train()
    updates = int(trainer.optimizer.inner_optimizer.iterations)
    assert 0 < updates < 14, "no step was skipped, or all were"
    scales = [record["scale"] for record in train_log(tmp_path)]
    assert any(a > b for a, b in itertools.pairwise(scales)), scales
    assert any(a < b for a, b in itertools.pairwise(scales)), scales
    for variable in trainer.model.trainable_variables:
        assert np.all(np.isfinite(host(variable)))


# -- value_and_grad ----------------------------------------------------------


def variable(value, name):
    return keras.Variable(value, dtype="float32", name=name)


def test_none_for_what_the_loss_does_not_reach():
    used, unused = variable(2.0, "used"), variable(3.0, "unused")
    stopped, whole = variable(5.0, "stopped"), variable(7, "whole")

    def forward():
        ignored = unused * 2.0
        integer = ops.cast(ops.cast(whole * 1.0, "int32"), "float32")
        return used * used + ops.stop_gradient(
            stopped * used
        ) + integer, ignored

    (loss, ignored), gradients = legato.value_and_grad(
        forward, [unused, used, stopped, whole]
    )
    assert float(loss) == 2 * 2 + 5 * 2 + 7
    assert float(ignored) == 6
    assert gradients[0] is None
    assert float(gradients[1]) == 2 * 2
    assert gradients[2] is None
    assert gradients[3] is None


def test_none_for_what_the_loss_does_not_reach_in_a_scan():
    carried, emitted, late = (variable(2.0, n) for n in ("a", "b", "c"))

    def forward():
        def body(carry, x):
            first, second = carry
            # `late` reaches `first` only in the iteration after. What is
            # emitted looks like what is carried: Keras needs it so on
            # TensorFlow.
            carry = (first * carried + second, second * late)
            return carry, (x * emitted, x)

        carry, outputs = ops.scan(
            body, (ops.ones(()), ops.ones(())), ops.ones((3,))
        )
        return carry[0], outputs[0]

    (loss, outputs), gradients = legato.value_and_grad(
        forward, [carried, emitted, late]
    )

    # Three iterations written out, with a and c for the variables:
    # a + 1, then a**2 + a + c, then a**3 + a**2 + a * c + c**2.
    a, c = 2.0, 2.0
    assert float(loss) == a**3 + a**2 + a * c + c**2
    assert host(outputs).tolist() == [2.0, 2.0, 2.0]
    assert float(gradients[0]) == 3 * a**2 + 2 * a + c
    assert gradients[1] is None
    assert float(gradients[2]) == a + 2 * c


def test_none_for_a_variable_used_in_no_branch():
    left, right, neither = (variable(2.0, n) for n in ("a", "b", "c"))

    def forward():
        loss = ops.cond(
            left.value > 0,
            lambda: left * left,
            lambda: right * right + 0 * ops.stop_gradient(neither.value),
        )
        return loss

    loss, gradients = legato.value_and_grad(forward, [left, right, neither])
    assert float(loss) == 4
    assert float(gradients[0]) == 4
    # Reached by the other branch: the same program has to serve both.
    assert float(gradients[1]) == 0
    assert gradients[2] is None


def test_all_none_is_an_error():
    lonely = variable(2.0, "lonely")
    constant = ops.ones(())
    with pytest.raises(StepError, match=r"none of the 1 variables.*lonely"):
        legato.value_and_grad(lambda: constant * 3.0, [lonely])


def test_no_variables_is_an_error():
    with pytest.raises(StepError, match=r"no variables.*trainable"):
        legato.value_and_grad(lambda: ops.ones(()), [])


def test_any_subset_and_order_of_variables():
    a, b, c = (variable(float(i), "abc"[i]) for i in range(3))
    loss, gradients = legato.value_and_grad(
        lambda: a + 10 * b + 100 * c, [c, a]
    )
    assert float(loss) == 210
    assert [float(g) for g in gradients] == [100, 1]


def test_nested_aux_of_arrays_and_other_things():
    a = variable(3.0, "a")

    def forward():
        return a * a, {"twice": [a * 2, None], "name": "aux", "count": 4}

    (loss, aux), _ = legato.value_and_grad(forward, [a])
    assert float(loss) == 9
    assert float(aux["twice"][0]) == 6
    assert aux["twice"][1] is None
    assert (aux["name"], aux["count"]) == ("aux", 4)


def test_what_forward_assigns_is_kept():
    a, count = variable(3.0, "a"), variable(0.0, "count")

    def forward():
        count.assign(count + 1)
        return a * count

    loss, gradients = legato.value_and_grad(forward, [a])
    assert (float(loss), float(gradients[0]), float(count)) == (3, 1, 1)


def test_no_gradient_flows_through_an_assignment():
    w, mean, unused = (variable(2.0, n) for n in ("w", "mean", "unused"))

    def forward():
        mean.assign(w * 10)
        unused.assign(w * 10)
        return mean * w

    loss, gradients = legato.value_and_grad(forward, [w, unused])
    assert float(loss) == 40
    assert float(gradients[0]) == 20
    assert gradients[1] is None
    assert float(unused) == 20


def test_what_is_differentiated_by_may_be_assigned():
    w = variable(2.0, "w")

    def forward():
        before = w * 5
        w.assign(w * 10)
        return before + 7 * w

    loss, gradients = legato.value_and_grad(forward, [w])
    assert (float(loss), float(gradients[0]), float(w)) == (150, 5 + 7, 20)


@pytest.mark.parametrize("yes", [True, False])
def test_it_may_be_assigned_in_a_branch(yes):
    w, choice = variable(2.0, "w"), variable(float(yes), "choice")

    def forward():
        ops.cond(choice > 0, lambda: w.assign(w * 10), lambda: w.assign(w * 1))
        return 7 * w

    loss, gradients = legato.value_and_grad(forward, [w])
    assert (float(loss), float(gradients[0])) == (140 if yes else 14, 7)


def test_nor_through_that_of_an_inner_pass():
    w, slow = variable(2.0, "w"), variable(3.0, "slow")

    def inner():
        slow.assign(w * slow)
        return slow * slow * w

    def forward():
        loss, (gradient,) = legato.value_and_grad(inner, [w])
        return loss + gradient * w + slow

    # With slow = 6 it is slow**2 w + slow**2 w + slow.
    loss, gradients = legato.value_and_grad(forward, [w, slow])
    assert float(loss) == 72 + 72 + 6
    assert float(gradients[0]) == 36 + 36
    assert float(gradients[1]) == 24 + 24 + 1


@pytest.mark.skipif(PLAIN_MODE != "eager", reason="it is PyTorch's")
def test_an_assignment_without_autograd_in_two_passes():
    import torch

    w = variable(2.0, "w")

    def inner():
        with torch.no_grad():
            w.assign(w * 10)
        return w * w

    def forward():
        loss, (gradient,) = legato.value_and_grad(inner, [w])
        return loss + gradient

    loss, gradients = legato.value_and_grad(forward, [w])
    assert (float(loss), float(gradients[0])) == (400 + 40, 40 + 2)


def test_the_loss_is_unscaled_and_gradients_are_scaled():
    a = variable(3.0, "a")
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.5), initial_scale=1024.0
    )
    optimizer.build([a])
    loss, gradients = legato.value_and_grad(lambda: a * a, [a], optimizer)
    assert float(loss) == 9
    assert float(gradients[0]) == 6 * 1024
    by_hand.apply(optimizer, gradients, [a])
    assert float(a) == 3 - 0.5 * 6


def test_a_constant_loss_scale_factor():
    a = variable(3.0, "a")
    optimizer = keras.optimizers.SGD(0.5, loss_scale_factor=8.0)
    loss, gradients = legato.value_and_grad(lambda: a * a, [a], optimizer)
    assert float(loss) == 9
    assert float(gradients[0]) == 6 * 8


# -- tasks -------------------------------------------------------------------


def train(task, run_dir, callbacks=(), **config):
    trainer = legato.Trainer(
        task,
        run_dir=run_dir,
        config=legato.TrainerConfig(
            **{
                "train_steps": 3,
                "validation_interval": None,
                "checkpoint_interval": 1000,
                "summary_interval": 0,
                "progress": "none",
                **config,
            }
        ),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


class Unreached(Classifier):
    """A layer that the loss does not reach, and strong decay."""

    def build_model(self):
        inputs = keras.Input((8,))
        hidden = layers.Dense(4, name="used")(inputs)
        lost = layers.Dense(4, name="lost")(inputs)
        return keras.Model(inputs, [layers.Dense(3)(hidden), lost])

    def build_optimizer(self):
        return keras.optimizers.AdamW(0.1, weight_decay=0.5)

    def build_losses(self, labels, model_outputs, aux_losses=None):
        return super().build_losses(labels, model_outputs[0], aux_losses)

    def build_metrics(self, training):
        return []


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_decay_leaves_alone_what_the_loss_does_not_reach(tmp_path):
    keras.utils.set_random_seed(0)
    before = Unreached().build_model()
    after = train(Unreached(), tmp_path).model
    for name, is_moved in (("lost", False), ("used", True)):
        kernels = [
            host(model.get_layer(name).kernel) for model in (before, after)
        ]
        assert np.array_equal(*kernels) is not is_moved, name


@pytest.mark.parametrize(
    "kind",
    ["Nadam", "Adafactor", "Muon"],
)
def test_optimizers_of_all_kinds(kind, tmp_path):
    # Each makes its variables in its own way, when it is first applied.
    def make():
        return getattr(keras.optimizers, kind)(0.01)

    task = Classifier()
    task.build_optimizer = make
    trainer = train(task, tmp_path)
    keras.utils.set_random_seed(trainer.config.seed)
    model, optimizer = task.build_model(), make()
    step = HAND["metric_cadence"](task, model, optimizer)
    by_hand.train(step, task, trainer.config.seed, 3)
    for variable, actual in zip(
        all_variables(task, model, optimizer),
        all_variables(trainer.task, trainer.model, trainer.optimizer),
        strict=True,
    ):
        assert_close(host(actual), host(variable), actual.path)


class AveragedGAN(GAN):
    def build_optimizer(self):
        return {
            name: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5)
            for name in ("generator", "discriminator")
        }


def test_averages_of_several_optimizers_end_in_the_models(tmp_path):
    trainer = train(AveragedGAN(), tmp_path)
    for name, optimizer in trainer.optimizer.items():
        for variable, average in zip(
            trainer.model[name].trainable_variables,
            optimizer._model_variables_moving_average,
            strict=True,
        ):
            np.testing.assert_array_equal(host(variable), host(average))


WAYS_TO_READ = {
    "value": lambda v: v.value,
    "converted": ops.convert_to_tensor,
    "array": ops.array,
    "copy": ops.copy,
    "cast": lambda v: ops.cast(v, "float32"),
    "reshaped": lambda v: ops.reshape(v, ()),
    "stopped": ops.stop_gradient,
    "sum": lambda v: v + 0,
    "in_a_tree": lambda v: keras.tree.map_structure(
        ops.convert_to_tensor, {"v": v}
    )["v"],
}


class Reads(Classifier):
    def __init__(self):
        super().__init__()
        self.count = keras.Variable(0.0, trainable=False, name="count")

    def train_step(self, batch, model, optimizer, metrics=None):
        read = {name: way(self.count) for name, way in WAYS_TO_READ.items()}
        self.count.assign_add(1.0)
        logs = super().train_step(batch, model, optimizer, metrics)
        return {**logs, **read}


def test_what_was_read_stays_when_the_variable_is_assigned(tmp_path):
    train(Reads(), tmp_path, train_steps=2, summary_interval=2)
    (log,) = train_log(tmp_path)
    # At the second step it held 1, at the first 0.
    assert {name: log[name] for name in WAYS_TO_READ} == dict.fromkeys(
        WAYS_TO_READ, 0.5
    )


def by_if(loss):
    return 1.0 if loss > 0 else 0.0


ASKS = {
    "if": by_if,
    "float": float,
    "numpy": np.asarray,
    "range": lambda loss: len(range(ops.cast(loss, "int32"))),
}


class Asks(Classifier):
    def __init__(self, ask):
        super().__init__()
        self.ask = ask

    def train_step(self, batch, model, optimizer, metrics=None):
        logs = super().train_step(batch, model, optimizer, metrics)
        return {**logs, "asked": self.ask(logs["loss"])}


@pytest.mark.skipif(PLAIN_MODE == "eager", reason="there is a value")
@pytest.mark.parametrize("ask", ASKS)
def test_python_that_asks_for_a_value(ask, tmp_path):
    with pytest.raises(StepError, match=r"value of a tensor.*keras\.ops\.cond"):
        train(Asks(ASKS[ask]), tmp_path, train_steps=2)


class LossesOutside(Classifier):
    def train_step(self, inputs, model, optimizer, metrics=None):
        logs = super().train_step(inputs, model, optimizer, metrics)
        return {**logs, "penalty": sum(model.losses)}


def test_model_losses_outside_of_forward(tmp_path):
    with pytest.raises(StepError, match=r"`model.losses`.*forward"):
        train(LossesOutside(), tmp_path)


class ReadsMetric(Classifier):
    def train_step(self, inputs, model, optimizer, metrics=None):
        logs = super().train_step(inputs, model, optimizer, metrics)
        return {**logs, "accuracy_now": metrics[0].result()}


def test_a_metric_is_not_read_in_a_step(tmp_path):
    with pytest.raises(StepError, match=r"'accuracy'.*result"):
        train(ReadsMetric(), tmp_path)


# -- metrics now and then ----------------------------------------------------


@pytest.mark.parametrize("task", [Plateau, Classifier])
def test_weights_do_not_depend_on_how_often_metrics_are_computed(
    task, tmp_path
):
    values = []
    for interval in (1, 3, 0):
        trainer = train(
            task(),
            tmp_path / str(interval),
            train_steps=12,
            train_metrics_interval=interval,
        )
        values.append(
            [host(v).tobytes() for v in trainer.model.variables]
            + [host(v).tobytes() for v in trainer.optimizer.variables]
        )
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("interval", [1, 3])
def test_metrics_are_updated_at_the_due_steps(interval, tmp_path):
    trainer = train(
        Classifier(),
        tmp_path,
        train_steps=STEPS,
        summary_interval=1,
        train_metrics_interval=interval,
    )
    task = Classifier()
    keras.utils.set_random_seed(trainer.config.seed)
    model, optimizer = task.build_model(), task.build_optimizer()
    step = HAND["metric_cadence"](task, model, optimizer)
    metric = keras.metrics.SparseCategoricalAccuracy()
    expected = []
    for done, batch in enumerate(
        by_hand.batches(task, trainer.config.seed, STEPS)
    ):
        if done % 5 == 0:
            metric.reset_state()
        if (done + 1) % interval == 0:
            metric.update_state(batch[1], model(batch[0]))
        # What no batch of the epoch has updated is no number.
        updated = (done + 1) // interval > done // 5 * 5 // interval
        expected.append(float(metric.result()) if updated else np.nan)
        step(batch)
    assert [r["accuracy"] for r in train_log(tmp_path)] == pytest.approx(
        expected, rel=1e-6, nan_ok=True
    )
    assert len(set(expected)) > 1


# -- tracing -----------------------------------------------------------------


class Counted(Classifier):
    """Counts how often it is traced."""

    def __init__(self, calls):
        # In a closure: a changed attribute would be an error.
        self.note = lambda: calls.append(1)

    def train_step(self, inputs, model, optimizer, metrics=None):
        self.note()
        return super().train_step(inputs, model, optimizer, metrics)


def test_no_trace_comes_after_the_first_epoch(tmp_path):
    counts = []
    for epochs in (1, 4):
        calls = []
        train(
            Counted(calls),
            tmp_path / str(epochs),
            train_steps=None,
            epochs=epochs,
        )
        counts.append(len(calls))
    # One finds the variables made lazily, one uses them, and one more is for
    # the partial batch.
    assert counts == ([2 + 5, 2 + 20] if PLAIN_MODE == "eager" else [3, 3])


def test_traces_are_counted():
    calls = []
    task = Counted(calls)
    steps = TrainSteps(
        task,
        task.build_model(),
        task.build_optimizer(),
        task.build_inputs("train"),
        dict.fromkeys(task.build_metrics(training=True), legato.Every(1)),
        mode=None,
        capacity=4,
    )
    steps.trace()
    # The partial batch has its turn with the second call.
    assert steps.traces == len(calls) == (1 if PLAIN_MODE == "eager" else 2)
    assert steps.mode == PLAIN_MODE


class Freeze(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0:
            self.model.layers[0].trainable = False


def test_a_layer_frozen_by_a_callback_stands_still(tmp_path):
    calls = []
    kernels = []
    task = Counted(calls)
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: kernels.append(
            [host(layer.kernel) for layer in trainer.model.layers]
        )
    )
    trainer = legato.Trainer(
        task,
        run_dir=tmp_path,
        config=legato.TrainerConfig(
            epochs=2, progress="none", exact="off", validation_interval=None
        ),
        callbacks=[Freeze(), note],
    )
    trainer.train()
    assert len(calls) > 3, "it was not traced again"
    (first, last), (first_after, last_after) = kernels
    np.testing.assert_array_equal(first, first_after)
    assert not np.array_equal(last, last_after)


class Stack(Classifier):
    """Notes the frames above its step."""

    def __init__(self, frames):
        package = str(Path(legato.__file__).parent)

        def note():
            frames.append(
                [
                    f"{frame.filename.removeprefix(package)}:{frame.function}"
                    for frame in inspect.stack()
                    if frame.filename.startswith(package)
                ]
            )

        self.note = note

    def train_step(self, inputs, model, optimizer, metrics=None):
        self.note()
        return super().train_step(inputs, model, optimizer, metrics)


def test_few_frames_of_ours_are_above_the_users_step(tmp_path):
    frames = []
    train(Stack(frames), tmp_path, train_steps=1)
    for stack in frames:
        assert len(stack) <= 5, stack


def test_modes_are_chosen_by_the_program(tmp_path):
    for name, mode in (
        ("convolutional", CONVOLUTIONAL_MODE),
        ("recurrent", PLAIN_MODE),
    ):
        task = SCENARIOS[name].make_task()
        steps = TrainSteps(
            task,
            task.build_model(),
            task.build_optimizer(),
            legato.ArraySource(task.build_inputs("train").resident, 30),
            None,
            mode=None,
            capacity=4,
        )
        steps.trace()
        assert steps.mode == mode


class Named(keras.callbacks.Callback):
    def __init__(self, name, calls):
        super().__init__()
        self.name = name
        self.calls = calls

    def on_train_begin(self, logs=None):
        self.calls.append(self.name)


def test_callbacks_of_the_task_come_before_the_others(tmp_path):
    calls = []

    class Own(Classifier):
        def build_callbacks(self):
            return [Named("task's", calls)]

    config = legato.TrainerConfig(
        train_steps=1, validation_interval=None, exact="off", progress="none"
    )
    given = [Named("given", calls)]
    legato.Trainer(
        Own(), run_dir=tmp_path / "run", config=config, callbacks=given
    ).train()
    assert calls == ["task's", "given"]
