"""Models of runs, as plain Keras reads them."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import legato
from legato import cli
from legato.checkpoint import find_checkpoint
from legato.errors import CheckpointError, ConfigError, RestoreError

X = np.linspace(-1, 2, 24, dtype="float32").reshape(12, 2)
Y = X[:, :1] * 2


class Small(legato.Task):
    def __init__(self, units: int = 3, several: bool = False):
        self.units, self.several = units, several

    def build_model(self):
        def model():
            return keras.Sequential(
                [
                    keras.Input((2,)),
                    keras.layers.Dense(self.units),
                    keras.layers.BatchNormalization(),
                    keras.layers.Dropout(0.5),
                    keras.layers.Dense(1),
                ]
            )

        return {"one": model(), "two": model()} if self.several else model()

    def build_optimizer(self):
        return keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5)

    def build_inputs(self, split):
        return legato.ArraySource((X, Y), 12, shuffle=False)

    def build_losses(self, labels, outputs, aux_losses=None):
        return keras.ops.mean((labels - outputs) ** 2)


CONFIG = """
task: tests.test_exporting:Small
trainer: {train_steps: 6, checkpoint_interval: 2, progress: none,
          best_metric: val_loss, keep_last: null}
run_dir: run
"""
PLAIN = """
import sys
import keras
import numpy as np
names = sys.argv[1:]
x = np.load("x.npy")
models = {name: keras.models.load_model(name) for name in names}
outputs = {name: model.predict(x, verbose=0).astype("float32")
           for name, model in models.items()}
assert "legato" not in sys.modules
np.savez("outputs.npz", **outputs)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exporting")
    (folder / "small.yaml").write_text(CONFIG)
    experiment = legato.Experiment(
        task="tests.test_exporting:Small",
        trainer={
            "train_steps": 6,
            "checkpoint_interval": 2,
            "progress": "none",
            "best_metric": "val_loss",
            "keep_last": None,
        },
    )
    legato.run_experiment(experiment, run_dir=folder / "run")
    return folder


@pytest.fixture
def folder(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def run(capsys, *arguments):
    status = cli.main([*arguments])
    out, err = capsys.readouterr()
    return status, out + err


def weights(path):
    return {
        name: array.tobytes()
        for name, array in find_checkpoint(path).arrays.items()
        if name.startswith("model/") and "seed" not in name
    }


def held(model):
    return [keras.ops.convert_to_numpy(w).tobytes() for w in model.weights]


@pytest.mark.any_backend
def test_plain_keras_in_another_process_has_the_same_outputs(folder, capsys):
    """As those that evaluation measures; at a step, with averages, in half."""
    asked = {
        "step.keras": ["--checkpoint", "4"],
        "average.keras": ["--checkpoint", "4", "--ema"],
        "half.keras": ["--checkpoint", "4", "trainer.precision=mixed_bfloat16"],
    }
    for name, flags in asked.items():
        status, said = run(
            capsys, "export", "small.yaml", "--output", name, *flags
        )
        assert status == 0, said
        assert said.startswith(f"{name}: step 4 of run/checkpoints/step_00000")
    np.save("x.npy", X)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN, *asked],
        check=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": ""},
    )
    with np.load("outputs.npz") as outputs:
        errors = {k: float(np.mean((v - Y) ** 2)) for k, v in outputs.items()}
    trainer = legato.Trainer(
        Small(), run_dir="run", config=legato.TrainerConfig(progress="none")
    )
    own = trainer.evaluate(checkpoint=4)["loss"]
    average = trainer.evaluate(checkpoint=4, weights="average")["loss"]
    assert errors["step.keras"] == pytest.approx(own, rel=1e-5)
    assert errors["average.keras"] == pytest.approx(average, rel=1e-5)
    assert errors["half.keras"] == pytest.approx(own, rel=0.05)
    assert abs(own - average) > 0.01 * own


