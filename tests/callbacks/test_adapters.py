"""Each of Keras's callbacks, cut at every checkpoint of a training."""

import json

import keras
import pytest
from driving import (
    PARAMS,
    check_every_cut,
    events,
    finish,
    make_model,
    outcome,
    start,
)

from legato.callbacks import CallbackRunner
from legato.errors import ConfigError, DamagedError, ExactnessWarning

callbacks = keras.callbacks


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"patience": 2, "restore_best_weights": True},
        {"monitor": "accuracy", "mode": "max", "patience": 1, "min_delta": 0.2},
        {"patience": 4, "min_delta": 0.3, "start_from_epoch": 1},
        {"baseline": 1.2, "patience": 3},
    ],
)
def test_early_stopping(kwargs):
    check_every_cut(lambda model: [callbacks.EarlyStopping(**kwargs)])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"patience": 1},
        {"patience": 1, "factor": 0.5, "min_delta": 0.3, "cooldown": 1},
        {"monitor": "val_accuracy", "mode": "max", "patience": 2},
    ],
)
def test_reduce_lr(kwargs):
    runner = check_every_cut(
        lambda model: [
            callbacks.ReduceLROnPlateau(**kwargs),
            callbacks.History(),
        ]
    )
    rates = runner.callbacks[1].history["learning_rate"]
    assert len(rates) == PARAMS["epochs"] and rates[-1] < 0.5


def test_the_direction_of_a_task_metric():
    def make(model):
        return [
            callbacks.EarlyStopping("val_score", patience=3),
            callbacks.EarlyStopping("val_score", mode="min"),
            callbacks.ReduceLROnPlateau("score"),
            callbacks.EarlyStopping("other"),
        ]

    model = make_model()
    runner = CallbackRunner(
        make(model),
        model=model,
        params=PARAMS,
        metric_directions={"score": "max"},
    )
    modes = [callback.mode for callback in runner.callbacks]
    assert modes == ["max", "min", "max", "auto"]
    with pytest.raises(ConfigError, match="up"):
        CallbackRunner(
            make(model),
            model=model,
            params=PARAMS,
            metric_directions={"score": "up"},
        )


def test_another_mode_than_before_is_not_restored():
    runner, model = start(
        lambda model: [callbacks.EarlyStopping(mode="min", patience=9)],
        resuming=False,
    )
    finish(runner, model, events())
    tree, arrays = runner.get_state()
    runner, model = start(
        lambda model: [callbacks.EarlyStopping(mode="max", patience=9)],
        resuming=True,
    )
    with pytest.warns(ExactnessWarning, match="min of 'val_loss'"):
        audit = runner.set_state(tree, arrays)
    assert audit[0].status == "not resumable"
    assert runner.callbacks[0].best is None


@pytest.mark.parametrize(
    "kwargs",
    [
        {"save_best_only": True},
        {"save_freq": 2},
        {"save_freq": 4, "save_weights_only": True},
        {"save_best_only": True, "initial_value_threshold": 1.1},
    ],
)
def test_model_checkpoint(tmp_path, kwargs):
    end = ".weights.h5" if kwargs.get("save_weights_only") else ".keras"
    path = tmp_path / ("{epoch}" + end)

    def make(model):
        for old in tmp_path.iterdir():
            old.touch()
        return [callbacks.ModelCheckpoint(path, **kwargs)]

    runner = check_every_cut(
        make, lambda: sorted(p.name for p in tmp_path.iterdir())
    )
    assert runner.batch_hooks_active == ("save_freq" in kwargs)


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("before", [None, "", "epoch,old\r\n0,1\r\n"])
def test_csv_logger(tmp_path, append, before):
    path = tmp_path / "log.csv"

    def fresh(make, *, resuming, **kwargs):
        if not resuming:
            path.unlink(missing_ok=True)
            if before is not None:
                path.write_text(before, newline="")
        return start(make, resuming=resuming, **kwargs)

    check_every_cut(
        lambda model: [
            callbacks.CSVLogger(path, append=append),
            callbacks.ReduceLROnPlateau(patience=1),
        ],
        path.read_bytes,
        start=fresh,
    )
    rows = path.read_text().splitlines()
    headers = sum(row.startswith("epoch") for row in rows)
    assert headers == 1 and "learning_rate" not in rows[0]


def test_csv_logger_never_loses_a_row_while_resuming(tmp_path):
    path = tmp_path / "log.csv"

    def make(model):
        return [callbacks.CSVLogger(path)]

    runner, model = start(make, resuming=False)
    saved = finish(runner, model, list(events()), cut=9, further=8)
    counted = json.loads(saved[0])["callbacks"]["CSVLogger.0"]
    size = counted["adapter"]["objects"][0]["items"][0][1]
    rows = path.read_bytes()
    assert 0 < size < len(rows)
    for _ in range(3):  # killed between the two, again and again
        runner, model = start(make, resuming=True)
        assert path.read_bytes() == rows
        assert runner.callbacks[0].append is False
    for _ in range(3):  # killed after both
        runner, model = start(make, resuming=True)
        runner.set_state(json.loads(saved[0]), saved[1])
        assert path.read_bytes() == rows[:size]


