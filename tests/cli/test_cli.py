"""The command line, in processes of its own where that is the point."""

import json
import os
import resource
import subprocess
import sys
import warnings

import numpy as np
import pytest

from legato import cli, errors
from legato.backend_choice import activate_backend, choose_backend
from legato.checkpoint import CheckpointStore

HEAVY = ("keras", "jax", "tensorflow", "torch", "sklearn", "tensorboardX")

# Runs the command line, and tells last what it had to import.
PROBE = f"""
import json, sys
from legato.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as exit:
    status = exit.code
loaded = [name for name in {HEAVY} if name in sys.modules]
print(json.dumps([status, loaded]))
"""


def start(*command, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={
            name: value
            for name, value in (os.environ | environment).items()
            if value is not None
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


def probe(*arguments, cwd=None, **environment):
    """Returns status, standard output and standard error."""
    done = start("-c", PROBE, *arguments, cwd=cwd, **environment)
    *out, last = done.stdout.splitlines()
    status, loaded = json.loads(last)
    assert loaded == [], f"{arguments} imported {loaded}"
    return status, "\n".join(out), done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--help"], 0, "Exit status: 0 done"),
        (["--version"], 0, "legato "),
        (["train", "--help"], 0, "key=value"),
        (["train", "--help-config"], 0, "optimizer.schedule.warmup_steps"),
        (["export", "--help"], 0, "--trust-run-dir"),
        (["inspect", "--help"], 0, "--json"),
        (["evaluate", "--help"], 0, "--trust-run-dir"),
        ([], 2, "usage: legato"),
        (["trane"], 2, "invalid choice: 'trane'"),
        (["train"], 2, "required: CONFIG"),
        (["train", "digits", "--nope"], 2, "unrecognized arguments: --nope"),
        (["train", "digits", "--backend", "mxnet"], 2, "invalid choice"),
        (["inspect", ".", "a=1"], 2, "unrecognized arguments: a=1"),
        (["evaluate"], 2, "required: CONFIG|RUN_DIR"),
        (["evaluate", "digts"], 2, "legato: error: digts: there is no such"),
        (["evaluate", "digits", "--checkpoint=x"], 2, "must be best, latest"),
        (["evaluate", "digits"], 1, "runs/digits: there is no such directory"),
        (["evaluate", "."], 2, ".: is not the directory of a run"),
        (["train", "digts"], 2, "legato: error: digts: there is no such"),
        (["train", "gone.yaml"], 2, "gone.yaml: there is no such file."),
        (["train", "digits", "trainer.seed=x"], 2, "override 'trainer.seed=x'"),
        (["train", "digits", "--max-time", "soon"], 2, "trainer.max_time: "),
        (["train", "digits", "trainer.train_steps="], 2, "give train_steps or"),
        (["train", "digits", "--print-config"], 0, "train_steps: 2000"),
        (["profile", "--help"], 0, "--budget SHARE"),
        (["profile", "digts"], 2, "legato: error: digts: there is no such"),
        (["profile", "digits", "--budget", "0"], 2, "budget='0': it must be"),
        (["profile", "digits", "--budget", "-1"], 2, "budget='-1': it must"),
        (["profile", "digits", "--budget=abc"], 2, 'such as 0.01, or "1%"'),
        (["profile", "digits", "--seconds=0"], 2, "seconds=0.0: it must be"),
        (["profile", "digits", "--seconds=x"], 2, "invalid float value: 'x'"),
        (["profile", "digits", "--plot=x.gif"], 2, "must end in .png, .svg"),
        (["profile", "digits", "--plot=no/x.png"], 2, "there is no directory"),
        (["profile", "digits", "trainer.train_steps="], 2, "give train_steps"),
    ],
)
def test_answers_without_keras(tmp_path, arguments, status, expected):
    found, out, err = probe(*arguments, cwd=tmp_path)
    assert found == status, err
    assert expected in out + err
    assert "Traceback" not in err


def test_two_problems_are_listed(tmp_path):
    _, _, err = probe("train", "digits", "a=1", "b=2", cwd=tmp_path)
    first, *rest = err.splitlines()
    assert first == "legato: errors:"
    assert len(rest) == 2


def test_help_is_fast():
    def computed():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def seconds():
        # Not those of the clock, in which other processes are at work too.
        before = computed()
        assert start("-m", "legato", "--help").returncode == 0
        return computed() - before

    assert min(seconds() for _ in range(3)) < 0.3


