"""After a resume no log holds a line twice, nor one from the future."""

import csv
import json
import os
import signal
import warnings
from collections import Counter

import keras
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

import legato
from tests.contracts.scenarios import Classifier
from tests.processes import Forked

EPOCH = 5  # steps


class Count(keras.callbacks.Callback):
    """Kills the process, or looks at the logs when it was resumed."""

    def __init__(self, run_dir, kill_at, report):
        super().__init__()
        self._run_dir = run_dir
        self._kill_at = kill_at
        self._report = report
        self._is_first = True

    def on_train_batch_begin(self, batch, logs=None):
        if self._is_first and self._report is not None:
            step = int(self.model.optimizer.iterations)
            found = {"resumed_at": step, **logged(self._run_dir)}
            self._report.write_text(json.dumps(found))
        self._is_first = False

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def get_state(self):
        return {}

    def set_state(self, state):
        del state


def logged(run_dir):
    """The steps, or epochs, of all that was logged, in order."""
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    records = [json.loads(line) for line in lines]
    found = {"metrics": [[r["kind"], r["step"]] for r in records]}
    with open(run_dir / "log.csv") as file:
        found["csv"] = [int(row["epoch"]) for row in csv.DictReader(file)]
    for name in ("summaries/train", "summaries/validation", "tb/train"):
        if not (run_dir / name).exists():
            continue
        events = EventAccumulator(
            str(run_dir / name), size_guidance={"scalars": 0, "tensors": 0}
        )
        events.Reload()
        tags = events.Tags()
        found[name] = [
            [tag, event.step]
            for kind, read in (
                ("scalars", events.Scalars),
                ("tensors", events.Tensors),
            )
            for tag in tags[kind]
            for event in read(tag)
        ]
    return found


def train(run_dir, kill_at, report):
    callbacks = [
        keras.callbacks.CSVLogger(str(run_dir / "log.csv")),
        Count(run_dir, kill_at, report),
    ]
    if keras.config.backend() == "tensorflow":
        # (Elsewhere it would import TensorFlow for this alone.)
        callbacks.insert(
            1, keras.callbacks.TensorBoard(str(run_dir / "tb"), update_freq=1)
        )
    trainer = legato.Trainer(
        Classifier(),
        run_dir=run_dir,
        config=legato.TrainerConfig(
            train_steps=20,
            validation_interval=3,
            checkpoint_interval=4,
            summary_interval=1,
            progress="none",
        ),
        callbacks=callbacks,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()


def test_no_line_twice_and_none_from_the_future(tmp_path):
    run_dir = tmp_path / "run"
    # After an epoch's end and a validation since the last checkpoint; then
    # twice between the same two.
    for kill_at in (11, 10, 18, None):
        report = tmp_path / f"{kill_at}.json"
        process = Forked(train, run_dir, kill_at, report, side="other")
        _, err = process.communicate()
        expected = 0 if kill_at is None else -signal.SIGKILL
        assert process.returncode == expected, err
        seen = json.loads(report.read_text())
        step = seen.pop("resumed_at")
        for name, entries in seen.items():
            keys = [tuple(e) if isinstance(e, list) else e for e in entries]
            assert max(Counter(keys).values(), default=1) == 1, name
            if name == "csv":
                assert all(epoch < step / EPOCH for epoch in entries)
            else:
                assert all(at <= step for _, at in entries), (name, step)
    whole = tmp_path / "whole"
    process = Forked(train, whole, None, tmp_path / "whole.json", side="one")
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert logged(run_dir) == logged(whole)
    assert len(logged(run_dir)["metrics"]) > 20
