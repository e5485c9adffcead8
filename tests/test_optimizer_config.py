"""Optimizers, learning rates and precision that are named in a config."""

import json
import math

import keras
import numpy as np
import pytest

import legato
from legato import experiment as experiments
from legato.config import OptimizerConfig, ScheduleConfig
from legato.errors import ConfigError, LegatoWarning, RestoreError
from legato.optimizers import Warmup, make_schedule

N = 12
X = np.linspace(-1, 2, 2 * N, dtype="float32").reshape(N, 2)
KERNEL = np.array([[0.5], [-0.25]], "float32")


class Slope(legato.Task):
    """Its gradient is the mean of a batch, whatever the weights are."""

    def build_model(self):
        dense = keras.layers.Dense(1, name="dense")
        model = keras.Sequential([keras.Input((2,)), dense])
        dense.kernel.assign(KERNEL)
        return model

    def build_inputs(self, split):
        if split == "validation":
            return None
        # Each batch is all that there is.
        return legato.ArraySource((X, X[:, :1]), N, shuffle=False)

    def build_losses(self, labels, outputs, aux_losses=None):
        return keras.ops.mean(keras.ops.cast(outputs, "float32"))


class Own(Slope):
    def train_step(self, inputs, model, optimizer, metrics=None):
        return super().train_step(inputs, model, optimizer, metrics)


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, first: float):
        self.first = first

    def __call__(self, step):
        return self.first * 0.5 ** keras.ops.cast(step, "float32")

    def get_config(self):
        return {"first": self.first}


def number():
    return 5


class Vanishes(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 4:
            raise RuntimeError("gone")


def resolve(tmp_path, optimizer, *overrides, task="Slope", trainer=""):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"task: tests.test_optimizer_config:{task}\n"
        f"optimizer: {optimizer}\n"
        f"trainer: {{train_steps: 8, progress: none, {trainer}}}\n"
    )
    return experiments.resolve(str(path), overrides)


def build(tmp_path, optimizer, *overrides, run="run", **given):
    experiment = resolve(tmp_path, optimizer, *overrides, **given)
    return experiments.build_trainer(experiment, run_dir=tmp_path / run)


def problem(tmp_path, optimizer, *overrides, **given):
    with pytest.raises(ConfigError) as caught:
        build(tmp_path, optimizer, *overrides, **given)
    text = str(caught.value)
    return text.replace(str(tmp_path) + "/", "")


# Shapes of learning rates, against formulas.


def warmed(n, steps, first, shape):
    if n < steps:
        return 0.1 * (first + (1 - first) * n / steps)
    return 0.1 * shape(n - steps)


def cosine(n):
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(n, 6) / 6))


def stairs(n):
    return 1.0 if n < 3 else 0.5 if n < 5 else 0.0


SHAPES = {
    "constant": ({}, lambda n: 1.0),
    "cosine": ({"steps": 6, "final": 0.1}, cosine),
    "polynomial": (
        {"steps": 6, "final": 0.25, "power": 2},
        lambda n: 0.25 + 0.75 * (1 - min(n, 6) / 6) ** 2,
    ),
    "exponential": (
        {"steps": 2, "decay_rate": 0.9},
        lambda n: 0.9 ** (n / 2),
    ),
    "step": ({"boundaries": [3, 5], "factors": [0.5, 0.0]}, stairs),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("warmup", "first"), [(0, 0.0), (3, 0.0), (4, 0.5)])
def test_a_shape_follows_its_formula(name, warmup, first):
    arguments, shape = SHAPES[name]
    if warmup:
        arguments = arguments | {"warmup_steps": warmup, "warmup_from": first}
    made = make_schedule(ScheduleConfig(type=name, **arguments), 0.1, None)
    if isinstance(made, float):
        assert (name, warmup, made) == ("constant", 0, 0.1)
        return
    wanted = [warmed(n, warmup, first, shape) for n in range(14)]
    counter = keras.Variable(0, dtype="int", trainable=False)
    found = []
    for n in range(14):
        counter.assign(n)
        found.append(float(keras.ops.convert_to_numpy(made(counter))))
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    schedules = keras.optimizers.schedules
    again = schedules.deserialize(schedules.serialize(made))
    assert type(again) is type(made)
    assert again.get_config() == made.get_config()
    assert float(again(2)) == float(made(2))


def test_a_staircase():
    spec = ScheduleConfig(
        type="exponential", steps=3, decay_rate=0.5, staircase=True
    )
    made = make_schedule(spec, 1.0, None)
    assert [float(made(n)) for n in (0, 2, 3, 5, 6)] == [1, 1, 0.5, 0.5, 0.25]


def test_a_shape_ends_with_the_run(tmp_path):
    cosine = "{type: SGD, learning_rate: 0.1, schedule: {type: cosine%s}}"
    optimizer = build(tmp_path, cosine % "").optimizer
    assert optimizer._learning_rate.decay_steps == 8
    optimizer = build(tmp_path, cosine % ", warmup_steps: 3").optimizer
    rate = optimizer._learning_rate
    assert isinstance(rate, Warmup)
    assert (rate.warmup_steps, rate.schedule.decay_steps) == (3, 5)
    assert problem(
        tmp_path,
        cosine % "",
        "trainer.train_steps=null",
        "trainer.epochs=8",
    ).startswith("config.yaml:2:54: optimizer.schedule: steps is missing:")
    assert "leave nothing of the 8 steps" in problem(
        tmp_path, cosine % ", warmup_steps: 8"
    )