def test_overrides_may_stand_anywhere_and_flags_go_last(tmp_path):
    status, out, _ = probe(
        "train",
        "digits",
        "--run-dir=a: b",
        "trainer.seed=5",
        "--exact",
        "off",
        "trainer.exact=warn",
        "--max-time",
        "90",
        "--resume=must",
        "--progress=none",
        "--print-config",
        cwd=tmp_path,
    )
    assert status == 0
    for line in (
        "run_dir: 'a: b'",
        "  seed: 5",
        "  exact: off",
        "  max_time: 90.0",
        "  resume: must",
        "  progress: none",
    ):
        assert line in out.splitlines()


def test_a_module_in_the_working_directory(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\nfrom legato.experiment import Experiment\n"
        "def experiment():\n"
        "    backend = os.environ['KERAS_BACKEND']\n"
        "    return Experiment(task='digits', task_config={'b': backend})\n"
    )
    command = ["train", "mine:experiment", "--print-config"]
    status, out, err = probe(*command, cwd=tmp_path, KERAS_BACKEND=None)
    assert status == 0, err
    assert "run_dir: runs/mine" in out.splitlines()
    # Keras would find a backend chosen.
    assert "  b: jax" in out.splitlines()


# Exit statuses.


def run_raising(error, monkeypatch, *flags):
    def command(args):
        raise error

    monkeypatch.setattr(cli.training, "run", command)
    return cli.main(["train", "digits", *flags])


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (errors.ConfigError("no"), 2, "legato: error: no\n"),
        (errors.DataError("no"), 1, "legato: error: no\n"),
        (
            errors.BadLossError("no", 3, 9.0),
            1,
            "legato: error: no\n",
        ),
        (errors.CheckpointError("\x1b[2Jno"), 1, "error: \\x1b[2Jno\n"),
        (errors.Stopped("stopped by SIGTERM"), 75, "stopped by SIGTERM\n"),
        (errors.Interrupted("saved step 5"), 75, "legato: saved step 5\n"),
        (KeyboardInterrupt(), 130, "legato: interrupted\n"),
    ],
)
def test_exit_status(monkeypatch, capsys, error, status, said):
    monkeypatch.delenv("LEGATO_DEBUG", raising=False)
    assert run_raising(error, monkeypatch) == status
    err = capsys.readouterr().err
    assert err.endswith(said)
    assert "Traceback" not in err


def test_debug_shows_the_traceback(monkeypatch, capsys):
    assert run_raising(errors.DataError("no"), monkeypatch, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("LEGATO_DEBUG", "1")
    assert run_raising(errors.DataError("no"), monkeypatch) == 1
    assert "Traceback" in capsys.readouterr().err


def test_what_is_not_ours_is_let_through(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run_raising(ZeroDivisionError(), monkeypatch)


def test_our_warnings_are_one_line(monkeypatch, capsys):
    def command(args):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(
                errors.ExactnessWarning("x is not exact"), stacklevel=1
            )
        return 0

    monkeypatch.setattr(cli.training, "run", command)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(
        warnings,
        "showwarning",
        lambda *args: sys.stderr.write(warnings.formatwarning(*args[:4])),
    )
    assert cli.main(["train", "digits"]) == 0
    assert capsys.readouterr().err == "legato: warning: x is not exact\n"


# The backend.


@pytest.fixture
def installed(monkeypatch):
    names = {"jax", "torch"}
    monkeypatch.setattr(
        "legato.backend_choice.is_installed", names.__contains__
    )
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    return names


def test_the_order_of_choice(monkeypatch, installed):
    assert choose_backend() == "jax"
    assert choose_backend(experiment="torch") == "torch"
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert choose_backend(experiment="torch") == "jax"
    assert choose_backend("torch", "jax") == "torch"
    monkeypatch.delenv("KERAS_BACKEND")
    installed.remove("jax")
    assert choose_backend() == "torch"


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["tensorflow"], "", "--backend asks for tensorflow, which is not"),
        (["tensorflow"], "", 'installed: pip install "legato[tensorflow]"'),
        ([], "numpy", "KERAS_BACKEND asks for 'numpy': legato trains on jax"),
        ([None, "tensorflow"], "", "the experiment's 'backend' asks for"),
    ],
)
def test_a_backend_that_cannot_be(
    monkeypatch, installed, arguments, environment, expected
):
    monkeypatch.setenv("KERAS_BACKEND", environment)
    with pytest.raises(errors.BackendError) as caught:
        choose_backend(*arguments)
    assert expected in str(caught.value)


def test_no_backend_at_all(installed):
    installed.clear()
    with pytest.raises(errors.BackendError) as caught:
        choose_backend()
    assert 'pip install "legato[jax]"' in str(caught.value)


