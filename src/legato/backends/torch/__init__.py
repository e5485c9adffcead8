"""The engine's verbs on PyTorch.

`step` runs one step in a `scope` that holds the values of its variables,
`gradient` differentiates, `loop` examines a step and runs it many times, and
`program` compiles it.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import torch

from legato.backends.protocol import Backend
from legato.backends.torch import arrays as tensors
from legato.backends.torch import gradient, loop, randomness
from legato.backends.torch.step import LOST
from legato.types import JSON


class TorchBackend(Backend):
    """See `Backend`."""

    name = "torch"
    modes = ("eager", "compiled")
    host_steps = 1

    # Not methods that call these: few frames should lie above the user's.
    compile_loop = staticmethod(loop.compile_loop)  # pyright: ignore[reportAssignmentType]
    value_and_grad = staticmethod(gradient.value_and_grad)  # pyright: ignore[reportAssignmentType]

    def read(self, variables: Sequence[keras.Variable]) -> list[np.ndarray]:
        return [tensors.to_numpy(v._value, v._dtype) for v in variables]

    def write(
        self, variables: Sequence[keras.Variable], values: Sequence[np.ndarray]
    ) -> None:
        for variable, value in zip(variables, values, strict=True):
            memory = variable._value.detach()
            memory.copy_(tensors.to_tensor(value, memory.device))
        LOST.remove(variables)

    def compile_reading(
        self, compute: Callable[[], Any], variables: Sequence[keras.Variable]
    ) -> Callable[[Sequence[np.ndarray]], Any]:
        def run(values: Sequence[np.ndarray]) -> Any:
            given = zip(variables, tensors.to_tensors(values), strict=True)
            with torch.no_grad(), keras.StatelessScope(given):
                return compute()

        return run

    def to_host(self, logs: Any, num_steps: int) -> np.ndarray:
        return torch.stack(logs).cpu().numpy()

    def values(
        self, stacks: Sequence[Any], variables: Sequence[keras.Variable]
    ) -> list[np.ndarray]:
        pairs = zip(stacks, variables, strict=True)
        return [tensors.to_numpy(stack, v._dtype) for stack, v in pairs]

    def place(self, arrays: Any) -> Any:
        return tensors.to_tensors(arrays)

    def lost_variables(
        self, variables: Sequence[keras.Variable]
    ) -> list[keras.Variable]:
        return LOST.among(variables)

    def canonical_dtype(self, dtype: np.dtype) -> np.dtype:
        return tensors.canonical_dtype(dtype)

    def get_random_state(self) -> dict[str, np.ndarray]:
        return randomness.get_random_state()

    def set_random_state(self, state: Mapping[str, np.ndarray]) -> None:
        randomness.set_random_state(state)

    def unrepeatable(self) -> list[str]:
        on_cpu = tensors.current_device().type == "cpu"
        if on_cpu or torch.are_deterministic_algorithms_enabled():
            return []
        return [
            "on a GPU PyTorch uses operations whose results vary: call "
            "torch.use_deterministic_algorithms(True), and set the environment "
            "variable CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts"
        ]

    def fingerprint(self) -> dict[str, JSON]:
        cuda = torch.cuda.is_available()
        devices = torch.cuda.device_count() if cuda else 1
        return {
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name(0) if cuda else "cpu",
            "devices": devices,
            "platform": tensors.current_device().type,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "mkldnn": bool(torch.backends.mkldnn.enabled),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
            "cudnn_benchmark": bool(torch.backends.cudnn.benchmark),
            "cudnn_deterministic": bool(torch.backends.cudnn.deterministic),
        }
