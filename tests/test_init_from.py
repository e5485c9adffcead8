"""Runs that begin with the weights of others."""

import json
import shutil
import zipfile

import h5py
import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import legato
from legato import initial
from legato.checkpoint import find_checkpoint
from legato.config import InitConfig, TrainerConfig
from legato.errors import CheckpointError, ConfigError, RestoreError
from legato.state import variable_paths

N = 12
X = np.linspace(-1, 2, 2 * N, dtype="float32").reshape(N, 2)


class Small(legato.Task):
    def __init__(self, outputs=1, built=True):
        self.outputs, self.built = outputs, built

    def build_model(self):
        layers = [
            keras.layers.Dense(3),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(self.outputs),
        ]
        return keras.Sequential([keras.Input((2,))] * self.built + layers)

    def build_optimizer(self):
        return keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5)

    def build_inputs(self, split):
        if split == "validation":
            return None
        return legato.ArraySource((X, X[:, :1]), 4)

    def build_losses(self, labels, outputs, aux_losses=None):
        return keras.ops.mean((labels - outputs) ** 2)


class Pair(Small):
    def build_model(self):
        return {"one": super().build_model(), "two": super().build_model()}

    def train_step(self, inputs, model, optimizer, metrics=None):
        return super().train_step(inputs, model["one"], optimizer, metrics)


def make(run_dir, init_from=None, task=None, callbacks=(), **changes):
    config = {"train_steps": 6, "checkpoint_interval": 2, "progress": "none"}
    config |= {"keep_last": None, "init_from": init_from, "seed": 1}
    return legato.Trainer(
        task or Small(),
        run_dir=run_dir,
        config=TrainerConfig(**config | changes),
        callbacks=callbacks,
    )


def begun(run_dir, init_from, **given):
    """The arrays that a run begins with; of one step."""
    make(run_dir, init_from, train_steps=1, **given).train()
    return find_checkpoint(run_dir, 0 if init_from else None).arrays


def initialized(init_from, task=None):
    """The arrays of a model that was given these weights; no run."""
    model = (task or Small()).build_model()
    initial.initialize(model, init_from, print)
    return {
        path: keras.ops.convert_to_numpy(variable)
        for path, variable in variable_paths({"model": model}).items()
    }


