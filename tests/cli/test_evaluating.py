"""`legato evaluate`: what it prints, what it refuses, and beside a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import keras
import pytest
from tests import evaluated_by_hand
from tests.processes import Forked, run_legato

from legato import cli
from legato.errors import LegatoWarning

BACKEND = os.environ["KERAS_BACKEND"]

TASK = """
import os
import time
import keras
import legato
from tests.contracts.scenarios import Classifier


class Small(Classifier):
    pass


class WithDropout(Classifier):
    # Its seed's dtype differs between backends.
    def build_model(self):
        layers = keras.layers
        return keras.Sequential([
            layers.Input((8,)), layers.Dense(16, activation="tanh"),
            layers.Dropout(0.5), layers.Dense(3),
        ])


class Slow(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        while epoch == 2 and not os.path.exists("go"):
            time.sleep(0.05)
        time.sleep(0.1)


def top2():
    return keras.metrics.SparseTopKCategoricalAccuracy(k=2, name="top2")


def spread(labels, outputs):
    return keras.ops.max(outputs, axis=-1) - keras.ops.min(outputs, axis=-1)


class Seen(legato.HostMetric):
    def reset_state(self):
        self.labels = []

    def update_state(self, labels, outputs):
        self.labels.extend(labels.tolist())

    def result(self):
        counts = {f"class_{k}": self.labels.count(k) for k in range(3)}
        return {"seen": len(self.labels), "counts": counts}


metric = top2()
number = 5
"""
CONFIG = """
task: small_task:Small
trainer: {epochs: 2, checkpoint_interval: 4, keep_last: null, progress: none,
          best_metric: val_loss, best_mode: max}
run_dir: run
"""
EVIL = "open('pwned', 'w').close()\n"
STEPS = (4, 5, 8, 10)


def start(*arguments, cwd, side="one"):
    return Forked(run_legato, *arguments, cwd=cwd, side=side)


def start_python(*arguments, cwd, **environment):
    paths = [str(cwd), *sys.path]
    return subprocess.Popen(
        [sys.executable, "-m", "legato", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, status=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, err
    assert "Traceback" not in err
    return out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    project = tmp_path_factory.mktemp("project")
    (project / "small_task.py").write_text(TASK)
    (project / "small.yaml").write_text(CONFIG)
    finish(start("train", "small.yaml", cwd=project))
    return project


@pytest.fixture
def project(trained, tmp_path, monkeypatch):
    """A copy to work in."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("small_task", None)
    yield tmp_path
    sys.modules.pop("small_task", None)


def evaluate(capsys, *arguments, status=0):
    found = cli.main(["evaluate", *arguments])
    out, err = capsys.readouterr()
    assert found == status, err
    return out if status == 0 else err


def by_hand(place, *names):
    results = evaluated_by_hand.classifier(place)
    return {name: results[name] for name in names or ("loss", "accuracy")}


def close(results):
    return pytest.approx(results, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "place", "step"),
    [
        ([], "run/final", 10),
        (["--checkpoint", "latest"], "run/final", 10),
        (["--checkpoint=best"], "run/best", 5),
        (["--checkpoint", "8"], "run/checkpoints/step_00000008", 8),
        (["--run-dir", "run/best"], "run/best", 5),
    ],
)
def test_a_checkpoint_is_measured_as_by_hand(
    project, capsys, flags, place, step
):
    lines = evaluate(capsys, "small.yaml", *flags).splitlines()
    assert lines[:2] == [f"checkpoint = {place}", f"step = {step}"]
    values = dict(line.split(" = ") for line in lines[2:])
    found = {name: float(value) for name, value in values.items()}
    assert found == close(by_hand(project / place))
    out = evaluate(capsys, "small.yaml", "--json", *flags)
    assert json.loads(out) == {
        "checkpoint": place,
        "step": step,
        "results": found,
    }


def test_metrics_that_training_never_computed(project, capsys):
    names = ["small_task:top2", "small_task:spread", "acc"]
    flags = [part for name in names for part in ("--metric", name)]
    out = evaluate(capsys, "small.yaml", "--json", "--checkpoint=4", *flags)
    expected = by_hand(
        project / "run/checkpoints/step_00000004",
        *("loss", "top2", "spread", "accuracy"),
    )
    expected["acc"] = expected.pop("accuracy")
    assert json.loads(out)["results"] == close(expected)
    out = evaluate(
        capsys,
        "small.yaml",
        "--json",
        "--checkpoint=4",
        "--metric=small_task:metric",
        "--metric=sparse_categorical_accuracy",
    )
    results = json.loads(out)["results"]
    assert results["top2"] == pytest.approx(expected["top2"])
    assert results["sparse_categorical_accuracy"] == pytest.approx(
        expected["acc"]
    )


