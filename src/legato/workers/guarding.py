"""Worker processes of other libraries, and how they end with this one.

What `multiprocessing` starts as a daemon is ended when its parent exits. Where
that was killed, it waits for ever, with all its memory.
"""

import contextlib
import subprocess
import threading
import time
import weakref
from multiprocessing import process
from typing import Any

# Its input ends when the process that writes there does, however that ends.
_SHELL = (
    'all=; while read -r pid; do all="$all $pid"; done; '
    '[ -z "$all" ] || kill -KILL $all'
)


_OFTEN_SECS, _SELDOM_SECS = 0.02, 0.5
_SOON_SECS = 5.0


class Guard:
    """Ends daemons that are started from now on when this process is gone.

    A small process of its own waits for that. A thread tells it of them: they
    may begin at any time, and take seconds to become of use.
    """

    def __init__(self) -> None:
        self._known = _daemons()
        self._shell: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._looks_often_until = time.monotonic() + _SOON_SECS
        threading.Thread(
            target=_look_for_more,
            args=(weakref.ref(self),),
            name="legato-guard",
            daemon=True,
        ).start()

    def watch(self) -> float:
        """Look which there are; returns after how many seconds to look again.

        (0 when it is closed.)
        """
        with self._lock:
            if self._is_closed:
                return 0
            new = _daemons() - self._known
            now = time.monotonic()
            if new:
                self._known |= new
                self._tell(new)
                self._looks_often_until = now + _SOON_SECS
            return (
                _OFTEN_SECS if now < self._looks_often_until else _SELDOM_SECS
            )

    def _tell(self, new: set[int]) -> None:
        if self._shell is None:
            try:
                self._shell = subprocess.Popen(
                    ["/bin/sh", "-c", _SHELL],
                    stdin=subprocess.PIPE,
                    # Ctrl-C goes to a whole group of processes: not to this.
                    process_group=0,
                )
            except OSError:
                return  # there is no shell: nothing is worse than without us
            # A process that exits ends its daemons itself; by the time that
            # the shell did it their numbers might be others'.
            self._finalizer = weakref.finalize(self, _end, self._shell)
        assert self._shell.stdin is not None
        with contextlib.suppress(OSError):  # somebody ended it
            self._shell.stdin.write("".join(f"{pid}\n" for pid in new).encode())
            self._shell.stdin.flush()

    def close(self) -> None:
        """They have ended, or are left to whoever started them; idempotent."""
        with self._lock:
            self._is_closed = True
            if self._shell is not None:
                self._finalizer()


def _look_for_more(guard: "weakref.ref[Guard]") -> None:
    while (found := guard()) is not None:
        again = found.watch()
        del found  # it may be the last to hold it
        if not again:
            return
        time.sleep(again)


def _daemons() -> set[int]:
    # (`active_children()` also reaps those that ended, which is for the main
    # thread to do.)
    found: Any = process
    children = list(found._children)
    return {c.pid for c in children if c.daemon and c.pid is not None}


def _end(shell: subprocess.Popen[bytes]) -> None:
    shell.kill()
    shell.wait()
    assert shell.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        shell.stdin.close()
