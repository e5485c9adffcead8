"""Worker processes of other libraries, and how they end with this one.

What `multiprocessing` starts as a daemon is ended when its parent exits. Where
that was killed, it waits for ever, with all its memory.
"""

import contextlib
import multiprocessing
import subprocess
import weakref

# Its input ends when the process that writes there does, however that ends.
_SHELL = (
    'all=; while read -r pid; do all="$all $pid"; done; '
    '[ -z "$all" ] || kill -KILL $all'
)


class Guard:
    """Ends daemons that are started from now on when this process is gone.

    A small process of its own waits for that.
    """

    def __init__(self) -> None:
        self._known = _daemons()
        self._shell: subprocess.Popen[bytes] | None = None

    def watch(self) -> None:
        """Look which there are; to be called when some may have begun."""
        new = _daemons() - self._known
        if not new:
            return
        self._known |= new
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
        with contextlib.suppress(BrokenPipeError):  # somebody ended it
            self._shell.stdin.write("".join(f"{pid}\n" for pid in new).encode())
            self._shell.stdin.flush()

    def close(self) -> None:
        """They have ended, or are left to whoever started them; idempotent."""
        if self._shell is not None:
            self._finalizer()


def _daemons() -> set[int]:
    children = multiprocessing.active_children()
    return {c.pid for c in children if c.daemon and c.pid is not None}


def _end(shell: subprocess.Popen[bytes]) -> None:
    shell.kill()
    shell.wait()
    assert shell.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        shell.stdin.close()
