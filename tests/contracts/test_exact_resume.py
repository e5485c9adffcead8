"""Promise 1: a run that was killed and resumed is the run that was not."""

import shutil
import zlib
from collections.abc import Container
from pathlib import Path

import filelock
import pytest

from legato.checkpoint import CheckpointStore, load_checkpoint
from tests.contracts import runs
from tests.contracts.fit_scenarios import FIT_SCENARIOS, TWELVE
from tests.contracts.garden import GARDEN
from tests.contracts.scenarios import SCENARIOS

# Every other set-up's in a checkpoint's write. `tests.soak.kills` kills more.
KILLS = 1
# A run may have ended before it is killed, where the test is kept waiting.
ATTEMPTS = 10

# Compiled as for users, and again when they are killed, as the soak has it for
# all. (What a checkpoint holds does not depend on how well steps are compiled.)
RECOMPILED = ("plateau", "recurrent", "fit/dropout")


@pytest.fixture
def undisturbed(shared_folder):
    """The directory of each scenario's run without a kill, made once."""

    def get(name: str) -> Path:
        run_dir = shared_folder / "undisturbed" / name
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{run_dir}.lock"):
            if not (run_dir / "history.json").exists():
                quickly = name not in RECOMPILED
                runs.train(name, run_dir, keep_last=None, quickly=quickly)
        return run_dir

    return get


# What these add is the host's: callbacks, data. The soak has them on all.
ONCE = (
    "board",
    "fit/data_loader",
    "fit/epochs_of_steps",
    "fit/grain",
    "fit/no_metrics",
    "fit/py_dataset",
    "fit/random_rate",
    "fit/sampled_metrics",
    "fit/tells",
    "fit/tf_data",
    "fit/tf_data_told",
)


def scenario(name: str, once: Container[str] = ONCE):
    marks = pytest.mark.any_backend if name in once else ()
    return pytest.param(name, marks=marks, id=name)


@pytest.mark.parametrize(
    "name",
    [
        *map(scenario, SCENARIOS),
        *(scenario(f"fit/{name}") for name in FIT_SCENARIOS),
        *(scenario(f"garden/{name}") for name in GARDEN),
    ],
)
def test_killed_at_random_instants(name, undisturbed, tmp_path):
    reference = undisturbed(name)
    for attempt in range(ATTEMPTS):
        run_dir = tmp_path / str(attempt)
        report = runs.train_with_kills(
            name,
            run_dir,
            kills=KILLS,
            until=load_checkpoint(reference / "final").step,
            seed=zlib.crc32(name.encode()) + 2 * attempt,
            side="other" if name in RECOMPILED else "one",
            quickly=name not in RECOMPILED,
            keep_last=None,
        )
        found, compared = runs.differences(reference, run_dir)
        assert not found, (found, report)
        assert compared > 5000
        if "too late" not in report:
            return
    pytest.fail(f"the run ended before it was killed, {ATTEMPTS} times")


@pytest.mark.parametrize(
    "name",
    [
        scenario(name, TWELVE.keys() - {"averages", "dropout", "plateau"})
        for name in TWELVE
    ],
)
def test_killed_between_epochs(name, undisturbed, tmp_path):
    reference = undisturbed(f"fit/{name}")
    runs.train_with_kills(
        f"fit/{name}",
        tmp_path / "run",
        kills=1,
        until=load_checkpoint(reference / "final").step // 2,
        seed=zlib.crc32(name.encode()),
        side="one",
        quickly=f"fit/{name}" not in RECOMPILED,
        keep_last=None,
        checkpoint_interval="epoch",
    )
    # (Which steps were saved changes nothing else.)
    found, _ = runs.differences(reference, tmp_path / "run", common_only=True)
    assert not found


@pytest.mark.parametrize("steps_per_loop", [1, 7])
@pytest.mark.parametrize("name", ["plateau", "vae", "recurrent"])
def test_bits_do_not_depend_on_where_loops_are_cut(
    name, steps_per_loop, undisturbed, tmp_path
):
    reference = undisturbed(name)
    runs.train(
        name,
        tmp_path / "run",
        side="other",
        quickly=name not in RECOMPILED,
        keep_last=None,
        steps_per_loop=steps_per_loop,
    )
    found, _ = runs.differences(reference, tmp_path / "run")
    assert not found


@pytest.mark.parametrize("name", ["plateau", "gan"])
def test_resumed_at_every_position(name, tmp_path):
    whole = tmp_path / "whole"
    length = {"train_steps": 8, "checkpoint_interval": 1, "keep_last": None}
    length["quickly"] = name not in RECOMPILED
    runs.train(name, whole, **length)
    run_id = load_checkpoint(whole / "final").run_id
    processes = []
    for step in range(1, 8):
        copy = tmp_path / f"from{step}"
        shutil.copytree(whole, copy)
        CheckpointStore(copy, run_id=run_id).rewind(step)
        for aside in (copy / "checkpoints").glob("aside-*"):
            shutil.rmtree(aside)
        (copy / "history.json").unlink()
        process = runs.start(name, copy, side="other", **length)
        processes.append((copy, process))
        if len(processes) % 2 == 0:
            runs.finish(processes[-2][1])
    for copy, process in processes:
        runs.finish(process)
        found, _ = runs.differences(whole, copy)
        assert not found, copy.name


def test_a_finished_run_trains_nothing_and_returns_its_history(
    undisturbed, tmp_path
):
    reference = undisturbed("plateau")
    copy = tmp_path / "run"
    shutil.copytree(reference, copy)
    (copy / "history.json").unlink()
    runs.train("plateau", copy, side="other", keep_last=None)
    found, _ = runs.differences(reference, copy)
    assert not found


def test_a_run_made_longer_is_the_longer_run(tmp_path):
    # Across an epoch's end, with averaged weights put in at the end of train.
    for steps in (13, 24):
        runs.train(
            "averages", tmp_path / "run", side="other", train_steps=steps
        )
    runs.train("averages", tmp_path / "whole", train_steps=24)
    # What the first run saved at its own end (step 13) is not in the other.
    for run in ("run", "whole"):
        for path in (tmp_path / run / "checkpoints").iterdir():
            if not path.name.endswith("24"):
                shutil.rmtree(path)
    found, _ = runs.differences(tmp_path / "whole", tmp_path / "run")
    assert not found


def test_the_comparison_can_fail(undisturbed, tmp_path):
    reference = undisturbed("plateau")
    for damage in ("state.safetensors", "host.json"):
        copy = tmp_path / damage
        shutil.copytree(reference, copy)
        newest = sorted((copy / "checkpoints").glob("step_*"))[-1] / damage
        content = bytearray(newest.read_bytes())
        content[-5] ^= 1
        newest.write_bytes(content)
        assert runs.differences(reference, copy)[0] == [
            f"checkpoints/{newest.parent.name}/{damage}"
        ]
