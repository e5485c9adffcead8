"""Signals, sent to real processes: when they act, and with what status."""

import functools
import signal
import subprocess
import sys
import time

import pytest

from legato.interrupts import Interrupts
from tests.processes import Forked

_LOOP = """
import sys, time
from legato.interrupts import Interrupts
with Interrupts() as interrupts:
    print("ready", flush=True)
    while interrupts.reason is None:
        time.sleep(0.01)
    print(interrupts.reason, flush=True)
    if len(sys.argv) > 1:
        time.sleep(60)
"""

_COMPILE = """
import hashlib
from legato.interrupts import Interrupts
with Interrupts() as interrupts:
    interrupts.before_exit = lambda: print("written", flush=True)
    interrupts.compiling = True
    print("ready", flush=True)
    # In C for a minute, without the interpreter's lock, as a compilation.
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**8)
"""


def run(code, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_a_reason_to_stop(name):
    process = run(_LOOP)
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=10)
    assert out == f"{name}\n" and process.returncode == 0


def test_a_second_ctrl_c_does_not_wait():
    process = run(_LOOP, "wait")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert "KeyboardInterrupt" in err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_during_a_compilation_the_process_ends_at_once(name):
    process = run(_COMPILE)
    time.sleep(0.1)
    began = time.monotonic()
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=10)
    assert time.monotonic() - began < 2
    assert process.returncode == 75
    assert out == "written\n" and "while compiling" in err


def test_handlers_are_put_back():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with Interrupts():
        assert signal.getsignal(signal.SIGTERM) not in before
    after = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    assert after == before


def test_the_time_is_a_reason_too():
    now = [100.0]
    interrupts = Interrupts(max_seconds=5, clock=lambda: now[0])
    assert interrupts.reason is None
    now[0] = 105.0
    assert interrupts.reason == "max_time"


EPOCH = 23
"""Steps in one of these runs."""


def train(run_dir, config, at_epoch_end):
    """Prints each epoch that ended."""
    import keras

    import legato
    from legato.tasks.digits import Digits

    class Tell(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            print(epoch, flush=True)
            at_epoch_end(epoch)

    legato.Trainer(
        Digits(),
        run_dir=run_dir,
        config=legato.TrainerConfig(**config),
        callbacks=[Tell()],
    ).train()


def train_to_be_stopped(run_dir, config, last, sent):
    """Waits for a file at the end of an epoch.

    Or all of it might have ended before it is stopped.
    """

    def at_epoch_end(epoch):
        while epoch == last and not sent.exists():
            time.sleep(0.005)

    train(run_dir, config, at_epoch_end)


def train_for_some_time(run_dir, config):
    """Of which the clock is started by the end of the first epoch."""
    from legato import trainer

    began = []

    def clock():
        return time.monotonic() - began[0] if began else 0.0

    def at_epoch_end(epoch):
        began[:] = began or [time.monotonic()]

    trainer.Interrupts = functools.partial(Interrupts, clock=clock)
    train(run_dir, config, at_epoch_end)


def test_a_stopped_run_goes_on_exactly(tmp_path):
    config = {
        "train_steps": 300,
        "validation_interval": 10,
        "checkpoint_interval": 20,
        "keep_last": None,
        "progress": "none",
    }
    for run_dir, stops in (("whole", 0), ("stopped", 3)):
        for number in range(stops + 1):
            sent = tmp_path / f"{run_dir}-{number}"
            process = Forked(
                train_to_be_stopped, tmp_path / run_dir, config,
                4 * number + 3, sent, side="one",
            )  # fmt: skip
            if number == stops:
                sent.touch()
            else:
                while int(process.read_line()) < 4 * number + 1:
                    pass
                process.send_signal(signal.SIGTERM)
                sent.touch()
            _, err = process.communicate(timeout=120)
            assert process.returncode == (75 if number < stops else 0), err
    for file in ("final/state.safetensors", "metrics.jsonl"):
        whole, stopped = (
            (tmp_path / run_dir / file).read_bytes()
            for run_dir in ("whole", "stopped")
        )
        assert whole == stopped, file


def test_max_time_ends_with_everything_saved(tmp_path):
    config = {
        "train_steps": 10**7,
        "torch_compile": False,  # it takes longer than all the rest
        "max_time": 0.3,
        "checkpoint_interval": 10**6,
        "progress": "none",
    }
    process = Forked(train_for_some_time, tmp_path / "run", config, side="one")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    names = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    (name,) = names
    epochs = [int(line) for line in out.splitlines()]
    assert epochs == list(range(len(epochs)))
    assert len(epochs) <= int(name[5:]) / EPOCH <= len(epochs) + 1
