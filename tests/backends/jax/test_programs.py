"""What was compiled in one process is there in the next."""

import atexit
import json
import os
import signal
import time
from pathlib import Path

import jax
import keras
import numpy as np
import pytest
from tests.processes import Forked

import legato
from legato.backends.jax import programs


class Say(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        print("epoch", flush=True)


def train(run_dir, epochs, options):
    """In a process of its own; tells how often what was compiled was there."""
    for name, value in options.items():
        jax.config.update(name, value)
    counts = {}

    def count(event, **more):
        name = event.rpartition("/")[2]
        counts[name] = counts.get(name, 0) + 1

    jax.monitoring.register_event_listener(count)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    legato.fit(
        model,
        x,
        x[:, :3],
        epochs=epochs,
        batch_size=8,
        run_dir=run_dir,
        checkpoint_interval=2,
        verbose=0,
        callbacks=[Say()],
    )
    print(json.dumps(counts), flush=True)
    atexit._run_exitfuncs()  # which a forked process leaves out


@pytest.fixture
def start(tmp_path):
    def start(name, epochs=3, **options):
        environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        run_dir = tmp_path / name
        return Forked(train, run_dir, epochs, options, env=environment)

    return start


def counts_of(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def shared_folder(tmp_path):
    (folder,) = (tmp_path / "cache" / "legato" / "jax").iterdir()
    return folder


def test_the_next_process_compiles_nothing_again(start, tmp_path):
    first = counts_of(start("first"))
    assert first["cache_misses"] > 0
    assert "cache_hits" not in first
    # The names are JAX's, and nothing of a process that has ended is left.
    folder = shared_folder(tmp_path)
    assert {p.name[-6:] for p in folder.iterdir()} == {"-cache"}
    again = counts_of(start("again"))
    assert again.get("cache_misses", 0) == 0
    assert again["cache_hits"] >= first["cache_misses"]
    alone = counts_of(start("alone", jax_enable_compilation_cache=False))
    assert "cache_hits" not in alone
    finals = {
        Path(tmp_path, name, "final", "state.safetensors").read_bytes()
        for name in ("first", "again", "alone")
    }
    assert len(finals) == 1


def test_one_that_is_killed_leaves_whole_files_only(start, tmp_path):
    process = start("run", epochs=10**6)
    assert process.read_line() == "epoch"
    folder = shared_folder(tmp_path)
    until = time.monotonic() + 60
    while not list(folder.glob("*-cache")):
        assert time.monotonic() < until
        time.sleep(0.05)
    (own,) = folder.glob("process-*[!k]")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert own.exists()
    kept = {p.name for p in folder.glob("*-cache")}
    # As if it had been killed in the midst of one.
    (own / "half-cache").write_bytes(b"half")
    other = counts_of(start("other", epochs=1))
    assert other["cache_hits"] >= len(kept) / 2
    assert not own.exists()
    assert not (folder / "half-cache").exists()
    assert not list(folder.glob("process-*"))


def test_what_is_being_written_is_not_given_away(tmp_path):
    mine = programs._Programs(tmp_path)
    whole, half = (mine._own / f"{n}-cache" for n in ("whole", "half"))
    for file in (whole, half):
        file.write_bytes(b"x")
    os.utime(whole, (0, time.time() - 60))
    mine.publish()
    assert {p.name for p in tmp_path.glob("*-cache")} == {"whole-cache"}
    assert whole.stat().st_nlink == 2
    # Another process, meanwhile, takes it for no abandoned one.
    programs._remove_abandoned(tmp_path)
    assert half.exists()
    mine.publish(0)
    mine._lock.release()
    programs._remove_abandoned(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"whole-cache", "half-cache"}


def test_the_oldest_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "MAX_BYTES", 25)
    for age, name in enumerate(("new", "old", "older")):
        file = tmp_path / f"{name}-cache"
        file.write_bytes(b"0123456789")
        os.utime(file, (time.time() - 1000 * age,) * 2)
    programs._shrink(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"new-cache", "old-cache"}


@pytest.mark.parametrize("mode", [0o777, 0o500])
def test_a_folder_that_is_not_this_users_alone(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = programs._shared_folder()
    assert folder is not None
    folder.chmod(mode)
    if mode == 0o777:
        assert programs._shared_folder() is None
    monkeypatch.setattr(programs, "_programs", None)
    with monkeypatch.context() as patch:
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", None)
        patch.setattr(programs.os, "link", refuse)
        (folder / "one-cache").touch()
        programs.keep()
        assert jax.config.jax_compilation_cache_dir is None
        jax.config.update("jax_compilation_cache_dir", before)


def refuse(*arguments):
    raise PermissionError


def test_where_the_user_keeps_it_it_stays(start, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    counts_of(start("run", jax_compilation_cache_dir=str(elsewhere)))
    assert not (tmp_path / "cache" / "legato").exists()
