"""The engine's verbs on TensorFlow.

State stays in native variables: `scope` sees what a traced step does with
them, `effects` finds in its graph what it reads and writes, `gradient`
differentiates (`reached` tells what a loss depends on), `loop` runs the graph,
which `xla` compiles (`philox` draws its random numbers then).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework import config as private_config

from legato.backends.protocol import Backend
from legato.backends.tensorflow import gradient, loop
from legato.types import JSON


class TensorFlowBackend(Backend):
    """See `Backend`.

    What a step draws with TensorFlow's own stateful generators is refused
    when it is traced, so that nothing is left unsaved.
    """

    name = "tensorflow"
    modes = ("fused", "compiled")
    overlaps = "thread"
    host_steps = 4

    # Not methods that call these: few frames should lie above the user's.
    compile_loop = staticmethod(loop.compile_loop)  # pyright: ignore[reportAssignmentType]
    value_and_grad = staticmethod(gradient.value_and_grad)  # pyright: ignore[reportAssignmentType]

    def read(self, variables: Sequence[keras.Variable]) -> list[np.ndarray]:
        # (`numpy()` would copy; `read_value()` is two operations.)
        return [np.asarray(v._value.value()) for v in variables]

    def write(
        self, variables: Sequence[keras.Variable], values: Sequence[np.ndarray]
    ) -> None:
        for variable, value in zip(variables, values, strict=True):
            # A constant holds a copy: TensorFlow may otherwise keep and, in
            # a variable, overwrite the caller's memory.
            variable._value.assign(tf.constant(value))
        loop.LOST.remove(variables)

    def compile_reading(
        self, compute: Callable[[], Any], variables: Sequence[keras.Variable]
    ) -> Callable[[Sequence[np.ndarray]], Any]:
        def run(*values: Any) -> Any:
            with keras.StatelessScope(zip(variables, values, strict=True)):
                return compute()

        traced: Any = tf.function(run, autograph=False)
        return lambda values: traced(*values)

    def to_host(self, logs: Any, num_steps: int) -> np.ndarray:
        return logs.numpy()[:num_steps]

    def place(self, arrays: Any) -> Any:
        if arrays is None:
            return None
        return keras.tree.map_structure(tf.constant, arrays)

    def lost_variables(
        self, variables: Sequence[keras.Variable]
    ) -> list[keras.Variable]:
        return loop.LOST.among(variables)

    def canonical_dtype(self, dtype: np.dtype) -> np.dtype:
        return np.dtype(dtype)

    def get_random_state(self) -> dict[str, np.ndarray]:
        return {}  # a step that uses TensorFlow's own generators is refused

    def set_random_state(self, state: Mapping[str, np.ndarray]) -> None:
        del state

    def unrepeatable(self) -> list[str]:
        on_gpu = tf.config.list_logical_devices("GPU")
        if not on_gpu or private_config.is_op_determinism_enabled():
            return []
        return [
            "on a GPU TensorFlow uses operations whose results vary: call "
            "tf.config.experimental.enable_op_determinism() at the start"
        ]

    def fingerprint(self) -> dict[str, JSON]:
        threads = tf.config.threading
        devices = tf.config.list_logical_devices()
        kinds = {
            tf.config.experimental.get_device_details(d).get("device_name", "")
            for d in tf.config.list_physical_devices("GPU")
        }
        return {
            "tensorflow": tf.__version__,
            "devices": [device.device_type for device in devices],
            "device_kinds": sorted(kinds),
            # 0 stands for the number of CPUs.
            "inter_op_threads": threads.get_inter_op_parallelism_threads(),
            "intra_op_threads": threads.get_intra_op_parallelism_threads(),
            # There is no public way to ask.
            "op_determinism": private_config.is_op_determinism_enabled(),
            "tensor_float_32": (
                tf.config.experimental.tensor_float_32_execution_enabled()
            ),
            "jit": str(tf.config.optimizer.get_jit()),
            "optimizer_options": dict(
                tf.config.optimizer.get_experimental_options()
            ),
            **{
                name: os.environ.get(name, "")
                for name in (
                    "TF_ENABLE_ONEDNN_OPTS",
                    "TF_DETERMINISTIC_OPS",
                    "TF_XLA_FLAGS",
                    "XLA_FLAGS",
                    "ONEDNN_MAX_CPU_ISA",
                    "TF_OVERRIDE_GLOBAL_THREADPOOL",
                )
            },
        }
