import sys
import types

import pytest

from legato import experiment as experiment_lib
from legato.config import TrainerConfig, dump_yaml, load_yaml, validate
from legato.errors import ConfigError
from legato.experiment import (
    CallbackSpec,
    Experiment,
    build_callbacks,
    build_task,
    resolve,
    run_experiment,
)

MODULE = """
from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Literal

from legato.experiment import Experiment
from legato.task import Task

if TYPE_CHECKING:
    from somewhere import Unknown


class Mine(Task):
    def __init__(
        self,
        batch_size: int = 32,
        sizes: tuple[int, ...] = (1,),
        kind: Literal["a", "b"] = "a",
        path: pathlib.Path = None,
        odd: Unknown = None,
        plain=None,
    ):
        if batch_size > 1000:
            raise ValueError("no memory for that")
        self.given = (batch_size, sizes, kind, path, odd, plain)


class NeedsRate(Task):
    def __init__(self, rate: float, **others):
        self.rate, self.others = rate, others


def make(batch_size: int = 1) -> Task:
    return Mine(batch_size)


def no_task():
    return 5


VALUE = 5
experiment = Experiment(task=f"{__name__}:Mine", trainer={"train_steps": 7})


def other():
    return experiment.replace(run_dir="elsewhere")
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A working directory with a module, and stand-ins for the engine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"mine_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    task_module = types.ModuleType("legato.task")
    task_module.Task = type("Task", (), {})
    monkeypatch.setitem(sys.modules, "legato.task", task_module)
    yield name
    sys.modules.pop(name, None)


def write(text, name="config.yaml"):
    with open(name, "w") as file:
        file.write(text)
    return name


def problems_of(function, *args):
    with pytest.raises(ConfigError) as caught:
        function(*args)
    return str(caught.value).splitlines()


# Finding an experiment.


def test_a_yaml_file(project):
    path = write(
        f"task: {project}:Mine\ntask_config: {{batch_size: 8}}\n"
        "trainer:\n  train_steps: 5\nbackend: jax\n",
        "small.yaml",
    )
    experiment = resolve(path, ["trainer.seed=3"])
    assert experiment == Experiment(
        task=f"{project}:Mine",
        task_config={"batch_size": 8},
        trainer=TrainerConfig(train_steps=5, seed=3),
        backend="jax",
        run_dir="runs/small",
    )
    assert project not in sys.modules


def test_a_built_in_name():
    experiment = resolve("digits", ["trainer.train_steps=3"])
    assert experiment.task == "legato.tasks.digits:Digits"
    assert experiment.trainer.train_steps == 3
    assert experiment.run_dir == "runs/digits"


@pytest.mark.parametrize("name", experiment_lib.built_in_names())
def test_every_built_in_is_valid_and_can_be_trained(name):
    resolve(name).trainer.require_length()


def test_a_module(project):
    found = resolve(f"{project}:experiment", ["trainer.seed=1"])
    assert found.trainer == TrainerConfig(train_steps=7, seed=1)
    assert found.run_dir == f"runs/{project}"
    assert resolve(f"{project}:other").run_dir == "elsewhere"


def test_a_file_in_the_working_directory_beats_a_built_in(project):
    write(f"task: {project}:Mine\n", "digits")
    assert resolve("digits").task == f"{project}:Mine"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("digts", "digts: there is no such experiment. CONFIG is a YAML file"),
        ("digts", " - did you mean 'digits'?"),
        ("zzz", "; built in are classification, detection, digits, "),
        ("gone.yaml", "gone.yaml: there is no such file."),
        ("no/where", "no/where: there is no such file."),
        ("gone:experiment", "gone:experiment: there is no module 'gone'."),
        ("a b:c", "must be of the form package.module:experiment."),
        ("MODULE:experimen", " - did you mean 'experiment'?"),
        ("MODULE:VALUE", "must be a legato.Experiment, or a function"),
        ("MODULE:no_task", "it is a int."),
    ],
)
def test_what_is_not_found(project, text, expected):
    (line,) = problems_of(resolve, text.replace("MODULE", project))
    assert expected in line


def test_an_error_inside_the_users_module_is_let_through(project):
    write("import not_there\n", "broken.py")
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        resolve("broken:experiment")


def test_all_problems_with_places(project):
    path = write(
        "task: digts\n"
        "taskconfig: {}\n"
        "trainer: {epocs: 3}\n"
        "callbacks:\n"
        "  - {type: a b}\n"
        "  - {config: {x: 1}}\n"
        "backend: numpy\n"
    )
    assert sorted(problems_of(resolve, path)) == [
        'config.yaml:1:7: task: must be "package.module:Class" or a built-in '
        "name - did you mean 'digits'? (got 'digts')",
        "config.yaml:2:1: taskconfig: not a known key - did you mean "
        "'task_config'? (got {})",
        "config.yaml:3:11: trainer.epocs: not a known key - did you mean "
        "'epochs'? (got 3)",
        'config.yaml:5:12: callbacks.0.type: must be "package.module:Class", '
        'or the name of a class of keras.callbacks such as "EarlyStopping" '
        "(got 'a b')",
        "config.yaml:6:5: callbacks.1.type: is required, and missing",
        "config.yaml:7:10: backend: must be one of 'jax', 'tensorflow' or "
        "'torch' (got 'numpy')",
    ]


def test_new_sections_have_places_too(project):
    path = write(
        f"task: {project}:Mine\n"
        "learning_rate: 0.1\n"
        "trainer:\n"
        "  init_from: {pth: x, checkpoint: newest}\n"
    )
    flags = ["trainer.init_from.weights=ema", "trainer.precison=float32"]
    assert sorted(problems_of(resolve, path, flags)) == [
        "config.yaml:2:1: learning_rate: not a known key - did you mean "
        "'optimizer.learning_rate'? (got 0.1)",
        "config.yaml:4:14: trainer.init_from.path: is required, and missing",
        "config.yaml:4:15: trainer.init_from.pth: not a known key - did you "
        "mean 'path'? (got 'x')",
        'config.yaml:4:35: trainer.init_from.checkpoint: must be "best", '
        "\"latest\", or the step of a checkpoint, such as 100 (got 'newest')",
        "override 'trainer.init_from.weights=ema': trainer.init_from.weights: "
        "must be one of 'model' or 'average' (got 'ema')",
        "override 'trainer.precison=float32': trainer.precison: not a known "
        "key - did you mean 'precision'? (got 'float32')",
    ]


def test_plain_data_only():
    (line,) = problems_of(
        lambda: Experiment(task="a:B", task_config={"x": object()})
    )
    assert "task_config: must hold plain data only" in line
    assert Experiment(task="a:B", task_config={"x": (1,)}).task_config == {
        "x": [1]
    }


def test_a_dumped_experiment_reads_back():
    experiment = Experiment(
        task="a.b:C",
        task_config={"sizes": [1, 2]},
        callbacks=[CallbackSpec(type="EarlyStopping", config={"patience": 3})],
        trainer=TrainerConfig(epochs=3),
    )
    path = write(dump_yaml(experiment))
    assert validate(Experiment, load_yaml(path), source=path) == experiment


# Building the task.


def task_of(project, config="{}", name="Mine", *overrides):
    path = write(f"task: {project}:{name}\ntask_config: {config}\n")
    return build_task(resolve(path, overrides))


def test_task_config_follows_the_annotations(project):
    task = task_of(
        project,
        "{batch_size: 4, sizes: [1, 2], kind: b, path: x, odd: [1], plain: z}",
    )
    path = type(task.given[3])
    assert task.given == (4, (1, 2), "b", path("x"), [1], "z")
    assert task_of(project, "{path: null}").given[3] is None
    assert task_of(project, "{batch_size: 3}", "make").given[0] == 3
    task = task_of(project, "{rate: 1, more: 2}", "NeedsRate")
    assert task.rate == 1.0 and task.others == {"more": 2}


def test_wrong_task_config_is_placed(project):
    assert sorted(
        problems_of(
            task_of,
            project,
            "{batchsize: 4, sizes: [1, x], kind: c}",
            "Mine",
            "task_config.batch_size=ten",
        )
    ) == [
        "config.yaml:2:15: task_config.batchsize: not a known key - did you "
        "mean 'batch_size'? (got 4)",
        "config.yaml:2:40: task_config.sizes.1: must be a whole number (got "
        "'x')",
        "config.yaml:2:50: task_config.kind: must be one of 'a' or 'b' (got "
        "'c')",
        "override 'task_config.batch_size=ten': task_config.batch_size: must "
        "be a whole number (got 'ten')",
    ]
    assert problems_of(task_of, project, "{}", "NeedsRate") == [
        "config.yaml:2:14: task_config.rate: is required, and missing"
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Min", "config.yaml:1:7: task: MODULE has no 'Min' - did you mean"),
        ("VALUE", "config.yaml:1:7: task: MODULE:VALUE is not a class or a"),
        ("no_task", "MODULE:no_task made a int, which is not a legato.Task."),
    ],
)
def test_what_is_no_task(project, name, expected):
    (line,) = problems_of(task_of, project, "{}", name)
    assert expected.replace("MODULE", project) in line


def test_a_constructor_that_refuses(project):
    (line,) = problems_of(task_of, project, "{batch_size: 5000}")
    assert line.endswith("Mine could not be made: no memory for that")


def test_an_experiment_made_in_python_has_no_places(project):
    experiment = Experiment(task=f"{project}:Mine", task_config={"kind": "c"})
    assert problems_of(build_task, experiment) == [
        "task_config.kind: must be one of 'a' or 'b' (got 'c')"
    ]
    assert problems_of(build_task, Experiment(task="gone:X"))[0].startswith(
        "task: there is no module 'gone'."
    )


# Callbacks and running.


def test_callbacks(project):
    import keras

    path = write(
        f"task: {project}:Mine\ncallbacks:\n"
        "  - {type: EarlyStopping, config: {patience: 4}}\n"
        "  - {type: 'keras.callbacks:TerminateOnNaN'}\n"
    )
    first, second = build_callbacks(resolve(path))
    assert isinstance(first, keras.callbacks.EarlyStopping)
    assert first.patience == 4
    assert isinstance(second, keras.callbacks.TerminateOnNaN)

    def broken(spec):
        path = write(f"task: {project}:Mine\ncallbacks:\n  - {spec}\n")
        return problems_of(build_callbacks, resolve(path))

    assert broken("{type: EarlyStoping}") == [
        "config.yaml:3:12: callbacks.0.type: keras.callbacks has no "
        "'EarlyStoping' - did you mean 'EarlyStopping'?"
    ]
    assert broken("{type: EarlyStopping, config: {patence: 4}}") == [
        "config.yaml:3:36: callbacks.0.config.patence: not a known key - did "
        "you mean 'patience'? (got 4)"
    ]
    assert (
        "which is not a keras.callbacks.Callback."
        in (broken(f"{{type: '{project}:Mine'}}")[0])
    )


class FakeTrainer:
    def __init__(
        self, task, *, run_dir, config, callbacks, config_yaml, **managers
    ):
        assert "task: mine" in config_yaml
        self.managers = managers
        self.made = (type(task).__name__, run_dir, callbacks)
        self.config = config

    def train(self):
        return "trained", self

    def evaluate(self):
        return "evaluated", self

    def evaluate_continuously(self, timeout):
        self.timeout = timeout
        return "watched", self


def test_run_experiment(project, monkeypatch):
    module = types.ModuleType("legato.trainer")
    module.Trainer = FakeTrainer
    monkeypatch.setitem(sys.modules, "legato.trainer", module)
    experiment = Experiment(
        task=f"{project}:Mine",
        trainer=TrainerConfig(train_steps=3, validation_interval=1),
    )
    done, trainer = run_experiment(experiment)
    assert (done, trainer.made) == ("trained", ("Mine", "runs/mine", []))
    assert trainer.config.validation_interval == 1
    assert set(trainer.managers.values()) == {None}
    mine = {"summary_manager": "mine", "eval_summary_manager": "also mine"}
    _, trainer = run_experiment(experiment, **mine)
    assert trainer.managers == mine
    assert trainer.config.sinks == ["tensorboard"]
    _, trainer = run_experiment(experiment, **mine, save_summary=False)
    assert trainer.config.sinks == []
    assert set(trainer.managers.values()) == {None}
    with pytest.raises(ConfigError, match="save_summary='no'"):
        run_experiment(experiment, **mine, save_summary="no")
    done, trainer = run_experiment(experiment, "train", run_dir="here")
    assert trainer.config.validation_interval is None
    assert trainer.made[1] == "here"
    endless = experiment.replace(trainer=TrainerConfig(), run_dir="there")
    done, trainer = run_experiment(endless, mode="eval")
    assert (done, trainer.made[1]) == ("evaluated", "there")
    done, trainer = run_experiment(endless, mode="continuous_eval")
    assert (done, trainer.made[1]) == ("watched", "there")
    assert trainer.timeout is None
    _, trainer = run_experiment(endless, mode="continuous_eval", timeout=3)
    assert trainer.timeout == 3
    (done, trainer), (also, _) = run_experiment(
        experiment, "train_and_post_eval"
    )
    assert (done, also) == ("trained", "evaluated")
    assert trainer.config.validation_interval is None
    assert (
        "length of the run is missing"
        in (problems_of(run_experiment, endless)[0])
    )
    (problem,) = problems_of(run_experiment, endless, "tarin")
    assert problem.endswith("got 'tarin' - did you mean 'train'?")
    with pytest.raises(ConfigError, match="timeout=3 is for mode="):
        run_experiment(endless, timeout=3)


def test_callbacks_are_made_only_to_train(project, monkeypatch):
    module = types.ModuleType("legato.trainer")
    module.Trainer = FakeTrainer
    monkeypatch.setitem(sys.modules, "legato.trainer", module)
    experiment = Experiment(
        task=f"{project}:Mine",
        trainer=TrainerConfig(train_steps=3),
        callbacks=[CallbackSpec(type="not_there:Callback")],
    )
    for mode in ("eval", "continuous_eval"):
        _, trainer = run_experiment(experiment, mode)
        assert trainer.made[2] == []
    for mode in experiment_lib.TRAINING_MODES:
        assert "not_there" in problems_of(run_experiment, experiment, mode)[0]