# In training.


def test_each_step_has_its_rate(tmp_path):
    """Seen in the weights and in the summaries."""
    trainer = build(
        tmp_path,
        "{type: SGD, learning_rate: 0.1, schedule: {type: step, "
        "boundaries: [2, 4], factors: [0.5, 0], warmup_steps: 2}}",
        trainer="summary_interval: 1",
    )
    trainer.train()
    rates = [0, 0.05, 0.1, 0.1, 0.05, 0.05, 0, 0]
    assert "boundaries:" in (tmp_path / "run/config.yaml").read_text()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    # As they are after the step: those of the next update.
    logged = [r["learning_rate"] for r in records if r["kind"] == "train"]
    assert logged == pytest.approx([*rates[1:], 0.0])
    kernel = KERNEL - sum(rates) * X.mean(0)[:, None]
    found = keras.ops.convert_to_numpy(trainer.model.layers[0].kernel)
    assert found == pytest.approx(kernel, rel=1e-5)


def test_what_is_done_to_gradients(tmp_path):
    made = build(
        tmp_path,
        "{type: Adam, learning_rate: 0.01, global_clipnorm: 2, weight_decay: "
        "0.1, exclude_from_weight_decay: [bias], ema_momentum: 0.9, "
        "gradient_accumulation_steps: 3, config: {beta_1: 0.8}}",
        "optimizer.config.beta_2=0.95",
        "optimizer.weight_decay=0.2",
    ).optimizer
    assert isinstance(made, keras.optimizers.Adam)
    assert (made.global_clipnorm, made.weight_decay) == (2.0, 0.2)
    assert (made.use_ema, made.ema_momentum) == (True, 0.9)
    assert made.gradient_accumulation_steps == 3
    assert (made.beta_1, made.beta_2) == (0.8, 0.95)
    assert float(made.learning_rate) == pytest.approx(0.01)
    plain = build(tmp_path, "{type: AdamW}", run="other").optimizer
    assert plain.weight_decay == keras.optimizers.AdamW().weight_decay
    assert not plain.use_ema


def test_decay_leaves_out_what_is_excluded(tmp_path):
    spec = (
        "{type: SGD, learning_rate: 0.0001, weight_decay: 100, "
        "exclude_from_weight_decay: [%s]}"
    )
    trainer = build(tmp_path, spec % "kernel", trainer="summary_interval: 0")
    trainer.model.layers[0].bias.assign([1.0])
    trainer.train()
    bias = float(keras.ops.convert_to_numpy(trainer.model.layers[0].bias)[0])
    wanted = 1.0
    for _ in range(8):
        wanted = wanted - wanted * 100 * 0.0001 - 0.0001
    assert bias == pytest.approx(wanted, rel=1e-5)
    found = keras.ops.convert_to_numpy(trainer.model.layers[0].kernel)
    assert found == pytest.approx(
        KERNEL - 8 * 0.0001 * X.mean(0)[:, None], rel=1e-5
    )
    # What is excluded is no part of Keras's config, but of what the run is.
    with pytest.raises(RestoreError, match=r"exclude_from_weight_decay: \['k"):
        build(tmp_path, spec % "bias", "trainer.train_steps=9").train()


