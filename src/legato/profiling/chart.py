"""A profile as a table with bars, and as a picture."""

import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from legato.errors import ConfigError
from legato.profiling.limits import parse_budget

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from legato.profiling.report import Cost, Profile

    Plain = Callable[[str], Text]

_BAR_WIDTH = 24
_FORMATS = (".png", ".svg", ".pdf")


def show(
    profile: "Profile", console: "Console", budget: str | float | None
) -> None:
    """Print a profile, with colours where there are any.

    Args:
        profile: what is printed.
        console: where.
        budget: see `Profile.intervals`, which are printed too; None for none.

    Raises:
        ConfigError: the budget is not a share.
    """
    # Before anything is printed.
    intervals = {} if budget is None else profile.intervals(budget)
    is_unicode = console.encoding.startswith("utf")

    def plain(text: str) -> "Text":
        from rich.text import Text

        return Text(text if is_unicode else text.replace("µ", "u"))

    for line in _head(profile):
        console.print(plain(line))
    if profile.costs:
        console.print(_costs(profile, plain, is_unicode))
    seldom = [
        cost
        for cost in profile.costs
        if cost.interval != 1 or cost.name in intervals
    ]
    if seldom:
        console.print(_each_time(profile, seldom, plain, budget, intervals))
    if profile.phases:
        console.print(_phases(profile, plain, is_unicode))
    for cost in profile.costs:
        if cost.detail:
            console.print(plain(f"{_label(cost)}: {cost.detail}."))
    for note in profile.notes:
        console.print(plain(f"Note: {note}."))
    if budget is not None:
        console.print(plain("Nothing was set: that is yours to do."))


def _head(profile: "Profile") -> list[str]:
    bare, calls = profile.bare, profile.steps_per_call
    several = f"{calls} steps" if calls > 1 else "one step"
    times = "once" if profile.rounds == 1 else f"{profile.rounds} rounds"
    return [
        f"{profile.task} on {profile.backend}: the bare step takes "
        f"{_time(bare.median)} ({_time(bare.low)} to {_time(bare.high)}).",
        f"{profile.mode}, {several} in a device call; measured in turns, "
        f"{times}, in {profile.seconds:.0f} s.",
    ]


def _costs(profile: "Profile", plain: "Plain", is_unicode: bool) -> "Table":
    """What each part adds to a step, with a bar or why there is none."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("added to a step", overflow="fold")
    for header in ("µs", "quartiles", "%"):
        table.add_column(plain(header), justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    drawn = [cost.share for cost in profile.costs if _has_bar(cost)]
    longest = max(drawn, default=1.0)
    for cost in profile.costs:
        last = plain(_doubt(cost))
        if _has_bar(cost):
            bar = _bar(cost.share / longest, is_unicode)
            last = Text(bar, style=_colour(cost.share))
        cells = [plain(cell) for cell in (_label(cost), *_figures(cost))]
        table.add_row(*cells, last)
    return table


def _each_time(
    profile: "Profile",
    costs: "list[Cost]",
    plain: "Plain",
    budget: str | float | None,
    intervals: dict[str, int],
) -> "Table":
    """What is not done at each step, or need not be."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("each time", overflow="fold")
    for header in ("", "every"):
        table.add_column(plain(header), justify="right", no_wrap=True)
    if budget is not None:
        share = float(parse_budget(budget))
        allowed = _time(share * profile.us_per_step)
        table.add_column(
            plain(f"for {100 * share:g} % ({allowed} a step)"),
            overflow="fold",
        )
    for cost in costs:
        noise = cost.per_call.noise
        each = _time(cost.per_call.median)
        if not cost.is_told:
            each = f"below {_time(noise)}" if math.isfinite(noise) else "?"
        often = "never"
        if cost.interval is not None:
            plural = "" if cost.interval == 1 else "s"
            often = f"{cost.interval:,.6g} step{plural}"
        cells = [_label(cost), each, often]
        if budget is not None:
            interval = intervals.get(cost.name)
            cells.append((interval and cost.setting(interval)) or "")
        table.add_row(*map(plain, cells))
    return table


