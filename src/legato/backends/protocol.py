"""What a Keras backend must do for the engine.

The engine above speaks only this protocol; a backend is one package here.
Everything that a step reads or writes is a `keras.Variable`; what differs is
how a step is turned into a device loop and differentiated.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from legato.phases import Phases
from legato.types import JSON

LoopMode = Literal["fused", "stepwise", "compiled", "eager"]
"""How steps reach the device: many in one call ("fused"), a call each
("stepwise"), operation by operation ("eager"), or, where compiling is a
choice, compiled ("compiled": a call each on PyTorch, many in one call on
TensorFlow)."""

Compilation = Literal["auto", "always", "never", "replay"]
"""Whether to compile, for a backend that can also do without and takes long
to compile: "auto" compiles every step that it can and that gains by it. What
is not compiled runs operation by operation; with "never" it is Python that
calls each, every time ("replay" leaves it out where that changes nothing)."""

Step = Callable[[Any, Any], Any]
"""`step(batch, step_index) -> logs`, called while it is traced. `batch` holds
backend tensors, `step_index` is an int32 scalar tensor: the number of steps
completed before this one. `logs` maps names to scalar tensors. Or `-> logs,
outputs`: a list of tensors for the host; see `CompiledLoop.max_steps`."""

Fetch = Callable[[Any, Any, Any], Any]
"""`fetch(resident, operands, index) -> batch`, traced with the step."""


@dataclasses.dataclass(frozen=True)
class Keeping:
    """What a loop keeps of variables while it goes on.

    Attributes:
        every: after each so many steps of the run.
        variables: gives those in question, when the step has been traced;
            None if it is not known which.
    """

    every: int
    variables: Callable[[], Sequence[keras.Variable] | None]


COLUMNS = {"float32": 1, "int32": 1, "uint32": 1, "float64": 2, "int64": 2}
"""Of float32, that hold the bits of a number of these dtypes."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Single numbers whose bits are the last columns of the logs.

    Attributes:
        dtypes: of `COLUMNS`, of each number.
    """

    dtypes: Sequence[str]

    @property
    def count(self) -> int:
        """How many columns there are."""
        return sum(COLUMNS[dtype] for dtype in self.dtypes)

    def split(
        self, rows: np.ndarray, first: int, every: int
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The logs alone, and the numbers as they were after some steps.

        Args:
            rows: float32 `[steps, names and columns]`.
            first: the place of the first of these steps.
            every: how far it is to the next one.
        """
        begin = rows.shape[1] - self.count
        bits = np.ascontiguousarray(rows[first::every, begin:].T)
        numbers, place = [], 0
        for dtype in self.dtypes:
            size = COLUMNS[dtype]
            own, place = bits[place : place + size], place + size
            if size > 1:
                own = np.ascontiguousarray(own.T)
            numbers.append(own.view(dtype).reshape(-1))
        return rows[:, :begin], numbers


class CompiledLoop(abc.ABC):
    """A step compiled into a loop over the batches of a chunk.

    Attributes:
        read_only: variables that the step reads and never writes.
        updated: variables that the step writes.
        log_names: names of the step's logs, in their order.
        mode: how it runs on the device.
        max_steps: the most steps of one call; None where their operands alone
            bound it. (What steps give the host takes memory.)
        kept: variables whose values it keeps after certain steps, as it was
            asked to: those among the given ones that it writes. None if it
            cannot; see `kept_variables`.
        columns: how the logs hold their values after each step, where they
            are single numbers and it does it so.
        runs_python: whether the compiled step calls Python of the user's,
            which no thread but the one that trains may run.
        traces: how often user code has been traced, for tests.
        phases: told what calls do; None where nobody asks.
    """

    read_only: list[keras.Variable]
    updated: list[keras.Variable]
    log_names: list[str]
    mode: LoopMode
    max_steps: int | None = None
    kept: list[keras.Variable] | None = None
    columns: Columns | None = None
    runs_python: bool = False
    traces: int
    phases: Phases | None = None

    @property
    def variables(self) -> list[keras.Variable]:
        """Every variable that the step reads or writes."""
        return [*self.updated, *self.read_only]

    @abc.abstractmethod
    def __call__(self, step: int, num_steps: int, operands: Any) -> Any:
        """Run `num_steps` steps, the first with `step_index == step`.

        The Keras variables hold the new values when this returns (their
        computation may still be under way). If the device fails, they hold
        the values from before the call, or are reported by `lost_variables`.

        Returns:
            The logs of every step, on the device: see `Backend.to_host`. Of
            steps with outputs: the logs, and each output of all the steps, of
            shape `[steps or more, ...]`. Of a loop that keeps any variables,
            if not in the rows: the logs, and the values of each, `[times or
            more, ...]`.
        """

    def _enter(self, phase: int) -> None:
        if self.phases is not None:
            self.phases.enter(phase)

    @property
    def is_ahead(self) -> bool:
        """Whether `run_ahead` would give something now."""
        return False

    def run_ahead(
        self, step: int, operands: Any, index: int, stop: int
    ) -> Any | None:
        """Run one step, and with it some that are likely to follow.

        They are asked for one by one, and until then nothing shows of them,
        and nothing ever if any variable was set meanwhile: it is as if each
        were run when it is asked for.

        Args:
            step: the index of the step.
            operands: those of several batches; to be the same object for
                steps that follow each other.
            index: of the batch in the operands.
            stop: one more than the index of the last batch.

        Returns:
            The logs of the one step, or None if it must be called by itself.
        """
        del step, operands, index, stop

    def begin(self, step: int, num_steps: int, operands: Any) -> None:
        """Begin a call that is likely to be the next, where it can be undone.

        Nothing shows of it until it is called with these `operands`, and
        nothing ever if any variable was set meanwhile.
        """
        del step, num_steps, operands