def test_another_schedule_is_another_run(tmp_path):
    spec = "{type: SGD, learning_rate: 0.1, schedule: {type: cosine}}"
    build(tmp_path, spec).train()
    with pytest.raises(RestoreError, match=r"decay_steps: 8 -> 9"):
        build(tmp_path, spec, "trainer.train_steps=9").train()


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "precision", ["float32", "mixed_bfloat16", "mixed_float16"]
)
def test_a_killed_run_goes_on_exactly(tmp_path, precision):
    policy = keras.config.dtype_policy().name
    spec = (
        "{type: AdamW, learning_rate: 0.1, schedule: {type: cosine, "
        "warmup_steps: 2}, clipnorm: 0.5, ema_momentum: 0.5, "
        "gradient_accumulation_steps: 2}"
    )
    given = {"trainer": f"precision: {precision}, checkpoint_interval: 3"}

    def train(run, *callbacks):
        trainer = build(tmp_path, spec, run=run, **given)
        trainer._callbacks = callbacks
        history = trainer.train().history
        weights = [keras.ops.convert_to_numpy(w) for w in trainer.model.weights]
        return trainer, history, [w.tobytes() for w in weights]

    trainer, *whole = train("whole")
    with pytest.raises(RuntimeError, match="gone"):
        train("killed", Vanishes())
    _, *resumed = train("killed")
    assert resumed == whole
    is_half = precision == "mixed_float16"
    scaled = isinstance(trainer.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == is_half
    assert trainer.model.layers[0].compute_dtype == precision.removeprefix(
        "mixed_"
    )
    assert trainer.model.layers[0].variable_dtype == "float32"
    assert keras.config.dtype_policy().name == policy


def test_a_step_of_ones_own_is_not_scaled_by_surprise(tmp_path):
    given = {"task": "Own", "trainer": "precision: mixed_float16"}
    with pytest.warns(LegatoWarning, match="Own, which has a train_step of"):
        made = build(tmp_path, "{type: SGD}", **given).optimizer
    assert isinstance(made, keras.optimizers.SGD)
    made = build(tmp_path, "{type: SGD, loss_scaling: true}", **given).optimizer
    assert isinstance(made, keras.optimizers.LossScaleOptimizer)
    given["task"] = "Slope"
    made = build(tmp_path, "{type: SGD, loss_scaling: false}", **given)
    assert isinstance(made.optimizer, keras.optimizers.SGD)


# Classes of one's own, and mistakes.

OWN = "tests.test_optimizer_config"


def test_classes_of_ones_own(tmp_path):
    spec = (
        "{type: 'keras.optimizers:Lion', schedule: {type: "
        f"'{OWN}:Halving', config: {{first: 2}}, warmup_steps: 4}}}}"
    )
    made = build(tmp_path, spec).optimizer
    assert isinstance(made, keras.optimizers.Lion)
    assert float(made._learning_rate(2)) == 1.0
    assert float(made._learning_rate(5)) == 1.0


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (
            "{type: Adm}",
            "config.yaml:2:19: optimizer.type: keras.optimizers has no 'Adm' - "
            "did you mean 'Adam'?",
        ),
        (
            "{type: Adam, config: {beta1: 0.9}}",
            "config.yaml:2:34: optimizer.config.beta1: not a known key - did "
            "you mean 'beta_1'? (got 0.9)",
        ),
        (
            "{type: Adam, learningrate: 1}",
            "config.yaml:2:25: optimizer.learningrate: not a known key - did "
            "you mean 'learning_rate'? (got 1)",
        ),
        (
            "{type: Adam, learning_rate: fast}",
            "config.yaml:2:40: optimizer.learning_rate: must be a number (got "
            "'fast')",
        ),
        (
            "{type: Adam, clipnorm: 1, clipvalue: 2}",
            "config.yaml:2:12: optimizer: clipnorm and clipvalue are given: "
            "give one",
        ),
        (
            "{type: Adam, config: {clipnorm: 1, use_ema: true}}",
            "config.yaml:2:12: optimizer: config holds clipnorm, use_ema: "
            "write it beside config (use_ema: ema_momentum), not in it",
        ),
        (
            "{type: Adam, learning_rate: 1, schedule: {type: cosin}}",
            "config.yaml:2:60: optimizer.schedule.type: must be constant, "
            "cosine, polynomial, exponential, step, or",
        ),
        (
            "{type: Adam, learning_rate: 1, schedule: {type: cosine, stepz: "
            "3}}",
            "config.yaml:2:68: optimizer.schedule.stepz: not a known key - "
            "did you mean 'steps'? (got 3)",
        ),
        (
            "{type: Adam, learning_rate: 1, schedule: {type: cosine, power: "
            "3}}",
            "config.yaml:2:53: optimizer.schedule: power: of no use to type "
            "'cosine', which takes steps, final, warmup_steps, warmup_from",
        ),
        (
            "{type: Adam, schedule: {type: cosine}}",
            "config.yaml:2:12: optimizer: schedule changes learning_rate, "
            "which is missing: give it",
        ),
        (
            "{type: Adam, learning_rate: 1, schedule: {type: step, "
            "boundaries: [3], factors: []}}",
            "config.yaml:2:53: optimizer.schedule: step needs a factor for",
        ),
        (
            f"{{type: '{OWN}:number'}}",
            f"config.yaml:2:19: optimizer.type: {OWN}:number made a int, which "
            "is not a keras.optimizers.Optimizer.",
        ),
    ],
)
def test_mistakes_have_places(tmp_path, spec, wanted):
    assert problem(tmp_path, spec).startswith(wanted)


@pytest.mark.any_backend
def test_an_override_is_named_as_the_place(tmp_path):
    assert problem(
        tmp_path, "{type: Adam}", "optimizer.schedule.stepz=3"
    ).splitlines() == [
        "override 'optimizer.schedule.stepz=3': optimizer.schedule.type: is "
        "required, and missing",
        "override 'optimizer.schedule.stepz=3': optimizer.schedule.stepz: not "
        "a known key - did you mean 'steps'? (got 3)",
    ]


@pytest.mark.any_backend
def test_it_is_written_into_the_resolved_config(tmp_path):
    from legato.config import Experiment, dump_yaml, load_yaml, validate

    experiment = resolve(
        tmp_path,
        "{type: Adam, learning_rate: 1, schedule: {type: cosine}}",
        "optimizer.learning_rate=0.5",
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_yaml(experiment))
    again = validate(Experiment, load_yaml(path), source=str(path))
    assert again == experiment
    assert again.optimizer == OptimizerConfig(
        type="Adam",
        learning_rate=0.5,
        schedule=ScheduleConfig(type="cosine"),
    )
