"""Processes that start in a tenth of a second, with Keras imported.

They are forked from a server that has Keras and all backends imported and no
device initialised. What a new interpreter alone has (another hash seed, its
own imports) is what `subprocess` is for.
"""

import functools
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

ENOUGH = "torch"
"""What knows no backend is the same on every one, and is tried on this alone:
PyTorch compiles little, and its tests are the quickest."""

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


def is_alive(pid: int) -> bool:
    """Whether a process runs: not one that ended and nobody waited for."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


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

    Half of the time that small programs take goes into XLA's newer emitters on
    JAX, and an eighth into Grappler on TensorFlow.
    """
    if os.environ["KERAS_BACKEND"] == "jax":
        import jax
        from jax._src import compiler

        jax.config.update("jax_disable_most_optimizations", quickly)
        # (JAX has no public way to say it but `XLA_FLAGS`, which is read once.)
        own = _options()
        compiler.get_compile_options = _quick_options if quickly else own
    elif os.environ["KERAS_BACKEND"] == "tensorflow":
        import tensorflow as tf

        tf.config.optimizer.set_experimental_options(
            {"disable_meta_optimizer": quickly}
        )


@functools.cache
def _options() -> Callable[..., Any]:
    """JAX's own function."""
    from jax._src import compiler

    return compiler.get_compile_options


def _quick_options(*arguments: Any, **options: Any) -> Any:
    overrides = dict(options.pop("env_options_overrides", None) or {})
    overrides["xla_cpu_use_fusion_emitters"] = False
    return _options()(*arguments, env_options_overrides=overrides, **options)


def use_several_threads() -> None:
    """Compute with more than the one thread that the tests have otherwise."""
    if os.environ["KERAS_BACKEND"] == "torch":
        import torch

        torch.set_num_threads(2)
