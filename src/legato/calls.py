"""Calls of compiled loops, which let Python go on meanwhile if they can."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from legato import backends
from legato.backends import CompiledLoop
from legato.data import Chunk


class Calls:
    """Calls compiled loops, one after another.

    On JAX a call returns while the device is at work. On TensorFlow it does
    not, but another thread may make it; to hand it over takes time, so it is
    done only where this thread has something to do meanwhile. On PyTorch a
    step may be Python, and nothing else can be done.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    @property
    def in_thread(self) -> bool:
        """Whether another thread makes them."""
        return self._thread is not None

    @property
    def do_overlap(self) -> bool:
        """Whether there is time while one is at work."""
        return self.in_thread or backends.current().overlaps == "device"

    def make_overlap(self) -> None:
        """There will be something to do while a call is at work."""
        if self._thread is None and backends.current().overlaps == "thread":
            self._thread = ThreadPoolExecutor(
                1, thread_name_prefix="legato-calls"
            )

    def begin(self, loop: CompiledLoop, step: int, chunk: Chunk) -> Any:
        """Call a loop for all steps of a chunk; for `result`."""
        arguments = step, chunk.num_batches, chunk.operands
        if self._thread is None or loop.runs_python:
            return loop(*arguments)
        return self._thread.submit(loop, *arguments)

    def result(self, begun: Any) -> Any:
        """What the loop returned, or raised."""
        return begun.result() if isinstance(begun, Future) else begun

    def close(self) -> None:
        """Wait for what was begun, and overlap no more."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
