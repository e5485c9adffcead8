"""What a profile says, and what follows from it. Needs no Keras."""

import dataclasses
import io
import math
import os
from pathlib import Path
from typing import Any, Literal

from legato.profiling import chart
from legato.profiling.estimates import Estimate
from legato.profiling.limits import interval_within, parse_budget

Kind = Literal[
    "metric",
    "metrics",
    "logs",
    "data",
    "callback",
    "summaries",
    "validation",
    "checkpoints",
    "writing",
]

_SETTINGS = {
    "metric": "legato.Every({})",
    "summaries": "summary_interval: {}",
    "validation": "validation_interval: {}",
    "checkpoints": "checkpoint_interval: {}",
}
"""What is done every so many steps, and how that is set."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What one part of training adds to a step.

    Attributes:
        name: of the part; no other cost of the profile has it.
        kind: "metric" (one of them), "metrics" (all, as configured), "logs"
            (their means on the host), "data", "callback", "summaries",
            "validation", "checkpoints" (training waits for their copies), or
            "writing" (it is slower while they are written).
        per_call: microseconds each time.
        interval: steps from one time to the next, as configured; None where
            it is never done.
        us_bare: microseconds that the bare step takes.
        detail: what else there is to say.
    """

    name: str
    kind: Kind
    per_call: Estimate
    interval: float | None
    us_bare: float
    detail: str = ""

    @property
    def per_step(self) -> Estimate:
        """Microseconds that it adds to a step, at its interval."""
        often = 0.0 if self.interval is None else 1 / self.interval
        if not often:
            return Estimate(median=0.0, low=0.0, high=0.0, noise=0.0)
        return self.per_call.scaled(often)

    @property
    def us_per_step(self) -> float:
        """The median of it."""
        return self.per_step.median

    @property
    def low(self) -> float:
        """The lower quartile of it."""
        return self.per_step.low

    @property
    def high(self) -> float:
        """The upper quartile of it."""
        return self.per_step.high

    @property
    def share(self) -> float:
        """It as a share of the bare step: 0.01 is one per cent."""
        return self.us_per_step / self.us_bare

    @property
    def is_told(self) -> bool:
        """Whether it can be told from the noise of the measurement."""
        return self.per_call.is_told

    @property
    def at_most(self) -> float:
        """Microseconds each time, or what the noise may hide of them."""
        if self.is_told:
            return self.per_call.median
        return max(self.per_call.median, self.per_call.noise)

    def setting(self, interval: int) -> str | None:
        """How it is told to act every so many steps; None if it is not."""
        text = _SETTINGS.get(self.kind)
        return text and text.format(interval)

    def to_json(self) -> dict[str, Any]:
        """Its figures by name."""
        step = self.per_step
        return {
            "name": self.name,
            "kind": self.kind,
            "us_per_step": step.median,
            "low": step.low,
            "high": step.high,
            "noise": step.noise,
            "share": self.share,
            "is_told": self.is_told,
            "us_per_call": self.per_call.median,
            "interval": self.interval,
            "detail": self.detail,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """What a training step costs, and what everything else adds to it.

    Attributes:
        task: the name of the task.
        backend: the Keras backend.
        mode: how steps reach the device.
        steps_per_call: steps in a device call.
        rounds: how often each part had its turn.
        seconds: that all of it took, compilations included.
        bare: microseconds of a step without anything else.
        costs: what each part adds.
        loop_steps: how many steps were trained by the loop itself, with all
            that goes with it, for the phases; 0 where that could not be.
        phases: what its thread did with the time, in microseconds a step, by
            the names of `legato.phases`.
        notes: what could not be measured, and why.
    """

    task: str
    backend: str
    mode: str
    steps_per_call: int
    rounds: int
    seconds: float
    bare: Estimate
    costs: list[Cost]
    loop_steps: int = 0
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def us_per_step(self) -> float:
        """Microseconds of the bare step."""
        return self.bare.median

    def __getitem__(self, name: str) -> Cost:
        """The cost of a name.

        Raises:
            KeyError: there is none; it names those that there are.
        """
        for cost in self.costs:
            if cost.name == name:
                return cost
        known = ", ".join(cost.name for cost in self.costs)
        raise KeyError(f"{name!r} is none of the costs: {known}")

    def intervals(self, budget: str | float) -> dict[str, int]:
        """How rarely each part has to act to cost no more than a budget.

        A choice for the user to make, once: nothing is set by it, since what
        a timing decides would be another thing in a resumed run.

        Args:
            budget: a share of the bare step for each part, as 0.01 or "1%".

        Returns:
            Steps between two times, by the name of the cost. Where a cost is
            below the noise, what the noise may hide is kept within the
            budget; where too few rounds tell nothing, there is none.

        Raises:
            ConfigError: the budget is not a share.
        """
        share = parse_budget(budget)
        return {
            cost.name: interval_within(cost.at_most, self.us_per_step, share)
            for cost in self.costs
            if cost.kind in _SETTINGS and math.isfinite(cost.at_most)
        }

    def table(self, budget: str | float | None = None) -> str:
        """The profile as plain text with a bar for each cost.

        Args:
            budget: see `intervals`, which are shown too; None for none.

        Raises:
            ConfigError: the budget is not a share.
        """
        from rich.console import Console

        file = io.StringIO()
        console = Console(file=file, width=80, highlight=False, markup=False)
        chart.show(self, console, budget)
        lines = file.getvalue().splitlines()
        return "\n".join(line.rstrip() for line in lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw it as horizontal bars into an image file.

        Args:
            path: ends in .png, .svg or .pdf.

        Raises:
            ConfigError: Matplotlib is not installed, or the path is wrong.
        """
        chart.check_picture(path)
        chart.draw(self, Path(path))

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return {
            "task": self.task,
            "backend": self.backend,
            "mode": self.mode,
            "steps_per_call": self.steps_per_call,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "us_per_step": self.bare.median,
            "low": self.bare.low,
            "high": self.bare.high,
            "costs": [cost.to_json() for cost in self.costs],
            "loop_steps": self.loop_steps,
            "phases": dict(self.phases),
            "notes": self.notes,
        }