def test_a_metric_of_the_host(project, capsys):
    flags = ("--checkpoint=4", "--metric=small_task:Seen")
    results = json.loads(evaluate(capsys, "small.yaml", "--json", *flags))
    found = results["results"]
    assert found["seen"] == 45
    assert sum(found[f"counts/class_{k}"] for k in range(3)) == 45
    assert "\ncounts/class_1 = " in evaluate(capsys, "small.yaml", *flags)


@pytest.mark.parametrize(
    ("labels", "outputs", "expected"),
    [
        ([1, 0, 2], [[0, 9, 0], [0, 9, 0], [0, 0, 9]], 2 / 3),
        ([[1], [0], [2]], [[0, 9, 0], [0, 9, 0], [0, 0, 9]], 2 / 3),
        ([[0, 1], [1, 0]], [[0.1, 0.9], [0.2, 0.8]], 1 / 2),
        ([[1], [0], [1], [1]], [[0.9], [0.1], [0.2], [0.7]], 3 / 4),
    ],
)
def test_accuracy_is_of_the_kind_that_compile_takes(labels, outputs, expected):
    import numpy as np

    from legato.cli.metrics import build_metric

    labels, outputs = np.array(labels), np.array(outputs, "float32")
    ours = build_metric("accuracy")
    ours.update_state(labels, outputs)
    model = keras.Sequential(
        [keras.layers.Input(outputs.shape[1:]), keras.layers.Identity()]
    )
    model.compile(loss="mse", metrics=["accuracy"])
    theirs = model.evaluate(outputs, labels, verbose=0, return_dict=True)
    assert float(ours.result()) == pytest.approx(expected)
    assert theirs["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nosuch", "--metric nosuch: keras.metrics has no metric 'nosuch'. "),
        ("accurcy", " - did you mean 'accuracy'? One of yours is named "),
        ("mean", "keras.metrics has no metric 'mean'"),
        ("MeanIoU", "could not be made: "),
        ("MeanIoU", "name a function without any that makes it"),
        ("gone:X", "--metric gone:X: there is no module 'gone'."),
        ("small_task:X", "small_task has no 'X'"),
        ("small_task:number", "is a int: it must be a keras.metrics.Metric"),
        ("small_task:Slow", "is a Slow: it must be a keras.metrics.Metric"),
        ("a b:c", "must be of the form package.module:Name (got 'a b:c')"),
    ],
)
def test_metrics_that_there_are_not(project, capsys, name, expected):
    flags = ["--metric", name]
    assert expected in evaluate(capsys, "small.yaml", *flags, status=2)


def test_a_damaged_checkpoint_is_named(project, capsys):
    path = project / "run/checkpoints/step_00000008/host.json"
    path.unlink()
    err = evaluate(capsys, "small.yaml", "--checkpoint=8", status=1)
    assert "step_00000008/host.json: missing. There are checkpoints" in err
    shutil.rmtree(project / "run/final")
    shutil.rmtree(project / "run/checkpoints/step_00000010")
    with pytest.warns(LegatoWarning, match="The one of step 5 is used"):
        out = evaluate(capsys, "small.yaml")
    assert "step = 5" in out.splitlines()


def test_another_backend_measures_the_same(project):
    """Also where the checkpoint holds seeds, whose types differ."""
    other = {"jax": "torch", "torch": "tensorflow", "tensorflow": "jax"}
    task = "task=small_task:WithDropout"
    finish(start("train", "small.yaml", task, "--run-dir=dropout", cwd=project))
    arguments = ("evaluate", "small.yaml", task, "--run-dir=dropout", "--json")
    out, _ = finish(
        start_python(*arguments, cwd=project, KERAS_BACKEND=other[BACKEND])
    )
    found = json.loads(out)["results"]
    assert found == close(by_hand(project / "dropout/final"))


# A run directory by itself.