def test_the_backend_is_chosen_before_keras_is_imported(tmp_path):
    done = start(
        "-c",
        "import os\n"
        "from legato.backend_choice import activate_backend\n"
        "activate_backend('jax')\n"
        "import keras\n"
        "activate_backend('jax')\n"
        "try:\n"
        "    activate_backend('torch')\n"
        "except Exception as error:\n"
        "    print(error)\n"
        "print(os.environ['KERAS_BACKEND'])\n",
        KERAS_BACKEND=None,
    )
    said, environment = done.stdout.splitlines()
    assert "imported with the backend jax before torch could be" in said
    assert environment == "jax"


def test_activating_sets_the_environment(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    activate_backend("jax")
    assert os.environ["KERAS_BACKEND"] == "jax"


# legato inspect.


@pytest.fixture
def run_dir(tmp_path):
    store = CheckpointStore(tmp_path, run_id="run-1")
    for step in (10, 20):
        store.save(
            step,
            {
                "model/dense/kernel": np.ones((3, 4), "float32"),
                "seed": np.zeros((), "uint32"),
            },
            {
                "clock": {"step": step, "epoch": 1},
                "callbacks": [{"class": "EarlyStopping", "best": 0.5}],
                "identity": {"keras": "3.15\x1b[2J", "threads": 2},
            },
            {"train": b"12345"},
            best=step == 10,
        )
    store.wait()
    store.close()
    (tmp_path / "config.yaml").write_text(
        "task: evil_module_that_must_not_be_imported:Task\n"
    )
    (tmp_path / "metrics.jsonl").write_text(
        '{"step":10}\n{"step":20,"loss":"0.5"}\n{"torn'
    )
    (tmp_path / "checkpoints" / "damaged-step_00000005-1").mkdir()
    return tmp_path


def damage(run_dir, step=20):
    path = run_dir / "checkpoints" / f"step_{step:08d}" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    return path


def test_inspect_a_run(run_dir):
    status, out, err = probe("inspect", str(run_dir))
    assert (status, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "run id run-1" in lines
    assert "config.task evil_module_that_must_not_be_imported:Task" in lines
    assert any(line.startswith("step_00000010 10 ") for line in lines)
    assert any("intact best" in line for line in lines)
    assert "set aside: damaged-step_00000005-1" in lines
    assert "best: step 10" in lines
    assert "loss 0.5" in lines


def test_inspect_a_checkpoint(run_dir):
    path = run_dir / "checkpoints" / "step_00000020"
    status, out, err = probe("inspect", str(path))
    assert (status, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "model/dense/kernel float32 3x4 48 B" in lines
    assert "seed uint32 scalar 4 B" in lines
    assert "2 arrays 52 B" in lines
    assert "clock.step 20" in lines
    assert "callbacks EarlyStopping" in lines
    assert "data/train 5 B" in lines
    # What a file says cannot drive the terminal.
    assert "identity.keras 3.15\\x1b[2J" in lines
    assert "\x1b" not in out


def test_inspect_json(run_dir, capsys):
    assert cli.main(["inspect", str(run_dir), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [each["step"] for each in report["checkpoints"]] == [10, 20]
    assert all(each["intact"] for each in report["checkpoints"])
    assert report["last_record"]["step"] == 20
    assert cli.main(["inspect", str(run_dir / "best"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["step"] == 10
    assert report["arrays"][0]["shape"] == [3, 4]


def test_inspect_names_what_is_damaged(run_dir, capsys):
    path = damage(run_dir)
    assert cli.main(["inspect", str(run_dir)]) == 1
    out, err = capsys.readouterr()
    assert "DAMAGED" in out
    assert str(path) in err
    assert cli.main(["inspect", str(path.parent)]) == 1
    assert str(path) in capsys.readouterr().err
    (path.parent / "manifest.json").unlink()
    assert cli.main(["inspect", str(path.parent)]) == 1
    assert "manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "gone", "file"])
def test_inspect_something_else(tmp_path, capsys, name):
    (tmp_path / "file").write_text("")
    assert cli.main(["inspect", str(tmp_path / name)]) == 2
    assert str(tmp_path / name) in capsys.readouterr().err


def test_inspect_follows_no_links_and_survives_odd_files(run_dir, capsys):
    secret = run_dir / "secret"
    secret.write_text("task: secret\n")
    (run_dir / "config.yaml").unlink()
    (run_dir / "config.yaml").symlink_to(secret)
    (run_dir / "metrics.jsonl").unlink()
    os.mkfifo(run_dir / "metrics.jsonl")
    assert cli.main(["inspect", str(run_dir), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"] is None
    assert report["last_record"] is None
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "metrics.jsonl").write_text("[" * 10_000 + "\n")
    (run_dir / "config.yaml").unlink()
    (run_dir / "config.yaml").write_text("a: [")
    assert cli.main(["inspect", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert "is not valid YAML" in out


def test_a_closed_pipe_is_no_traceback(run_dir):
    done = subprocess.run(
        f"{sys.executable} -m legato inspect {run_dir} | true",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
