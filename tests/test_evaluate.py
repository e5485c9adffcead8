"""`Trainer.evaluate`, and `evaluate_continuously` beside a writer."""

import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time

import keras
import pytest
from safetensors.numpy import load_file

import legato
from legato import storage
from legato.checkpoint import find_checkpoint
from legato.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    LegatoWarning,
    RestoreError,
    Stopped,
)
from tests import evaluated_by_hand
from tests.contracts.scenarios import Classifier, Measured

STEPS = (4, 5, 8, 10)
PLACES = {
    **{step: f"checkpoints/step_{step:08d}" for step in STEPS},
    "best": "best",
    "latest": "final",
    None: "final",
}


class Halves(keras.callbacks.Callback):
    """So that final/ differs from the last checkpoint."""

    def on_train_end(self, logs=None):
        self.model.set_weights([w / 2 for w in self.model.get_weights()])


def make(run_dir, task=None, callbacks=(), **changes):
    config = {
        "epochs": 2,
        "checkpoint_interval": 4,
        "keep_last": None,
        "progress": "none",
        "best_metric": "val_loss",
        "best_mode": "max",  # so that it is not the last
        **changes,
    }
    return legato.Trainer(
        task or Classifier(),
        run_dir=run_dir,
        config=legato.TrainerConfig(**config),
        callbacks=callbacks,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    make(run_dir, callbacks=[Halves()]).train()
    return run_dir


@pytest.fixture
def run_dir(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def names_and_times(path):
    return {each: each.lstat().st_mtime_ns for each in path.rglob("*")}


def by_hand(place, *names):
    results = evaluated_by_hand.classifier(place)
    return {name: results[name] for name in names or ("loss", "accuracy")}


def top2(name="top2"):
    return keras.metrics.SparseTopKCategoricalAccuracy(k=2, name=name)


def spread(labels, outputs):
    del labels
    return keras.ops.max(outputs, axis=-1) - keras.ops.min(outputs, axis=-1)


@pytest.mark.parametrize("which", PLACES)
def test_any_checkpoint_is_measured_as_by_hand(trained, which):
    trainer = make(trained)
    logs = trainer.evaluate(checkpoint=which)
    place = trained / PLACES[which]
    assert logs == pytest.approx(by_hand(place), rel=1e-5)
    # Afterwards the model holds its weights, bit for bit.
    arrays = load_file(place / "state.safetensors")
    saved = [arrays[name] for name in sorted(arrays) if name[:6] == "model/"]
    held = {w.tobytes() for w in trainer.model.get_weights()}
    assert len(held) == 4
    assert held == {each.tobytes() for each in saved}


def test_the_results_are_those_of_the_runs_own_validation(trained):
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    (record,) = [
        r for r in records if r["kind"] == "validation" and r["step"] == 10
    ]
    logs = make(trained).evaluate(checkpoint=10)
    assert logs == {name: record[name] for name in ("loss", "accuracy")}


def test_metrics_that_training_never_computed(trained):
    trainer = make(trained)
    metrics = [top2(), keras.metrics.MeanMetricWrapper(spread, name="spread")]
    for which in (4, "best", "latest"):
        logs = trainer.evaluate(checkpoint=which, metrics=metrics)
        place = trained / PLACES[which]
        expected = by_hand(place, "loss", "top2", "spread")
        assert logs == pytest.approx(expected, rel=1e-5)
        assert float(metrics[0].result()) == pytest.approx(expected["top2"])
    # The task's own are as they were.
    assert trainer.evaluate(checkpoint=4).keys() == {"loss", "accuracy"}
    assert trainer.evaluate(checkpoint=4, metrics=[]).keys() == {"loss"}


def test_a_process_that_trained_measures_its_model(tmp_path):
    whole = make(tmp_path / "whole", epochs=3)
    whole.train()
    trainer = make(tmp_path / "run", epochs=3)
    trainer.train()
    ended = by_hand(tmp_path / "run/final")
    assert trainer.evaluate() == pytest.approx(ended, rel=1e-5)
    first = by_hand(tmp_path / "run/checkpoints/step_00000004")
    assert trainer.evaluate(checkpoint=4) == pytest.approx(first, rel=1e-5)
    assert first != pytest.approx(ended, rel=1e-2)
    # As the docstring says: the model now holds that one.
    assert trainer.evaluate() == pytest.approx(first, rel=1e-5)
    assert trainer.evaluate(checkpoint="latest") == pytest.approx(
        ended, rel=1e-5
    )


class Fails(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise RuntimeError("of the user")


@pytest.mark.parametrize(
    ("ends", "error", "step"),
    [
        ({"callbacks": [Fails()]}, RuntimeError, 6),
        ({"max_time": "0.01s"}, Stopped, None),
    ],
)
def test_what_ended_early_is_measured_at_its_step(tmp_path, ends, error, step):
    make(tmp_path / "run", Measured(), epochs=1, best_metric=None).train()
    settings = {"epochs": 30, "best_metric": None, **ends}
    trainer = make(tmp_path / "run", Measured(), **settings)
    with pytest.raises(error) as caught:
        trainer.train()
    if step is None:
        step = int(re.search(r"at step (\d+) of", str(caught.value))[1])
    assert step >= 5
    assert trainer.evaluate()["errors"]["at"] == step


def test_evaluating_in_between_changes_no_bit_of_the_run(tmp_path):
    make(tmp_path / "whole", epochs=2).train()
    make(tmp_path / "whole", epochs=4).train()
    make(tmp_path / "run", epochs=2).train()
    trainer = make(tmp_path / "run", epochs=4)
    trainer.evaluate(checkpoint=4, metrics=[top2()])
    trainer.evaluate_continuously()
    trainer.train()
    for place in ("checkpoints/step_00000020", "final"):
        name = f"{place}/state.safetensors"
        whole = (tmp_path / "whole" / name).read_bytes()
        assert whole == (tmp_path / "run" / name).read_bytes()
    logs = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert logs == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_it_works_beside_the_lock_and_changes_nothing(run_dir):
    spoil(run_dir, 10)
    shutil.rmtree(run_dir / "final")
    with storage.RunLock(run_dir):
        before = names_and_times(run_dir)
        trainer = make(run_dir)
        for _ in range(2):
            with pytest.warns(LegatoWarning, match="step_00000010.*step 8 is"):
                logs = trainer.evaluate()
            assert logs == pytest.approx(by_hand(run_dir / PLACES[8]), rel=1e-5)
        with pytest.warns(LegatoWarning, match="step_00000010.*left out"):
            results = trainer.evaluate_continuously(timeout=0)
        assert list(results) == [4, 5, 8]
        assert names_and_times(run_dir) == before


def spoil(run_dir, step):
    path = run_dir / PLACES[step] / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()  # best/ may share it
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        ({"checkpoint": 7}, CheckpointError, "no checkpoint of step 7. There "),
        ({"checkpoint": 7}, CheckpointError, "of the steps: 4, 5, 8"),
        ({"checkpoint": 8}, CheckpointError, "step_00000008/state.safetensors"),
        ({"checkpoint": "bset"}, ConfigError, "checkpoint='bset': it must be"),
        ({"checkpoint": 1.5}, ConfigError, "checkpoint=1.5: it must be"),
        (
            {"metrics": "accuracy"},
            ConfigError,
            "'accuracy' is neither a",
        ),
        (
            {"metrics": ["mse"]},
            ConfigError,
            "'mse' is neither a keras.",
        ),
        (
            {"metrics": [top2, 5]},
            ConfigError,
            "is neither a keras.",
        ),
    ],
)
def test_wrong_arguments(run_dir, arguments, error, expected):
    spoil(run_dir, 8)
    with pytest.raises(error) as caught:
        make(run_dir).evaluate(**arguments)
    assert expected in str(caught.value)


def test_metrics_need_names_of_their_own(trained):
    for metrics in ([top2(), top2()], [keras.metrics.Mean(name="loss")]):
        with pytest.raises(ConfigError, match="its own `name`"):
            make(trained).evaluate(metrics=metrics)


def test_a_model_that_does_not_fit_keeps_its_weights(trained):
    class Wider(Classifier):
        def build_model(self):
            return keras.Sequential(
                [
                    keras.layers.Input((8,)),
                    keras.layers.Dense(17, activation="tanh"),
                    keras.layers.Dense(3),
                ]
            )

    class Deeper(Classifier):
        def build_model(self):
            return keras.Sequential(
                [
                    keras.layers.Input((8,)),
                    *super().build_model().layers,
                    keras.layers.Dense(3),
                ]
            )

    class Flatter(Classifier):
        def build_model(self):
            return keras.Sequential(
                [keras.layers.Input((8,)), keras.layers.Dense(3)]
            )

    for task in (Wider(), Deeper(), Flatter()):
        trainer = make(trained, task)
        before = [w.tobytes() for w in trainer.model.get_weights()]
        with pytest.raises(RestoreError, match="does not fit"):
            trainer.evaluate(checkpoint=4)
        assert [w.tobytes() for w in trainer.model.get_weights()] == before


def test_no_run_no_checkpoint_no_validation(tmp_path):
    with pytest.warns(LegatoWarning, match="as build_model made it"):
        make(tmp_path / "none").evaluate()
    assert not (tmp_path / "none").exists()
    for which in ("latest", "best", 3):
        with pytest.raises(legato.errors.RunDirError, match="no such direct"):
            make(tmp_path / "none").evaluate(checkpoint=which)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/run.json").write_text('{"run_id": "x"}')
    with pytest.warns(LegatoWarning, match="as build_model made it"):
        make(tmp_path / "begun").evaluate()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        make(tmp_path / "begun").evaluate(checkpoint="latest")

    class NoValidation(Classifier):
        def build_inputs(self, split):
            return super().build_inputs(split) if split == "train" else None

    for call in ("evaluate", "evaluate_continuously"):
        with pytest.raises(ConfigError, match="nothing to evaluate on"):
            getattr(make(tmp_path / "none", NoValidation()), call)()


class Scaled(Classifier):
    """Validation uses a variable of the task, and training changes it."""

    def __init__(self, more=False):
        self.scale = keras.Variable(1.0, name="scale")
        if more:
            self.offset = keras.Variable(0.0, name="offset")
        self.more = more

    def train_step(self, inputs, model, optimizer, metrics=None):
        self.scale.assign(self.scale + 0.25)
        return super().train_step(inputs, model, optimizer, metrics)

    def inference_step(self, inputs, model):
        outputs = model(inputs, training=False) * self.scale
        return outputs + self.offset if self.more else outputs


def test_a_variable_that_validation_uses_is_the_checkpoints(tmp_path):
    there = make(tmp_path, Scaled())
    there.train()
    trainer = make(tmp_path, Scaled())
    assert trainer.evaluate() == there.evaluate()
    trainer.evaluate(checkpoint=4)
    assert float(trainer.task.scale.numpy()) == 2.0
    newer = make(tmp_path, Scaled(more=True))
    with pytest.warns(LegatoWarning, match="task/offset"):
        logs = newer.evaluate()
    assert logs == pytest.approx(there.evaluate(), rel=1e-6)


# Continuously.


def test_each_checkpoint_and_what_the_run_ended_with(trained):
    shown = []
    results = make(trained).evaluate_continuously(
        on_result=lambda c, logs: shown.append((c.step, c.path, logs))
    )
    assert list(results) == [*STEPS, "final"]
    for key, logs in results.items():
        place = trained / PLACES["latest" if key == "final" else key]
        assert logs == pytest.approx(by_hand(place), rel=1e-5)
    assert results[10] != results["final"]
    assert [logs for _, _, logs in shown] == list(results.values())
    assert [step for step, _, _ in shown] == [*STEPS, 10]
    assert shown[-1][1] == trained / "final"


def test_other_metrics_continuously(trained):
    results = make(trained).evaluate_continuously(metrics=[top2()])
    expected = by_hand(trained / PLACES[8], "loss", "top2")
    assert results[8] == pytest.approx(expected, rel=1e-5)


def test_results_are_shown_as_the_config_says(trained, capsys):
    make(trained, progress="plain").evaluate_continuously()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and "validation at step 4" in lines[0]


@pytest.mark.any_backend
def test_checkpoints_appear_and_vanish_while_it_measures(trained, tmp_path):
    """A writer that keeps one checkpoint, and is quicker than the reader."""
    run_dir = tmp_path / "run"
    measured = threading.Event()

    def publish(place):
        temporary = run_dir / f".tmp-legato-{place.name}"
        shutil.copytree(trained / place, temporary)
        os.rename(temporary, run_dir / place)

    def write():
        time.sleep(0.3)
        (run_dir / "checkpoints").mkdir(parents=True)
        shutil.copy(trained / "run.json", run_dir)
        for step in STEPS:
            publish(trained.joinpath(PLACES[step]).relative_to(trained))
            for older in STEPS:
                if older < step:  # whole, as a run removes them
                    with contextlib.suppress(FileNotFoundError):
                        storage.remove_directory(run_dir / PLACES[older])
            if step in (4, 10):
                measured.wait(60)
                measured.clear()
        publish(trained.joinpath("final").relative_to(trained))

    writer = threading.Thread(target=write)
    writer.start()
    results = make(run_dir).evaluate_continuously(
        on_result=lambda *result: measured.set()
    )
    writer.join()
    # Those in the middle were there for an instant only.
    assert next(iter(results)) == 4 and list(results)[-2:] == [10, "final"]
    for key, logs in results.items():
        place = trained / PLACES["latest" if key == "final" else key]
        assert logs == pytest.approx(by_hand(place), rel=1e-5)
    assert sorted(os.listdir(run_dir)) == ["checkpoints", "final", "run.json"]


def test_nothing_within_the_timeout(tmp_path):
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="no checkpoint came within tim"):
        make(tmp_path / "none").evaluate_continuously(timeout=0.3)
    assert time.monotonic() - began > 0.3
    assert not (tmp_path / "none").exists()
    for wrong in (-1, float("nan")):
        with pytest.raises(ConfigError, match="timeout="):
            make(tmp_path / "none").evaluate_continuously(timeout=wrong)


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGTERM, Stopped), (signal.SIGINT, Interrupted)],
)
def test_a_signal_ends_it(run_dir, number, error):
    shutil.rmtree(run_dir / "final")
    handler = signal.getsignal(number)
    shown = []

    def ask(checkpoint, logs):
        shown.append(checkpoint.step)
        if checkpoint.step == 10:
            os.kill(os.getpid(), number)

    with pytest.raises(error, match="checkpoints measured: 4"):
        make(run_dir).evaluate_continuously(on_result=ask)
    assert shown == [*STEPS]
    assert signal.getsignal(number) is handler


def test_a_checkpoint_in_memory_can_be_measured(trained, tmp_path):
    found = find_checkpoint(trained, 8)
    logs = make(tmp_path / "elsewhere").evaluate(checkpoint=found)
    assert logs == pytest.approx(by_hand(trained / PLACES[8]), rel=1e-5)


def test_what_does_not_fit_is_told_continuously_too(trained):
    class Other(Classifier):
        def build_model(self):
            return keras.Sequential(
                [keras.layers.Input((8,)), keras.layers.Dense(3)]
            )

    with pytest.raises(RestoreError, match="does not fit"):
        make(trained, Other()).evaluate_continuously()
