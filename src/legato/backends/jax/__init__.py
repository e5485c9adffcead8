"""The engine's verbs on JAX.

`scope` holds the values of variables while a step is traced, `gradient`
differentiates, `loop` compiles.
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import keras
import numpy as np

from legato.backends.jax import ahead, gradient, loop, programs
from legato.backends.jax.scope import StepScope
from legato.backends.protocol import Backend
from legato.types import JSON


class JaxBackend(Backend):
    """See `Backend`."""

    name = "jax"
    overlaps = "device"
    modes = ("fused", "stepwise")
    host_steps = 4

    # Not methods that call these: few frames should lie above the user's.
    compile_loop = staticmethod(loop.compile_loop)  # pyright: ignore[reportAssignmentType]
    value_and_grad = staticmethod(gradient.value_and_grad)  # pyright: ignore[reportAssignmentType]

    def keep_programs(self) -> None:
        programs.keep()

    def publish_programs(self) -> None:
        programs.publish()

    def read(self, variables: Sequence[keras.Variable]) -> list[np.ndarray]:
        values = list(map(ahead.value_of, variables))
        if jax.default_backend() != "cpu":
            for value in values:  # arrays: nothing is run ahead here
                # All transfers start before the first is waited for.
                value.copy_to_host_async()
        return [np.asarray(value) for value in values]

    def write(
        self, variables: Sequence[keras.Variable], values: Sequence[np.ndarray]
    ) -> None:
        for variable, value in zip(variables, values, strict=True):
            # A copy of ours, for JAX keeps the caller's memory where that is
            # aligned, also with `may_alias=False` (0.10.2): what he writes
            # there later would be the variable's value. (And not
            # `jnp.array(copy=True)`, which compiles a program for each shape.)
            variable._value = jax.device_put(np.array(value))

    def compile_reading(
        self, compute: Callable[[], Any], variables: Sequence[keras.Variable]
    ) -> Callable[[Sequence[np.ndarray]], Any]:
        with StepScope() as scope:
            compute()  # tells what it reads
        given = set(map(id, variables))
        others = [v for key, v in scope.read.items() if key not in given]
        all_variables = [*variables, *others]

        @jax.jit
        def run(values: list[Any]) -> Any:
            with StepScope(zip(all_variables, values, strict=True)):
                return compute()

        return lambda values: run([*values, *(v._value for v in others)])

    def to_host(self, logs: Any, num_steps: int) -> np.ndarray:
        if isinstance(logs, list):
            if len(logs) == 1:  # as a callback that acts at each batch has it
                return np.asarray(logs[0])[None]
            return np.stack(jax.device_get(logs))
        return np.asarray(logs)[:num_steps]

    def place(self, arrays: Any) -> Any:
        return jax.device_put(arrays)

    def lost_variables(
        self, variables: Sequence[keras.Variable]
    ) -> list[keras.Variable]:
        return [v for v in variables if v._value.is_deleted()]

    def canonical_dtype(self, dtype: np.dtype) -> np.dtype:
        return np.dtype(jax.dtypes.canonicalize_dtype(dtype))

    def get_random_state(self) -> dict[str, np.ndarray]:
        return {}  # JAX has no generator of its own

    def set_random_state(self, state: Mapping[str, np.ndarray]) -> None:
        del state

    def unrepeatable(self) -> list[str]:
        flag = "--xla_gpu_deterministic_ops=true"
        flags = os.environ.get("XLA_FLAGS", "")
        if jax.default_backend() != "gpu" or flag in flags:
            return []
        return [
            "on a GPU XLA may use operations whose results vary: set the "
            f"environment variable XLA_FLAGS={flag} before Python starts"
        ]

    def fingerprint(self) -> dict[str, JSON]:
        devices = jax.local_devices()
        config: Any = jax.config  # its flags are not typed
        return {
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "device": devices[0].device_kind,
            "devices": len(devices),
            "platform": jax.default_backend(),
            "machine": platform.machine(),
            "x64": bool(config.jax_enable_x64),
            "matmul_precision": str(config.jax_default_matmul_precision),
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            # The number of threads of XLA:CPU.
            "NPROC": os.environ.get("NPROC", ""),
        }
