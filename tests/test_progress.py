import io
import math
import time

import pytest

from legato.progress import make_reporter


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


def drive(reporter, clock, seconds=4.0):
    """A run of 400 steps in 4 epochs, with a loop end every 40 steps."""
    reporter.start(400, 0, "digits on jax", epochs=4)
    for step in range(40, 401, 40):
        clock.now += seconds
        reporter.update(step, {"loss": 1 / step})
    reporter.epoch(4, 400, {"loss": 0.0025, "val_loss": math.nan})
    reporter.validation(400, {"val_accuracy": 0.75})
    reporter.finish(400)


def test_plain_lines(clock):
    stream = io.StringIO()
    drive(make_reporter("plain", stream=stream, clock=clock), clock)
    assert stream.getvalue().splitlines() == [
        "digits on jax",
        "step 120/400  epoch 2/4  10 steps/s  ETA 0:28  loss 0.008333",
        "step 240/400  epoch 3/4  10 steps/s  ETA 0:16  loss 0.004167",
        "step 360/400  epoch 4/4  10 steps/s  ETA 4.0 s  loss 0.002778",
        "epoch 4/4  step 400/400  10 steps/s  loss 0.0025  val_loss nan",
        "validation at step 400/400  val_accuracy 0.75",
        "done: step 400/400 after 0:40",
    ]


def test_the_first_line_waits_its_turn(clock):
    stream = io.StringIO()
    reporter = make_reporter("plain", stream=stream, clock=clock, interval=60)
    reporter.start(100)
    for step in range(100):
        clock.now += 0.5
        reporter.update(step, {})
    assert stream.getvalue() == ""


def test_a_resumed_run_says_so(clock):
    stream = io.StringIO()
    reporter = make_reporter("plain", stream=stream, clock=clock)
    reporter.start(400, 200)
    clock.now += 10
    reporter.update(210, {})
    reporter.finish(210, "stopped by SIGTERM")
    assert stream.getvalue().splitlines() == [
        "going on from step 200/400",
        "step 210/400  1 steps/s  ETA 3:10",
        "stopped by SIGTERM: step 210/400 after 0:10",
    ]


def test_an_unknown_length(clock):
    stream = io.StringIO()
    reporter = make_reporter("plain", stream=stream, clock=clock)
    reporter.start(None)
    clock.now += 10
    reporter.update(50_000, {"loss": 12345.6})
    assert stream.getvalue() == "step 50000  5,000 steps/s  loss 12,346\n"


def test_the_rate_forgets_the_compilation(clock):
    stream = io.StringIO()
    reporter = make_reporter("plain", stream=stream, clock=clock)
    reporter.start(1000)
    clock.now += 90  # compiling
    for step in range(0, 101):
        clock.now += 1
        reporter.update(step, {})
    assert "  1 steps/s" in stream.getvalue().splitlines()[-1]


def test_the_bar(clock):
    stream = Terminal()
    reporter = make_reporter("auto", stream=stream, clock=clock)
    drive(reporter, clock)
    shown = stream.getvalue()
    assert "400/400" in shown
    assert "10 steps/s" in shown
    assert "val_accuracy 0.75" in shown
    assert "done: step 400/400 after 0:40" in shown
    # The cursor is hidden while it lives, and shown again.
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_the_bar_takes_names_with_brackets_as_they_are(clock):
    stream = Terminal()
    reporter = make_reporter("rich", stream=stream, clock=clock)
    reporter.start(10, 0, "runs/[red]x[/nope]")
    reporter.message("[bold]text")
    reporter.finish(10)
    assert "runs/[red]x[/nope]" in stream.getvalue()
    assert "[bold]text" in stream.getvalue()


@pytest.mark.parametrize(
    ("mode", "stream", "term", "is_bar"),
    [
        ("auto", Terminal, "xterm", True),
        ("auto", Terminal, "dumb", False),
        ("auto", io.StringIO, "xterm", False),
        ("plain", Terminal, "xterm", False),
    ],
)
def test_auto_goes_by_the_terminal(
    clock, monkeypatch, mode, stream, term, is_bar
):
    monkeypatch.setenv("TERM", term)
    stream = stream()
    reporter = make_reporter(mode, stream=stream, clock=clock)
    drive(reporter, clock)
    assert ("\x1b[" in stream.getvalue()) == is_bar


def test_none_shows_nothing(clock, capsys):
    stream = Terminal()
    reporter = make_reporter("none", stream=stream, clock=clock)
    drive(reporter, clock)
    reporter.message("text")
    assert stream.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_it_writes_to_standard_error(clock, capsys):
    drive(make_reporter("plain", clock=clock), clock)
    out, err = capsys.readouterr()
    assert out == "" and "done: step 400/400" in err


@pytest.mark.parametrize("mode", ["plain", "rich", "none"])
def test_finish_twice_and_without_start(clock, mode):
    stream = io.StringIO()
    reporter = make_reporter(mode, stream=stream, clock=clock)
    reporter.finish(3)
    assert stream.getvalue() == ""
    drive(reporter, clock)
    shown = stream.getvalue()
    reporter.finish(400)
    reporter.update(400, {})
    assert stream.getvalue() == shown


@pytest.mark.parametrize("mode", ["plain", "rich"])
def test_a_closed_terminal_does_not_stop_training(clock, mode):
    drive(make_reporter(mode, stream=Gone(), clock=clock), clock)


@pytest.mark.parametrize("mode", ["plain", "rich", "none"])
def test_updates_are_cheap(mode):
    reporter = make_reporter(mode, stream=Terminal())
    reporter.start(20_000)
    began = time.thread_time()
    for step in range(20_000):
        reporter.update(step, {"loss": 1.0})
    # 20 microseconds each, measured at well under one.
    assert time.thread_time() - began < 0.4
    reporter.finish(20_000)
