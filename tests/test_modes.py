"""The modes of `run_experiment`, and the best checkpoint by any metric."""

import keras
import numpy as np
import pytest

import legato
from legato.checkpoint import find_checkpoint
from legato.config import TrainerConfig
from legato.recorder import Best

X = np.linspace(-1, 2, 16, dtype="float32").reshape(8, 2)


class Grouped(legato.HostMetric):
    """Less is better, it says; nobody knows."""

    def reset_state(self):
        self.errors = []

    def update_state(self, labels, outputs):
        self.errors.append(np.abs(labels - outputs).mean())

    def result(self):
        return {"coco": {"AP": float(np.mean(self.errors))}}


class Small(legato.Task):
    def build_model(self):
        return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])

    def build_optimizer(self):
        return keras.optimizers.SGD(0.05)

    def build_inputs(self, split):
        return legato.ArraySource((X, X[:, :1]), 4)

    def build_losses(self, labels, outputs, aux_losses=None):
        return keras.ops.mean((labels - outputs) ** 2)

    def build_metrics(self, training):
        return [] if training else [Grouped(name="grouped")]


def experiment(**changes):
    config = {"epochs": 3, "progress": "none"} | changes
    return legato.Experiment(
        task="tests.test_modes:Small", trainer=TrainerConfig(**config)
    )


def test_train_and_post_eval(tmp_path):
    mode = "train_and_post_eval"
    history, results = legato.run_experiment(
        experiment(), mode, run_dir=tmp_path / "run"
    )
    assert history.history.keys() == {"loss"}
    assert results.keys() == {"loss", "coco"}
    # As if it had been killed before it was measured.
    again, same = legato.run_experiment(
        experiment(), mode, run_dir=tmp_path / "run"
    )
    assert (again.history, same) == (history.history, results)
    measured = legato.run_experiment(
        experiment(), "eval", run_dir=tmp_path / "run"
    )
    assert measured == results


@pytest.mark.parametrize("name", ["val_coco/AP", "val_coco.AP"])
def test_the_best_by_a_metric_in_a_group(tmp_path, name):
    found = experiment(best_metric=name, best_mode="max", keep_last=None)
    legato.run_experiment(found, run_dir=tmp_path / "run")
    best = find_checkpoint(tmp_path / "run", "best")
    assert best.step == 2  # the error falls from there on
    assert best.host["best"]["metric"] == name


@pytest.mark.any_backend
def test_a_name_with_a_dot_is_found_as_it_is():
    best = Best(TrainerConfig(best_metric="val_a.b", best_mode="min"), {})
    best.consider(1, {"val_a/b": 3.0})
    assert (best.step, best.value) == (1, 3.0)
    best.consider(2, {"val_a.b": 2.0, "val_a/b": 1.0})
    assert (best.step, best.value) == (2, 2.0)
