"""Processes that start in a tenth of a second, with Keras imported.

They are forked from a server that has Keras and all backends imported and no
device initialised. What a new interpreter alone has (another hash seed, its
own imports) is what `subprocess` is for.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

SHARED = "LEGATO_TESTS_SHARED"
"""The variable that names the folder that the processes of all tests share."""

Side = Literal["one", "other"]
"""Of a comparison: that of the tests' own process and of runs that go through
in peace, and that of what is compared with these."""


def compiled_by(side: Side | None) -> str | None:
    """Where XLA keeps what was compiled on one side of a comparison.

    To compile takes four fifths of the time of a small run, and tests have
    many programs in common. Where a run and what is compared with it are on
    two sides, each program is compiled once on each, as it is for a user who
    goes on elsewhere.
    """
    shared = os.environ.get(SHARED)
    return f"{shared}/compiled-{side}" if shared and side else None


def context() -> Any:
    """Of the one server for all tests, which must preload the same."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.contracts.preloaded"])
    return found


class Forked:
    """A process whose output is read, as that of a `subprocess.Popen`.

    Args:
        target: what it runs; must be importable. What it returns is the
            status, if that is an int.
        *arguments: of that.
        cwd: where.
        env: more of the environment.
        side: of a comparison, which keeps what XLA compiled; None does not.
    """

    def __init__(
        self,
        target: Callable[..., Any],
        *arguments: Any,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        side: Side | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._files = [Path(self._folder.name, n) for n in ("out", "err")]
        for file in self._files:
            file.touch()
        self._process = context().Process(
            target=_run,
            args=(
                self._files,
                cwd,
                dict(env or {}),
                compiled_by(side),
                target,
                arguments,
            ),
        )
        self._process.start()
        self._lines_read = [0, 0]

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def read_line(self, *, err: bool = False, timeout_secs: float = 60) -> str:
        """The next line of its output, or of its errors."""
        until = time.monotonic() + timeout_secs
        while time.monotonic() < until:
            ended = self._process.exitcode is not None
            *lines, _ = self._files[err].read_text().split("\n")  # whole ones
            if len(lines) > self._lines_read[err]:
                self._lines_read[err] += 1
                return lines[self._lines_read[err] - 1]
            assert not ended, self._files[1].read_text()
            time.sleep(0.005)
        raise TimeoutError(self._files[1].read_text())

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Waits for its end; all that it wrote."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(self._files[1].read_text())
        out, err = (file.read_text() for file in self._files)
        return out, err


def _run(
    files: list[Path],
    cwd: Path | None,
    env: dict[str, str],
    compiled: str | None,
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    for number, file in enumerate(files, 1):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[attr-defined]
    os.environ.update(env)
    keep_compiled(compiled)
    if cwd is not None:
        os.chdir(cwd)
    status = target(*arguments)
    sys.exit(status if isinstance(status, int) else 0)


def run_script(path: Path) -> None:
    """As `python path` would."""
    sys.argv = [str(path)]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def run_legato(*arguments: str) -> int:
    """As `python -m legato ...` would."""
    from legato.cli import main

    sys.path.insert(0, "")
    return main(list(arguments))


def keep_compiled(folder: str | None) -> None:
    """Let XLA keep there what this process compiles; None keeps nothing."""
    if folder is not None and os.environ["KERAS_BACKEND"] == "jax":
        import jax

        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compile_quickly(quickly: bool) -> None:
    """Let the compiler optimise little, which takes less time; or all it can.

    As users do not: of both sides of a comparison, or of none.
    """
    if os.environ["KERAS_BACKEND"] == "jax":
        import jax

        jax.config.update("jax_disable_most_optimizations", quickly)
    elif os.environ["KERAS_BACKEND"] == "tensorflow":
        import tensorflow as tf

        tf.config.optimizer.set_experimental_options(
            {"disable_meta_optimizer": quickly}
        )


QUICK_XLA = {
    # Without the newer emitters: half of the time of a small program.
    "jax": ("--xla_cpu_use_fusion_emitters=false",),
    "tensorflow": (
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # Newer instructions compute half precision in another way than Eigen
        # does, with which compiled steps are compared.
        "--xla_cpu_max_isa=AVX2",
    ),
    "torch": (),
}
"""By backend, what XLA is told in the tests' processes and those they start.

It reads it once, when it compiles for the first time.
"""


def compile_as_users() -> None:
    """Compile with all optimisations; in a process that has not yet."""
    os.environ.pop("XLA_FLAGS", None)
    compile_quickly(False)


def use_several_threads() -> None:
    """Compute with more than the one thread that the tests have otherwise."""
    if os.environ["KERAS_BACKEND"] == "torch":
        import torch

        torch.set_num_threads(2)
