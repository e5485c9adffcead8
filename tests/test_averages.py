"""Averages of the weights: measured beside the weights, not in their place."""

import json

import keras
import numpy as np
import pytest

import legato
from legato import cli
from legato.checkpoint import find_checkpoint
from legato.config import TrainerConfig
from legato.errors import CheckpointError, ConfigError
from legato.restoring import averages, read_averages
from legato.state import average_paths, variable_paths

X = np.linspace(-1, 2, 16, dtype="float32").reshape(8, 2)
Y = X[:, :1] * 2


class Small(legato.Task):
    def __init__(self, use_ema: bool = True):
        self.use_ema = use_ema

    def build_model(self):
        return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])

    def build_optimizer(self):
        return keras.optimizers.SGD(0.1, use_ema=self.use_ema, ema_momentum=0.5)

    def build_inputs(self, split):
        return legato.ArraySource((X, Y), 4, shuffle=split == "train")

    def build_losses(self, labels, outputs, aux_losses=None):
        return keras.ops.mean((labels - outputs) ** 2)


def make(run_dir, task=None, callbacks=(), **changes):
    config = {"epochs": 3, "checkpoint_interval": 2, "keep_last": None}
    config |= {"progress": "none"} | changes
    return legato.Trainer(
        task or Small(),
        run_dir=run_dir,
        config=TrainerConfig(**config),
        callbacks=callbacks,
    )


def loss_of(arrays, prefix=""):
    kernel, bias = (
        arrays[f"{prefix}model/1_dense/{name}"] for name in ("kernel", "bias")
    )
    return float(np.mean((Y - (X @ kernel + bias)) ** 2))