def test_weights_go_into_a_model(folder, capsys):
    flags = ["--trust-run-dir", "--format", "weights"]
    assert run(capsys, "export", "run", *flags)[0] == 0
    model = Small().build_model()
    model.load_weights("run.weights.h5")
    saved = weights(folder / "run/final")
    assert sorted(held(model)) == sorted(saved.values())
    # A checkpoint by its own directory; the file is replaced if that is asked.
    status, said = run(capsys, "export", "run/best", *flags)
    assert (status, "run.weights.h5 is there already" in said) == (2, True)
    assert run(capsys, "export", "run/best", *flags, "--overwrite")[0] == 0
    model.load_weights("run.weights.h5")
    assert sorted(held(model)) == sorted(weights(folder / "run/best").values())
    assert not [p for p in os.listdir() if p.startswith(".")]


def test_it_asks_for_trust(folder, capsys):
    status, said = run(capsys, "export", "run/best")
    assert status == 2
    assert "to export it, the code" in said and "--trust-run-dir" in said
    assert "legato export CONFIG --run-dir run" in said
    status, said = run(capsys, "export", "run/best", "--checkpoint", "4")
    assert (status, "is a checkpoint itself" in said) == (2, True)
    status, said = run(capsys, "export", "small.yaml", "--checkpoint", "99")
    assert (status, "no checkpoint of step 99" in said) == (1, True)
    flags = ["--output", "x.h5", "--format", "weights"]
    status, said = run(capsys, "export", "small.yaml", *flags)
    assert (status, "must end in .weights.h5" in said) == (2, True)


def test_in_python_the_model_keeps_its_own(folder, tmp_path):
    model = Small().build_model()
    model.compile("adam", "mse", metrics=["mae"])
    model.train_on_batch(X, Y)
    before, optimizer = held(model), model.optimizer
    path = tmp_path / "a.weights.h5"
    assert legato.export(model, path, checkpoint="run", which=2) == [path]
    assert (held(model), model.optimizer) == (before, optimizer)
    assert model.compiled and model.evaluate(X, Y, verbose=0)
    other = Small().build_model()
    other.load_weights(path)
    saved = weights(folder / "run/checkpoints/step_00000002")
    assert sorted(held(other)) == sorted(saved.values())
    legato.export(model, tmp_path / "b.weights.h5")
    other.load_weights(tmp_path / "b.weights.h5")
    assert held(other) == before


def test_several_models(folder, tmp_path):
    models = Small(several=True).build_model()
    files = legato.export(models, tmp_path / "gan.weights.h5")
    assert [file.name for file in files] == [
        "gan.one.weights.h5",
        "gan.two.weights.h5",
    ]
    other = Small().build_model()
    other.load_weights(files[1])
    assert held(other) == held(models["two"])


@pytest.mark.any_backend
def test_what_cannot_be_exported(folder, tmp_path):
    model = Small().build_model()
    path = tmp_path / "x.keras"
    for error, match, arguments, given in (
        (ConfigError, "must be a keras.Model", (5, path), {}),
        (ConfigError, "must end in .keras or", (model, "x.h5"), {}),
        (ConfigError, "must end in .keras or", (model, ".keras"), {}),
        (ConfigError, "is not built", (keras.Sequential(), path), {}),
        (ConfigError, "must be", (model, path), {"weights": "ema"}),
        (
            ConfigError,
            "no optimizer keeps",
            (model, path),
            {"weights": "average"},
        ),
        (
            CheckpointError,
            "step 99",
            (model, path),
            {"checkpoint": "run", "which": 99},
        ),
        (
            RestoreError,
            r"1_dense/kernel: \[2, 3\] in the checkpoint, \[2, 4\] in",
            (Small(units=4).build_model(), path),
            {"checkpoint": "run"},
        ),
    ):
        with pytest.raises(error, match=match):
            legato.export(*arguments, **given)
    assert not list(tmp_path.iterdir())