def test_csv_logger_whose_file_was_cut(tmp_path):
    path = tmp_path / "log.csv"

    def make(model):
        return [callbacks.CSVLogger(path)]

    runner, model = start(make, resuming=False)
    saved = finish(runner, model, list(events()), cut=14)
    path.write_text("epoch\n")
    runner, model = start(make, resuming=True)
    with pytest.warns(ExactnessWarning, match="rows were removed"):
        audit = runner.set_state(json.loads(saved[0]), saved[1])
    assert audit[0].status == "not resumable"
    finish(runner, model, list(events())[15:])
    assert path.read_text().startswith("epoch\n3,")


def test_a_new_csv_logger_empties_its_file_as_ever(tmp_path):
    path = tmp_path / "log.csv"
    runner, model = start(lambda model: [], resuming=False)
    tree, arrays = runner.get_state()
    path.write_text("epoch,old\n")
    runner, model = start(
        lambda model: [callbacks.CSVLogger(path)], resuming=True
    )
    audit = runner.set_state(tree, arrays)
    assert audit[0].status == "new"
    finish(runner, model, events())
    assert path.read_text().startswith("epoch,accuracy,loss")


@pytest.mark.parametrize("on_epoch", [False, True])
def test_swap_ema_weights(on_epoch):
    check_every_cut(
        lambda model: [callbacks.SwapEMAWeights(swap_on_epoch=on_epoch)]
    )


def test_learning_rate_scheduler_with_state():
    def make(model):
        calls = 0

        def schedule(epoch, rate):
            nonlocal calls
            calls += 1
            return rate * 0.9 if calls % 2 else rate

        class Schedule:
            def __init__(self):
                self.rates = []

            def __call__(self, epoch, rate):
                self.rates.append(rate)
                return rate * (0.5 if len(self.rates) == 4 else 1.0)

        return [
            callbacks.LearningRateScheduler(schedule),
            callbacks.LearningRateScheduler(Schedule()),
        ]

    check_every_cut(make)


def test_lambda_callback_with_closures():
    def make(model):
        batches, total = 0, [0.0]

        def on_batch(batch, logs):
            nonlocal batches
            batches += 1
            total[0] += logs["loss"]

        def on_epoch(epoch, logs):
            logs["batches"] = float(batches)
            logs["mean"] = total[0] / batches

        return [
            callbacks.LambdaCallback(
                on_train_batch_end=on_batch, on_epoch_end=on_epoch
            ),
            callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: None),
            callbacks.History(),
        ]

    runner = check_every_cut(make)
    assert runner.callbacks[2].history["batches"] == [3, 6, 9, 12, 15, 18]


def test_history_and_progress_bar(capsys):
    runner = check_every_cut(
        lambda model: [
            callbacks.History(),
            callbacks.ProgbarLogger(),
        ]
    )
    assert runner.callbacks[0].epoch == list(range(PARAMS["epochs"]))
    assert not runner.batch_hooks_active
    assert not runner.test_batch_hooks_active


class FakeSummary:
    """Stands for `tensorflow.summary`, which is not installed."""

    def __init__(self, path=None, log=None):
        self.path, self.log = path, [] if log is None else log

    def create_file_writer(self, path):
        return FakeSummary(path, self.log)

    def as_default(self, step=None):
        return self

    def record_if(self, test):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def close(self):
        pass

    def scalar(self, name, value, step):
        self.log.append((name, int(step)))


@pytest.mark.parametrize("freq", ["epoch", 1])
@pytest.mark.parametrize("speed", [False, True])
def test_tensorboard_counters(tmp_path, freq, speed):
    def make(model):
        board = callbacks.TensorBoard(
            tmp_path,
            write_graph=False,
            update_freq=freq,
            write_steps_per_second=speed,
        )
        board._summary_module = FakeSummary()
        return [board]

    runner = check_every_cut(make)
    active = freq != "epoch" or speed
    assert runner.batch_hooks_active == active
    board = runner.callbacks[0]
    assert board._global_train_batch == (18 if active else 0)


def test_tensorboard_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="tensorflow"):
        start(lambda model: [callbacks.TensorBoard(tmp_path)], resuming=False)


def test_backup_and_restore_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"BackupAndRestore\.0 is not needed"):
        start(
            lambda model: [callbacks.BackupAndRestore(tmp_path)], resuming=False
        )