def validated(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["loss"] for r in records if r["kind"] == "validation"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("averages") / "run"
    make(run_dir).train()
    return run_dir


@pytest.mark.parametrize("step", [2, 4])
def test_a_checkpoint_is_measured_with_its_averages(trained, step):
    trainer = make(trained)
    arrays = find_checkpoint(trained, step).arrays
    own = trainer.evaluate(checkpoint=step)["loss"]
    found = trainer.evaluate(checkpoint=step, weights="average")["loss"]
    assert own == pytest.approx(loss_of(arrays), rel=1e-5)
    assert found == pytest.approx(
        loss_of(arrays, "optimizer/average/"), rel=1e-5
    )
    assert abs(found - own) > 1e-3
    # The model holds its own afterwards, bit for bit.
    kernel = keras.ops.convert_to_numpy(trainer.model.layers[0].kernel)
    assert kernel.tobytes() == arrays["model/1_dense/kernel"].tobytes()


def test_each_checkpoint_is(trained):
    results = make(trained).evaluate_continuously(weights="average")
    for step in (2, 4):
        arrays = find_checkpoint(trained, step).arrays
        wanted = loss_of(arrays, "optimizer/average/")
        assert results[step]["loss"] == pytest.approx(wanted, rel=1e-5)
    # As in Keras, the run ends with the averages as its weights.
    assert results["final"] == make(trained).evaluate()


class Fails(keras.callbacks.Callback):
    """In the second validation, while the model holds the averages."""

    tests = 0

    def on_test_end(self, logs=None):
        self.tests += 1
        if self.tests == 2:
            raise RuntimeError("gone")


def test_training_validates_them_and_does_not_see_them(trained, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"validation_weights": "average"}
    trainer = make(whole, **options)
    trainer.train()
    for step, loss in validated(whole).items():
        arrays = find_checkpoint(whole, step).arrays
        # No bit of training is another.
        assert all(
            array.tobytes() == arrays[name].tobytes()
            for name, array in find_checkpoint(trained, step).arrays.items()
        )
        wanted = make(whole).evaluate(checkpoint=step, weights="average")
        assert loss == wanted["loss"]
        assert loss != validated(trained)[step]
    failing = make(killed, callbacks=[Fails()], **options)
    with pytest.raises(RuntimeError, match="gone"):
        failing.train()
    arrays = find_checkpoint(whole, 4).arrays
    kernel = keras.ops.convert_to_numpy(failing.model.layers[0].kernel)
    assert kernel.tobytes() == arrays["model/1_dense/kernel"].tobytes()
    make(killed, **options).train()
    for name in ("metrics.jsonl", "final/state.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    # In the process that trained, too: the averages are its weights now.
    assert trainer.evaluate(weights="average") == trainer.evaluate()


def test_what_has_none(tmp_path, trained):
    plain = make(tmp_path / "run", Small(use_ema=False), epochs=1)
    plain.train()
    with pytest.raises(ConfigError, match="no optimizer keeps averages"):
        plain.evaluate(weights="average")
    with pytest.raises(CheckpointError, match="holds no averages"):
        plain.evaluate(checkpoint="latest", weights="average")
    with pytest.raises(ConfigError, match=r'weights=\'ema\': it must be "mo'):
        make(trained).evaluate(weights="ema")
    with pytest.raises(ConfigError, match=r"validation_weights=.*no optimizer"):
        make(tmp_path / "no", Small(False), validation_weights="average")


@pytest.mark.any_backend
def test_where_averages_are():
    model = Small().build_model()
    sgd = keras.optimizers.SGD(use_ema=True)
    optimizers = {"a": keras.optimizers.LossScaleOptimizer(sgd)}
    optimizers["a"].build(model.trainable_variables)
    paths = variable_paths({"model": model, "optimizer": optimizers})
    start = "optimizer/a/inner_optimizer/average/"
    assert average_paths(paths) == {
        f"model/1_dense/{name}": f"{start}model/1_dense/{name}"
        for name in ("kernel", "bias")
    }


def test_before_the_first_update_they_are_nothing_yet(tmp_path):
    """Also where the loss scale puts that off, at a later step."""

    class Scaled(Small):
        def build_optimizer(self):
            return keras.optimizers.LossScaleOptimizer(
                super().build_optimizer(), initial_scale=1e38
            )

        def build_losses(self, *arguments):
            return 1e4 * super().build_losses(*arguments)

    trainer = make(tmp_path / "run", Scaled(), epochs=1, nonfinite_loss="warn")
    first = {path: w.numpy() for path, w in paths_of(trainer).items()}
    assert read_averages(trainer.model, built(trainer)) == {}
    trainer.train()
    checkpoint = find_checkpoint(tmp_path / "run", 2)
    assert checkpoint.arrays["optimizer/inner_optimizer/iteration"] == 0
    assert averages(checkpoint) == {}
    found = trainer.evaluate(checkpoint=2, weights="average")
    assert found["loss"] == pytest.approx(1e4 * loss_of(first), rel=1e-5)


def paths_of(trainer):
    return variable_paths({"model": trainer.model})


def built(trainer):
    trainer.optimizer.build(trainer.model.trainable_variables)
    trainer.optimizer.built = True
    return trainer.optimizer


def test_on_the_command_line(trained, tmp_path, capsys, monkeypatch):
    config = tmp_path / "small.yaml"
    config.write_text("task: tests.test_averages:Small\n")
    flags = ["--run-dir", str(trained), "--checkpoint", "4", "--json"]
    assert cli.main(["evaluate", str(config), *flags, "--ema"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = make(trained).evaluate(checkpoint=4, weights="average")
    assert (found["results"], found["step"]) == (wanted, 4)


def test_evaluate_takes_averages_too(tmp_path):
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    network.compile("sgd", "mse")
    with pytest.raises(ConfigError, match="no optimizer keeps averages"):
        legato.evaluate(network, (X, Y), weights="average")
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
    network.compile(optimizer, "mse")
    legato.fit(
        network,
        X,
        Y,
        batch_size=4,
        epochs=3,
        run_dir=tmp_path,
        checkpoint_interval=2,
        keep_last=None,
        verbose=0,
    )
    before = [w.tobytes() for w in network.get_weights()]
    arrays = find_checkpoint(tmp_path, 4).arrays
    found = legato.evaluate(
        network, (X, Y), checkpoint=tmp_path, which=4, weights="average"
    )
    assert found["loss"] == pytest.approx(
        loss_of(arrays, "optimizer/average/"), rel=1e-5
    )
    own = legato.evaluate(network, (X, Y), checkpoint=tmp_path, which=4)
    assert own["loss"] == pytest.approx(loss_of(arrays), rel=1e-5)
    assert [w.tobytes() for w in network.get_weights()] == before
    # Of the model as it is: at the run's end it holds its averages.
    now = legato.evaluate(network, (X, Y), weights="average")
    assert now["loss"] == pytest.approx(
        legato.evaluate(network, (X, Y))["loss"], rel=1e-6
    )
    with pytest.raises(ConfigError, match="weights='mean'"):
        legato.evaluate(network, (X, Y), weights="mean")
