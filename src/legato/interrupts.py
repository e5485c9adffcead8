"""Signals that ask a run to stop, honoured where nothing is half done."""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from legato.errors import Interrupted, Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

PATIENCE_SECS = 10.0
"""How long the data may give nothing after a signal that asks to stop."""

_DATA = "legato.data."
_POLL_SECS = 0.25


class Interrupts:
    """While active: a signal sets a flag that the loop reads.

    A signal that the process ignores stays ignored. A second Ctrl-C raises
    KeyboardInterrupt at once. A watcher thread ends the process with status 75
    where the main thread cannot: while it is `compiling`, for minutes perhaps,
    and has nothing new to save; and where it waits for batches that do not
    come, in a library's code that hears no signal, for `PATIENCE_SECS`. (What
    was done since the newest checkpoint is then done again.)

    Signals can be received in the main thread only: elsewhere this does
    nothing but watch the time.

    Args:
        max_seconds: ask to stop after so long; None for no limit.
        clock: seconds, monotonic.

    Attributes:
        before_exit: called by the watcher before it ends the process.
        compiling: set it around calls that may compile for long.
    """

    def __init__(
        self,
        *,
        max_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.before_exit: Callable[[], None] = lambda: None
        self.compiling = False
        self._signal: signal.Signals | None = None
        self._heard = 0
        self._clock = clock
        self._deadline = None if max_seconds is None else clock() + max_seconds
        self._old_handlers: dict[int, Any] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._old_fd = -1

    @property
    def reason(self) -> str | None:
        """Why to stop: a signal's name, "max_time", or None."""
        self._heard += 1
        if self._signal is not None:
            return self._signal.name
        if self._deadline is not None and self._clock() >= self._deadline:
            return "max_time"
        return None

    def error(self, done: str) -> Stopped | Interrupted:
        """What to raise when it has stopped.

        Args:
            done: what was done by then: the end of a sentence.
        """
        reason = self.reason
        kind = Interrupted if reason == "SIGINT" else Stopped
        return kind(f"{reason}: {done} Run it again to go on.")

    def is_asked(self) -> bool:
        """Whether there is a reason to stop."""
        return self.reason is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        # Handlers run in the main thread between bytecodes, so not during a
        # compilation; this socket is written by C code at once.
        self._sockets = socket.socketpair()
        for end in self._sockets:
            end.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(
            self._sockets[1].fileno(), warn_on_full_buffer=False
        )
        self._sockets[0].setblocking(True)
        threading.Thread(
            target=self._watch, name="legato-signals", daemon=True
        ).start()
        for number in _SIGNALS:
            # What was started in the background, say, ignores Ctrl-C: it is
            # meant for another program.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._sockets is None:
            return
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._sockets[1].close()  # the watcher reads the end and returns

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        again = self._signal is not None
        self._signal = signal.Signals(number)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        assert self._sockets is not None
        asked = ""
        with self._sockets[0] as reader:
            while received := self._receive(reader, asked):
                # Ending the process would take a notebook or a REPL with it.
                mild = received == signal.SIGINT and hasattr(sys, "ps1")
                if received not in _SIGNALS or mild:
                    continue
                asked = signal.Signals(received).name
                if self.compiling:
                    self._exit(
                        f"{asked} while compiling: stopped; nothing new was to "
                        "be saved."
                    )

    def _receive(self, reader: socket.socket, asked: str) -> int:
        """The next signal's number, 0 at the end; looks after the data.

        Args:
            reader: of the signals.
            asked: the name of one that asks to stop; empty: there was none.
        """
        if not asked:
            return ord(reader.recv(1) or b"\0")
        reader.settimeout(_POLL_SECS)
        began, heard = time.monotonic(), self._heard
        while True:
            try:
                return ord(reader.recv(1) or b"\0")
            except TimeoutError:
                pass
            where = _where_data_wait()
            if heard != self._heard or not where:
                began, heard = time.monotonic(), self._heard
            elif time.monotonic() - began >= PATIENCE_SECS:
                self._exit(
                    f"{asked} while waiting for the data, which gave nothing "
                    f"for {PATIENCE_SECS:g} s: stopped at the newest "
                    "checkpoint; what was done since is done again. They were "
                    f"waited for here:\n{where}"
                )

    def _exit(self, why: str) -> None:
        self.before_exit()
        sys.stderr.write(f"legato: {why} Run it again to go on.\n")
        sys.stderr.flush()
        os._exit(Stopped.CODE)


def _where_data_wait() -> str:
    """Where the main thread is, if it is making a batch; else nothing."""
    thread = threading.main_thread().ident
    assert thread is not None
    frame = sys._current_frames().get(thread)
    stack = list(traceback.walk_stack(frame))
    if not any(f.f_globals["__name__"].startswith(_DATA) for f, _ in stack):
        return ""
    return "".join(traceback.format_stack(frame))