class Backend(abc.ABC):
    """The verbs that the engine needs of a Keras backend."""

    name: str
    modes: tuple[LoopMode, ...]
    """Those that it can run in."""
    overlaps: Literal["device", "thread"] | None = None
    """How Python may go on while a call is at work: it returns before that
    ("device"), or another thread may make it ("thread"); None: not at all."""

    host_steps: int
    """The most steps of one call that give something to the host. Where steps
    are quicker together than in a call each, several; not many, for the host
    begins with them when the call ends."""

    @abc.abstractmethod
    def compile_loop(
        self,
        step: Step,
        *,
        fetch: Fetch,
        resident: Any,
        operands: Any,
        mode: LoopMode | None,
        losses_in_step: bool,
        variables: Sequence[keras.Variable] = (),
        compilation: Compilation = "never",
        native: bool = False,
        keeping: Keeping | None = None,
        one_by_one: bool = False,
    ) -> CompiledLoop:
        """Trace a step into a loop; it is compiled when first called.

        Everything that is made lazily (variables of models, optimizers and
        metrics) exists when this returns, and no value has changed.

        Args:
            step: the step; called a few times, while tracing.
            fetch: how a batch is made from the next two.
            resident: arrays to keep on the device, or None.
            operands: an example of a chunk's operands (shapes and dtypes).
            mode: None chooses, by a rule that depends only on the traced
                step, the kind of device and `compilation`; the choice is
                `CompiledLoop.mode`.
            losses_in_step: whether `model.losses` may be read in the step
                itself (validation) or only inside `forward` (training).
            variables: those already known to be used, which saves a trace.
            compilation: whether to compile where that is a choice and `mode`
                is None, and whether Python must run in each step.
            native: the step is written for this backend (a Keras model's own
                `train_step`) and differentiates by itself: what it reads are
                the variables' own tensors.
            keeping: what to keep, of a step without outputs.
            one_by_one: whether steps are mostly asked for one by one.

        Raises:
            StepError: the step broke its contract.
        """

    @abc.abstractmethod
    def value_and_grad(
        self,
        forward: Callable[[], Any],
        variables: list[keras.Variable],
        optimizer: keras.optimizers.Optimizer | None = None,
        *,
        as_keras: bool = False,
    ) -> tuple[Any, list[Any]]:
        """See `legato.value_and_grad`, which checks that there are any.

        Args:
            forward: see there.
            variables: see there.
            optimizer: see there.
            as_keras: gradients in the form in which Keras's own `fit` hands
                them to the optimizer, also where backends differ in it.
        """

    @abc.abstractmethod
    def read(self, variables: Sequence[keras.Variable]) -> list[np.ndarray]:
        """The values as host arrays; waits for the computations under way.

        They may be views: copy them before the next loop call.
        """

    @abc.abstractmethod
    def write(
        self, variables: Sequence[keras.Variable], values: Sequence[np.ndarray]
    ) -> None:
        """Assign host arrays, bit for bit."""

    @abc.abstractmethod
    def compile_reading(
        self, compute: Callable[[], Any], variables: Sequence[keras.Variable]
    ) -> Callable[[Sequence[np.ndarray]], Any]:
        """Something computed from variables, as one call of the device.

        Args:
            compute: returns nested tensors, from variables alone, and changes
                nothing.
            variables: those whose values are given with a call; others have
                those that they hold.
        """

    @abc.abstractmethod
    def to_host(self, logs: Any, num_steps: int) -> np.ndarray:
        """The logs of a loop call: float32 `[num_steps, names]`; waits."""

    def values(
        self, stacks: Sequence[Any], variables: Sequence[keras.Variable]
    ) -> list[np.ndarray]:
        """What variables held, `[times, ...]` each, as host arrays; waits."""
        del variables
        return [np.asarray(stack) for stack in stacks]

    @abc.abstractmethod
    def place(self, arrays: Any) -> Any:
        """Nested host arrays as backend tensors on the device."""

    @abc.abstractmethod
    def lost_variables(
        self, variables: Sequence[keras.Variable]
    ) -> list[keras.Variable]:
        """Variables without a value since a device call failed midway."""

    @abc.abstractmethod
    def canonical_dtype(self, dtype: np.dtype) -> np.dtype:
        """The dtype that the backend computes with when given `dtype`."""

    @abc.abstractmethod
    def get_random_state(self) -> dict[str, np.ndarray]:
        """The backend's own generators, where the future depends on them."""

    @abc.abstractmethod
    def set_random_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Put back what `get_random_state` returned."""

    @abc.abstractmethod
    def unrepeatable(self) -> list[str]:
        """What keeps this process from computing the same bits twice.

        A sentence each, with the remedy.
        """

    def keep_programs(self) -> None:  # noqa: B027 - few can
        """Take what was compiled in other processes, and keep what is new."""

    def publish_programs(self) -> None:  # noqa: B027
        """Let processes that come have what this one compiled."""

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, JSON]:
        """What can change bits: versions, devices, threads, flags."""