def test_a_trusted_run_directory_is_enough(project, capsys):
    shutil.move("run", "moved")
    out = evaluate(
        capsys, "moved", "--trust-run-dir", "--json", "--checkpoint=4"
    )
    report = json.loads(out)
    assert report["checkpoint"] == "moved/checkpoints/step_00000004"
    expected = by_hand(project / "moved/checkpoints/step_00000004")
    assert report["results"] == close(expected)
    out = evaluate(
        capsys,
        "moved",
        "--trust-run-dir",
        "--json",
        "trainer.validation_steps=1",
    )
    assert json.loads(out)["results"] != close(by_hand(project / "moved/final"))


HOSTILE = [
    ("task: evil:Task\n", 2),
    ("task: small_task:Small\ncallbacks: [{type: 'evil:Callback'}]\n", 0),
    ("task: !!python/object/apply:os.system ['touch pwned']\n", 2),
    ("task: small_task:Small\ntask_config: {x: !!python/name:evil.x }\n", 2),
]


@pytest.mark.parametrize(("config", "trusted_status"), HOSTILE)
def test_a_run_directory_that_is_not_trusted_runs_nothing(
    project, capsys, config, trusted_status
):
    for place in (project, project / "run"):
        (place / "evil.py").write_text(EVIL)
    (project / "run/config.yaml").write_text(config)
    err = evaluate(capsys, "run", status=2)
    assert "add --trust-run-dir; or name the experiment" in err
    # The user's own CONFIG may be measured on that run.
    out = evaluate(capsys, "small.yaml", "--run-dir=run", "--json")
    assert json.loads(out)["results"] == close(by_hand(project / "run/final"))
    assert not (project / "pwned").exists()
    # The task of one that is trusted is imported, or this test would prove
    # nothing; but neither callbacks, nor what tags in YAML name.
    evaluate(capsys, "run", "--trust-run-dir", status=trusted_status)
    assert (project / "pwned").exists() == (config == HOSTILE[0][0])
    sys.modules.pop("evil", None)


def test_links_out_of_a_run_directory_are_not_followed(project, capsys):
    (project / "run/config.yaml").unlink()
    (project / "run/config.yaml").symlink_to(project / "small.yaml")
    err = evaluate(capsys, "run", "--trust-run-dir", status=2)
    assert "run: holds no config.yaml" in err


def test_a_run_made_in_python_says_what_to_do(project, capsys):
    (project / "run/config.yaml").write_text("trainer:\n  epochs: 3\n")
    for flags in ([], ["--trust-run-dir"]):
        err = evaluate(capsys, "run", *flags, status=2)
        assert "run/config.yaml names no task" in err
        assert 'legato.evaluate(model, ..., checkpoint="run")' in err
        assert "legato evaluate CONFIG --run-dir run" in err


# Wrong usage.


def test_no_run(project, capsys):
    os.mkdir("empty")
    err = evaluate(capsys, "small.yaml", "--run-dir=gone", status=1)
    assert "gone: there is no such directory" in err
    err = evaluate(capsys, "small.yaml", "--run-dir=empty", status=1)
    assert "empty: is neither a run's directory (which holds run.json)" in err
    for flags in ([], ["--trust-run-dir"]):
        err = evaluate(capsys, "empty", *flags, status=2)
        assert "empty: is not the directory of a run: it holds no run.json" in (
            err
        )
    err = evaluate(capsys, "run", "--run-dir=run", status=2)
    assert "--run-dir=run: run is a run directory itself" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--timeout=5"], "--timeout is for --continuous: give both."),
        (["--continuous", "--checkpoint=4"], "give one of the two."),
    ],
)
def test_flags_that_do_not_go_together(project, capsys, arguments, expected):
    assert expected in evaluate(capsys, "small.yaml", *arguments, status=2)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--checkpoint=newest", "must be best, latest or a step, such as 100"),
        ("--checkpoint=-1", "must be best, latest or a step"),
        ("--timeout=soon", "must be a duration above zero"),
    ],
)
def test_values_that_are_refused(capsys, flag, expected):
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", "digits", flag])
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_name_of_ours_is_no_directory_of_yours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    err = evaluate(capsys, "digits", status=1)
    assert "runs/digits: there is no such directory" in err


# Continuously.


def lines_of(out):
    """The records of `--json`, each checked."""
    return [json.loads(line) for line in out.splitlines()]