class PatientStopping(callbacks.EarlyStopping):
    """Adds to its patience, which is state then."""

    def __init__(self):
        super().__init__(patience=1)
        self.extended = {}

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if self.wait == 1:
            self.patience += 1
            self.extended[epoch] = self.patience


class CountingLogger(callbacks.CSVLogger):
    def __init__(self, path):
        super().__init__(path)
        self.batches = 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, {**logs, "batches": self.batches})


def test_subclasses(tmp_path):
    path = tmp_path / "log.csv"
    runner = check_every_cut(
        lambda model: [PatientStopping(), CountingLogger(path)], path.read_bytes
    )
    assert runner.batch_hooks_active


def test_what_the_constructor_was_given_is_not_state():
    runner, model = start(
        lambda model: [callbacks.EarlyStopping(patience=9)], resuming=False
    )
    finish(runner, model, events())
    tree, arrays = runner.get_state()
    runner, _ = start(
        lambda model: [callbacks.EarlyStopping(patience=20)], resuming=True
    )
    runner.set_state(tree, arrays)
    assert runner.callbacks[0].patience == 20
    assert outcome(runner, model)[0] == json.dumps(tree, indent=1)


def test_notes_of_a_process_that_left_no_checkpoint(tmp_path):
    path, notes = tmp_path / "log.csv", tmp_path / "callbacks.json"
    path.write_text("epoch,loss\r\n7,1.0\r\n", newline="")
    before = path.read_bytes()

    def make(model):
        return [callbacks.CSVLogger(path, append=True)]

    for _ in range(3):  # each of them dies
        runner, model = start(make, resuming=False, notes=notes)
        assert path.read_bytes() == before
        finish(runner, model, events())
        assert path.read_bytes().count(b"\r\n") == 8
        runner.close()
        assert runner.callbacks[0].csv_file.closed
    tree, arrays = runner.get_state()
    # A checkpoint that knows it: the note is not asked any more, ...
    runner, model = start(make, resuming=True, notes=notes)
    runner.set_state(tree, arrays)
    assert path.read_bytes().count(b"\r\n") == 8
    # ... also if it was not in the run for a while.
    without = start(lambda model: [], resuming=False)[0].get_state()
    runner, model = start(make, resuming=True, notes=notes)
    runner.set_state(*without)
    assert path.read_bytes().count(b"\r\n") == 8
    # But it is noted now, with what is there.
    finish(runner, model, events())
    runner, model = start(make, resuming=True, notes=notes)
    runner.set_state(*without)
    assert path.read_bytes().count(b"\r\n") == 8


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format":1,"token":"../x","notes":{}}', '{"format":2}'],
)
def test_damaged_notes(tmp_path, text):
    notes = tmp_path / "callbacks.json"
    notes.write_text(text)
    with pytest.raises(DamagedError, match=r"callbacks\.json"):
        start(
            lambda model: [callbacks.CSVLogger(tmp_path / "x")],
            resuming=False,
            notes=notes,
        )


def board_files(log_dir):
    return sorted(path for path in log_dir.rglob("*tfevents*"))


def test_tensorboard_leaves_no_writer_behind(tmp_path):
    tf = pytest.importorskip("tensorflow")

    def make(model):
        return [callbacks.TensorBoard(tmp_path / "logs", update_freq=1)]

    model = make_model()
    CallbackRunner(make(model), model=model, params=PARAMS)
    assert not board_files(tmp_path)  # nothing was trained
    runner, model = start(
        make, resuming=False, notes=tmp_path / "callbacks.json"
    )
    assert tf.summary.should_record_summaries()
    runner.close()
    runner.close()
    assert not tf.summary.should_record_summaries()


def test_tensorboard_that_moved_or_was_cut(tmp_path):
    pytest.importorskip("tensorflow")
    notes = tmp_path / "callbacks.json"

    def make(name):
        return lambda model: [callbacks.TensorBoard(tmp_path / name)]

    runner, model = start(make("one"), resuming=False, notes=notes)
    finish(runner, model, events())
    tree, arrays = runner.get_state()
    runner.close()
    files = board_files(tmp_path / "one")
    sizes = [path.stat().st_size for path in files]

    runner, _ = start(make("two"), resuming=True, notes=notes)
    with pytest.warns(ExactnessWarning, match="log_dir is"):
        audit = runner.set_state(tree, arrays)
    runner.close()
    assert audit[0].status == "restored" and "log_dir" in audit[0].detail
    assert [path.stat().st_size for path in files] == sizes

    files[0].write_bytes(files[0].read_bytes()[:50])
    runner, _ = start(make("one"), resuming=True, notes=notes)
    with pytest.warns(ExactnessWarning, match="are missing or were cut"):
        runner.set_state(tree, arrays)
    runner.close()