def weights(arrays):
    return {
        name: array.tobytes()
        for name, array in arrays.items()
        if name.startswith("model/") and "seed" not in name
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run, and its last weights in each kind of file."""
    folder = tmp_path_factory.mktemp("source")
    trainer = make(folder / "run", seed=5)
    trainer.train()
    trainer.model.save_weights(folder / "model.weights.h5")
    # What Keras writes is of this form, and takes it long.
    with zipfile.ZipFile(folder / "model.keras", "w") as archive:
        archive.write(folder / "model.weights.h5", "model.weights.h5")
    arrays = find_checkpoint(folder / "run").arrays
    save_file(arrays, folder / "state.safetensors")
    bare = {k[6:]: v for k, v in arrays.items() if k in weights(arrays)}
    save_file(bare, folder / "bare.safetensors")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "run",
        "run/final",
        "model.keras",
        "model.weights.h5",
        "state.safetensors",
        "bare.safetensors",
    ],
)
def test_each_kind_of_source(source, tmp_path, name):
    wanted = weights(find_checkpoint(source / "run").arrays)
    found = initialized(InitConfig(path=str(source / name)))
    assert len(wanted) == 8
    assert weights(found) == wanted


def test_all_else_is_that_of_a_run_of_its_own(source, tmp_path):
    seed = "model/3_dropout/seed_generator_state"
    found = begun(tmp_path / "run", str(source / "run"))
    assert not np.any(found["optimizer/iteration"])
    begun(tmp_path / "plain", None)
    ended = [
        find_checkpoint(tmp_path / run, 1).arrays[seed].tobytes()
        for run in ("run", "plain")
    ]
    assert ended[0] == ended[1]


def test_any_checkpoint_and_averages(source):
    config = InitConfig(path=str(source / "run"), checkpoint=4)
    saved = find_checkpoint(source / "run", 4).arrays
    assert weights(initialized(config)) == weights(saved)
    found = initialized(config.replace(weights="average"))
    kernel = "model/1_dense/kernel"
    assert (
        found[kernel].tobytes()
        == saved[f"optimizer/average/{kernel}"].tobytes()
    )
    assert found[kernel].tobytes() != saved[kernel].tobytes()
    mean = "model/2_batch_normalization/moving_mean"
    assert found[mean].tobytes() == saved[mean].tobytes()


def test_a_model_that_its_first_call_builds(source, tmp_path):
    wanted = weights(find_checkpoint(source / "run").arrays)
    found = begun(
        tmp_path / "run", str(source / "run"), task=Small(built=False)
    )
    assert weights(found) == wanted


def test_several_models(tmp_path, source):
    make(tmp_path / "one", task=Pair(), seed=3).train()
    wanted = weights(find_checkpoint(tmp_path / "one").arrays)
    assert len(wanted) == 16
    assert (
        weights(initialized(InitConfig(path=str(tmp_path / "one")), Pair()))
        == wanted
    )
    with pytest.raises(ConfigError, match=r"has several \(one, two\)"):
        initialized(InitConfig(path=str(source / "model.keras")), Pair())


class Vanishes(keras.callbacks.Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise RuntimeError("gone")


def test_it_is_read_once(source, tmp_path):
    """A killed run goes on exactly, though its source is gone."""
    shutil.copytree(source / "run", tmp_path / "source")
    path = str(tmp_path / "source")
    whole = make(tmp_path / "whole", path)
    whole.train()
    with pytest.raises(RuntimeError, match="gone"):
        make(tmp_path / "killed", path, callbacks=[Vanishes(1)]).train()
    shutil.rmtree(path)
    resumed = make(tmp_path / "killed", path)
    resumed.train()
    for step in (2, 4, 6):
        one, other = (
            find_checkpoint(tmp_path / run, step) for run in ("whole", "killed")
        )
        assert one.arrays.keys() == other.arrays.keys()
        assert all(
            one.arrays[name].tobytes() == other.arrays[name].tobytes()
            for name in one.arrays
        )
        origin = other.host["identity"]["init_from"]
        assert origin == one.host["identity"]["init_from"]
        assert origin["step"] == 6
    logs = [
        (tmp_path / run / "metrics.jsonl").read_bytes()
        for run in ("whole", "killed")
    ]
    assert logs[0] == logs[1]
    with pytest.raises(legato.errors.RunDirError, match="source"):
        make(tmp_path / "new", path).train()


def test_it_holds_before_any_step(source, tmp_path):
    """Killed at once, with a checkpoint of step 0 alone."""
    path = str(source / "run")
    with pytest.raises(RuntimeError, match="gone"):
        make(tmp_path / "run", path, callbacks=[Vanishes(0)]).train()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [
        "step_00000000"
    ]
    make(tmp_path / "run", "gone", exact="off").train()
    make(tmp_path / "whole", path).train()
    one, other = (
        weights(find_checkpoint(tmp_path / run).arrays)
        for run in ("run", "whole")
    )
    assert one == other


def test_a_new_head(source, tmp_path, capsys):
    path, task = str(source / "run"), Small(outputs=4)
    with pytest.raises(RestoreError) as caught:
        initialized(InitConfig(path=path), task)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == [
        "  model/4_dense/kernel: [3, 1] in the source, [3, 4] in the model",
        "  model/4_dense/bias: [1] in the source, [4] in the model",
    ]
    assert 'init_from.exclude, such as ["model/4_dense/*"].' in lines[-1]
    config = InitConfig(path=path, exclude=["model/4_dense/*"])
    found = begun(tmp_path / "run", config, task=task, progress="plain")
    saved = weights(find_checkpoint(source / "run").arrays)
    taken = {k: v for k, v in weights(found).items() if "4_dense" not in k}
    assert len(taken) == 6
    assert taken == {k: saved[k] for k in taken}
    report = capsys.readouterr().err
    assert f"Begun with the weights in {path}:" in report
    assert "model/4_dense/kernel ignored (in exclude)" in report.replace(
        "\n", " "
    )
    config = InitConfig(path=path, include=["*/kernel"], exclude=["*/4_*"])
    found = initialized(config, task)
    assert np.all(found["model/2_batch_normalization/gamma"] == 1)
    kernel = "model/1_dense/kernel"
    assert found[kernel].tobytes() == saved[kernel]


@pytest.mark.any_backend
def test_what_does_not_fit(source, tmp_path):
    def fails(error, match, name, **given):
        config = InitConfig(path=str(name), **given)
        with pytest.raises(error, match=match):
            initialized(config)

    arrays = load_file(source / "bare.safetensors")
    del arrays["1_dense/bias"]
    arrays["extra"] = arrays["4_dense/bias"]
    arrays["4_dense/bias"] = np.zeros(1, "int32")
    save_file(arrays, tmp_path / "few.safetensors")
    few = tmp_path / "few.safetensors"
    fails(RestoreError, "1_dense/bias: in the model only\n", few)
    fails(RestoreError, "4_dense/bias: int32 in the source, float32", few)
    fails(RestoreError, "none is taken; the source h", few, include=["x"])
    fails(ConfigError, r"not there\.keras cannot be read", "not there.keras")
    (tmp_path / "no.keras").write_bytes(b"PK")
    fails(ConfigError, "is not what its name says", tmp_path / "no.keras")
    (tmp_path / "no.safetensors").write_bytes(b"\xff" * 99)
    fails(ConfigError, "not a safetensors file", tmp_path / "no.safetensors")
    (tmp_path / "no.npz").write_bytes(b"PK")
    fails(ConfigError, "is of no known kind", tmp_path / "no.npz")
    fails(
        CheckpointError, "no checkpoint of step 3", source / "run", checkpoint=3
    )
    with pytest.raises(
        ConfigError, match=r"init_from\.weights: must be one of"
    ):
        TrainerConfig(init_from={"path": "x", "weights": "ema"})
    with pytest.raises(ConfigError, match=r"init_from\.pth: not a known"):
        TrainerConfig(init_from={"pth": "x"})
    own = source / "run/final"
    fails(ConfigError, "is a checkpoint's own directory", own, checkpoint=3)
    assert TrainerConfig(init_from="x").init_from == InitConfig(path="x")


@pytest.mark.any_backend
def test_no_code_of_a_file_is_run_and_no_link_followed(source, tmp_path):
    """Of a .keras file the config, which may name code, is not looked at."""
    evil = {"module": "os", "class_name": "system", "config": "touch pwned"}
    shutil.copy(source / "model.keras", tmp_path / "evil.keras")
    with zipfile.ZipFile(tmp_path / "evil.keras", "a") as archive:
        archive.writestr("config.json", json.dumps(evil))
    found = initialized(InitConfig(path=str(tmp_path / "evil.keras")))
    assert weights(found) == weights(find_checkpoint(source / "run").arrays)
    for kind in ("external", "virtual"):
        path = tmp_path / f"{kind}.weights.h5"
        shutil.copy(source / "model.weights.h5", path)
        with h5py.File(path, "r+") as file:
            group = file["layers/dense/vars"]
            del group["0"]
            if kind == "external":
                group["0"] = h5py.ExternalLink(
                    str(source / "model.weights.h5"), "layers/dense/vars/0"
                )
            else:
                layout = h5py.VirtualLayout((2, 3), "f4")
                layout[:] = h5py.VirtualSource(
                    str(source / "model.weights.h5"),
                    "layers/dense/vars/0",
                    (2, 3),
                )
                group.create_virtual_dataset("0", layout)
        with pytest.raises((ConfigError, RestoreError)) as caught:
            initialized(InitConfig(path=str(path)))
        assert "1_dense/kernel: in the model only" in str(
            caught.value
        ) or "links to another file" in str(caught.value)


@pytest.mark.any_backend
def test_damaged_safetensors_are_refused():
    from legato.errors import DamagedError
    from legato.storage import read_safetensors

    def file(header, body=b"\0" * 8):
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + body

    def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    good = read_safetensors(file({"x": entry(), "__metadata__": {}}), name="f")
    assert good["x"].tolist() == [0, 0]
    for bad in (
        b"",
        (1 << 60).to_bytes(8, "little") + b"{}",
        file([]),
        file({"x": 1}),
        file({"x": entry("F33")}),
        file({"x": entry(shape=(-2,))}),
        file({"x": entry(shape=(True, 2))}),
        file({"x": entry(shape=(3,))}),
        file({"x": entry(offsets=(0, 9))}),
        file({"x": entry(shape=(3,), offsets=(0, 12))}),
        file({"x": entry(offsets=(8, 0))}),
        file({"x": entry(offsets=(-8, 0))}),
    ):
        with pytest.raises(DamagedError):
            read_safetensors(bad, name="f")