def test_beside_a_run_that_trains(project):
    """Two processes, begun together; what each leaves is as if alone."""
    changes = ("trainer.epochs=20", "callbacks=[{type: 'small_task:Slow'}]")
    both = ("small.yaml", *changes, "--run-dir=both", "trainer.keep_last=2")
    evaluation = start(
        "evaluate", *both, "--continuous", "--json", cwd=project, side="one"
    )
    training = start("train", *both, cwd=project, side="one")
    evaluation.read_line()
    (project / "go").touch()  # the training waits for that
    finish(training)
    out, _ = finish(evaluation)

    alone = ("--run-dir=alone", "trainer.keep_last=null")
    finish(start("train", "small.yaml", *changes, *alone, cwd=project))
    *records, last = lines_of(out)
    assert last["checkpoint"] == "both/final"
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps)) and steps[-1] == 100 == last["step"]
    assert steps[0] <= 15
    for record in (*records, last):
        place = record["checkpoint"].replace("both", "alone")
        assert record["results"] == close(by_hand(project / place))
    for name in ("metrics.jsonl", "final/state.safetensors"):
        both, alone = (project / run / name for run in ("both", "alone"))
        assert both.read_bytes() == alone.read_bytes()
    names = {path.name for path in (project / "both").iterdir()}
    assert names == {path.name for path in (project / "alone").iterdir()}


def test_each_result_is_a_line(project, capsys):
    lines = evaluate(capsys, "small.yaml", "--continuous").splitlines()
    assert len(lines) == 5
    for line, step in zip(lines, STEPS, strict=False):
        values = by_hand(project / f"run/checkpoints/step_{step:08d}")
        head, _, rest = line.partition(": ")
        assert head == f"step {step}"
        pairs = dict(each.split(" = ") for each in rest.split(", "))
        found = {name: float(value) for name, value in pairs.items()}
        assert found == close(values)
    assert lines[-1].startswith("final, step 10: loss = ")


def test_without_a_run_it_waits_and_gives_up(project, capsys):
    began = time.monotonic()
    flags = ["--run-dir=gone", "--continuous", "--timeout=0.5"]
    err = evaluate(capsys, "small.yaml", *flags, status=1)
    assert time.monotonic() - began >= 0.5
    assert "gone: no checkpoint came within timeout=0.5 seconds" in err
    assert not (project / "gone").exists()


def test_a_run_that_does_not_end(project, capsys):
    shutil.rmtree("run/final")
    shutil.rmtree("run/checkpoints/step_00000008")
    flags = ["--continuous", "--timeout=1s", "--json"]
    assert cli.main(["evaluate", "small.yaml", *flags]) == 0
    out, err = capsys.readouterr()
    assert [record["step"] for record in lines_of(out)] == [4, 5, 10]
    assert "no checkpoint came for 1 seconds, and the run has not" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_75(project, number):
    shutil.rmtree("run/final")
    process = start("evaluate", "small.yaml", "--continuous", cwd=project)
    for step in STEPS:
        assert process.read_line().startswith(f"step {step}: ")
    process.send_signal(number)
    out, err = finish(process, 75)
    assert len(out.splitlines()) == len(STEPS)
    assert f"legato: {number.name}: stopped measuring run; check" in err


@pytest.mark.parametrize("flags", [[], ["--continuous"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_result(project, number, flags):
    (project / "slow_task.py").write_text(
        "import sys, time\n"
        "print('importing', file=sys.stderr, flush=True)\n"
        "time.sleep(60)\n"
    )
    config = ("small.yaml", "task=slow_task:Small", *flags)
    process = start("evaluate", *config, cwd=project)
    while "importing" not in process.read_line(err=True):
        pass
    process.send_signal(number)
    _, err = finish(process, 75)
    assert f"legato: {number.name} before all was measured." in err


def test_training_measures_at_its_end(project, capsys):
    """Here of a run that has ended: nothing is trained any more."""
    assert cli.main(["evaluate", "small.yaml"]) == 0
    wanted = capsys.readouterr().out.splitlines()[2:]
    flags = ["--mode", "train_and_post_eval", "--exact", "off"]
    assert cli.main(["train", "small.yaml", *flags]) == 0
    assert capsys.readouterr().out.splitlines() == wanted
