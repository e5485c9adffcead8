"""A profile as a table with bars, and as a picture."""

import importlib.util
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from legato.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from legato.profiling.report import Cost, Profile

_BAR_WIDTH = 20
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
    from rich import box
    from rich.table import Table
    from rich.text import Text

    intervals = None if budget is None else profile.intervals(budget)
    is_unicode = console.encoding.startswith("utf")

    def plain(text: str) -> Text:
        return Text(text if is_unicode else text.replace("µ", "u"))

    for line in _head(profile):
        console.print(plain(line))
    if profile.costs:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("what is added to a step", overflow="fold")
        for header in ("µs", "quartiles", "%"):
            table.add_column(plain(header), justify="right", no_wrap=True)
        table.add_column("", width=_BAR_WIDTH, no_wrap=True)
        table.add_column("", overflow="fold")
        drawn = [cost.share for cost in profile.costs if _has_bar(cost)]
        longest = max(drawn, default=1.0)
        for cost in profile.costs:
            bar = Text("")
            if _has_bar(cost):
                bar = Text(
                    _bar(cost.share / longest, is_unicode),
                    style=_colour(cost.share),
                )
            cells = [plain(cell) for cell in (_label(cost), *_figures(cost))]
            table.add_row(*cells, bar, plain(_remark(cost)))
        console.print(table)
    for note in profile.notes:
        console.print(plain(f"Note: {note}."))
    if intervals is not None:
        _show_intervals(profile, console, budget, intervals, plain)


def _head(profile: "Profile") -> list[str]:
    bare, calls = profile.bare, profile.steps_per_call
    several = f"{calls} steps in a device call" if calls > 1 else "one a call"
    times = "once" if profile.rounds == 1 else f"{profile.rounds} rounds"
    return [
        f"{profile.task} on {profile.backend}, {profile.mode}: a bare step "
        f"takes {_time(bare.median)} ({_time(bare.low)} to "
        f"{_time(bare.high)}), {several}.",
        f"Measured in turns, {times}, in {profile.seconds:.0f} s: medians, "
        "and quartiles of the differences.",
    ]


def _show_intervals(
    profile: "Profile",
    console: "Console",
    budget: str | float | None,
    intervals: dict[str, int],
    plain: Any,
) -> None:
    from rich.table import Table

    from legato.profiling.limits import parse_budget

    assert budget is not None
    share = float(parse_budget(budget))
    console.print(
        plain(
            f"\nTo cost at most {100 * share:g} % of the bare step each, "
            f"{_time(share * profile.us_per_step)}:"
        )
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for name, interval in intervals.items():
        cost = profile[name]
        now = "off" if cost.interval is None else f"{cost.interval:,.4g}"
        unsure = "" if cost.is_told else "; counted at its noise"
        table.add_row(
            plain(f"  {_label(cost)}"),
            plain(cost.setting(interval) or ""),
            plain(f"(now {now}{unsure})"),
        )
    console.print(table)
    console.print(plain("Nothing was set: that is yours to do."))


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


def _remark(cost: "Cost") -> str:
    """How often, how long each time, and what is not sure."""
    parts = []
    if cost.interval is None:
        parts.append("off")
    elif not cost.is_told:
        noise = cost.per_step.noise
        parts.append(
            f"below the noise of {_number(noise)} µs"
            if math.isfinite(noise)
            else f"about {_time(cost.us_per_step)}, but too few rounds to tell"
        )
    if cost.interval != 1 and (cost.is_told or cost.interval is None):
        parts.append(f"{_time(cost.per_call.median)} each")
    if cost.interval is not None and cost.interval != 1:
        parts.append(f"every {cost.interval:,.4g} steps")
    return ", ".join(parts) + ("; " * bool(parts and cost.detail)) + cost.detail


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
            text = _remark(cost).partition(",")[0]
            axes.text(0, row, f" {text}", va="center", color="0.45")
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
    return any(cost.is_told and cost.us_per_step < 0 for cost in costs)