def _phases(profile: "Profile", plain: "Plain", is_unicode: bool) -> "Table":
    """What the loop's thread did with the time of a step."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    count = f"{profile.loop_steps:,} step{'s' * (profile.loop_steps != 1)}"
    table.add_column(f"in the loop, {count}", overflow="fold")
    for header in ("µs", "%"):
        table.add_column(plain(header), justify="right", no_wrap=True)
    table.add_column("")
    whole = sum(profile.phases.values())
    longest = max(profile.phases.values())
    for name, taken in profile.phases.items():
        cells = name, _number(taken), _number(100 * taken / whole)
        bar = _bar(taken / longest, is_unicode) if taken else ""
        table.add_row(*map(plain, (*cells, bar)))
    cells = "a step of the loop", _number(whole), "100"
    table.add_row(*map(plain, cells), style="bold")
    return table


def _has_bar(cost: "Cost") -> bool:
    """Whether there is anything to draw."""
    return cost.is_told and cost.us_per_step > 0


def _label(cost: "Cost") -> str:
    if cost.kind in ("metric", "callback"):
        return f"{cost.kind} {cost.name}"
    return cost.name


def _figures(cost: "Cost") -> tuple[str, str, str]:
    if cost.interval is None or not cost.is_told:
        return "", "", ""
    return (
        f"{_number(cost.us_per_step)}",
        f"{_number(cost.low)} to {_number(cost.high)}",
        f"{_number(100 * cost.share)}",
    )


def _doubt(cost: "Cost") -> str:
    """Why there is no figure."""
    if cost.interval is None:
        return "off"
    if cost.is_told:
        return ""
    noise = cost.per_step.noise
    if math.isfinite(noise):
        return f"below the noise of {_number(noise)} µs"
    return f"{_time(cost.us_per_step)}? Too few rounds"


def _bar(share: float, is_unicode: bool) -> str:
    """Eighths of a character are drawn where they can be."""
    if not is_unicode:
        return "#" * max(1, round(share * _BAR_WIDTH))
    full, rest = divmod(max(1, round(share * _BAR_WIDTH * 8)), 8)
    return "█" * full + "▏▎▍▌▋▊▉"[rest - 1 : rest] * bool(rest)


def _colour(share: float) -> str:
    if share < 0.01:
        return "green"
    return "yellow" if share < 0.05 else "red"


def _number(value: float) -> str:
    """Three digits or so."""
    size = abs(value)
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{value:,.{digits}f}"


def _time(microseconds: float) -> str:
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if abs(microseconds) >= size:
            return f"{_number(microseconds / size)} {unit}"
    return f"{_number(microseconds)} µs"


def check_picture(path: str | os.PathLike[str]) -> None:
    """Check that a picture can be drawn, before anything is measured for it.

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"plot={path!r:.80}: it must be the path of a file.")
    target = Path(path)
    if target.suffix.lower() not in _FORMATS:
        raise ConfigError(
            f"plot={str(path)!r}: the name must end in "
            f"{', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}."
        )
    if not target.absolute().parent.is_dir():
        raise ConfigError(
            f"plot={str(path)!r}: there is no directory "
            f"{str(target.parent)!r}. Make it first."
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            f"plot={str(path)!r}: pictures are drawn by Matplotlib, which is "
            "not installed: pip install 'legato[plot]'"
        )


def draw(profile: "Profile", path: Path) -> None:
    """Draw a profile; see `Profile.plot`."""
    # Late: it takes half a second. (Not pyplot, which would look for a
    # display, and keep the figure.)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    costs = profile.costs
    figure = Figure(
        figsize=(9, 1.6 + 0.34 * max(len(costs), 1)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    for row, cost in enumerate(costs):
        shares = [
            100 * value / cost.us_bare
            for value in (cost.us_per_step, cost.low, cost.high)
        ]
        middle, low, high = shares
        if cost.interval is None or not cost.is_told:
            axes.text(0, row, f"  {_doubt(cost)}", va="center", color="0.45")
            continue
        axes.barh(row, middle, color=f"C{_HUES[_colour(cost.share)]}")
        error = [[max(0, middle - low)], [max(0, high - middle)]]
        axes.errorbar(middle, row, xerr=error, color="0.2", capsize=2)
        text = f"  {_number(middle)} %, {_time(cost.us_per_step)}"
        axes.text(max(middle, high, 0), row, text, va="center")
    axes.set_yticks(range(len(costs)), [_label(cost) for cost in costs])
    axes.set_ylim(len(costs) - 0.4, -0.6)
    axes.margins(x=0.25)
    axes.set_xlim(left=min(0, axes.get_xlim()[0] if _any_less(costs) else 0))
    axes.set_xlabel("per cent of the bare step; quartiles")
    axes.set_title("\n".join(_head(profile)), loc="left", fontsize="medium")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)


_HUES = {"green": 2, "yellow": 1, "red": 3}
"""Of Matplotlib's own cycle of colours."""


def _any_less(costs: "list[Cost]") -> bool:
    return any(cost.is_told and cost.low < 0 for cost in costs)
