"""Makes a table and a picture of what was measured, piece by piece."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"
PIECES = RESULTS / "speed"

Piece = dict
"""What `measure.measure` returned for a model on a backend."""

_TINY = ("tiny-lstm", "tiny-transformer")
_SMALL = ("lstm", "transformer")

TARGETS: dict[str, dict[tuple[tuple[str, ...], str], float]] = {
    backend: {
        (("mlp",), "fit"): fit,
        (("mlp",), "fit at its best"): best,
        **{(("mlp",), name): value for name, value in by_hand.items()},
        (_TINY, "fit at its best"): tiny,
        (_TINY, "by hand at its best"): tiny,
        (_SMALL, "fit at its best"): 1.0,
        (_SMALL, "by hand at its best"): 1.0,
        (("cnn",), "best peer"): 1.0,
        ((*_SMALL, "cnn"), "compute limit"): limit,
    }
    for backend, fit, best, by_hand, tiny, limit in (
        ("jax", 4.0, 2.0, {"by hand": 2.0}, 1.5, 0.97),
        ("tensorflow", 6.0, 2.5, {"by hand": 3.0}, 1.2, 0.95),
        (
            "torch", 2.5, 2.5, {"torch.compile": 0.9, "Lightning": 1.5},
            1.0, 0.95,
        ),
    )
}  # fmt: skip
"""How many times as fast as others legato should be: models, others."""


def groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Contestants by what is said of the best of them."""
    fits = [name for name in names if name.startswith("fit")]
    limits = [name for name in names if name.startswith("limit")]
    by_hand = [name for name in names if name in ("by hand", "torch.compile")]
    peers = [n for n in names if n != "legato" and n not in limits]
    return {
        "fit at its best": fits,
        "by hand at its best": by_hand,
        "best peer": peers,
        "compute limit": limits,
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower, median, upper."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, method="inclusive")
    return low, middle, high


def ratios(piece: Piece, other: str) -> tuple[float, float, float]:
    """Quartiles of legato's speed over another's, within rounds."""
    rates = piece["rates"]
    return quartiles(
        [a / b for a, b in zip(rates["legato"], rates[other], strict=True)]
    )


def _best(piece: Piece, names: Sequence[str]) -> str:
    return max(names, key=lambda name: statistics.median(piece["rates"][name]))


def _judged(piece: Piece) -> list[list[str]]:
    """Rows for the summary: model, against whom, ratio, target, met."""
    model, names = piece["model"], list(piece["rates"])
    grouped = groups(names)
    rows = []
    for (models, against), target in TARGETS[piece["backend"]].items():
        candidates = grouped.get(against, [against])
        candidates = [name for name in candidates if name in names]
        if model not in models or not candidates:
            continue
        best = _best(piece, candidates)
        low, middle, high = ratios(piece, best)
        shown = against if best == against else f"{against}: {best}"
        rows.append(
            [
                model,
                shown,
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
                f"{target:g}",
                "yes" if middle >= target else "NO",
            ]
        )
    return rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [header, *rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(header))]
    lines = [
        "| "
        + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))
        + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _section(piece: Piece) -> str:
    rows = []
    for name, rates in piece["rates"].items():
        low, middle, high = ratios(piece, name)
        rows.append(
            [
                name,
                f"{statistics.median(rates):,.0f}",
                f"{1e6 / statistics.median(rates):,.0f}",
                "" if name == "legato"
                else f"{middle:.2f} ({low:.2f} to {high:.2f})",
                f"{piece['losses'][name]:.5f}",
            ]
        )  # fmt: skip
    header = ["", "steps/s", "µs", "legato is so many times as fast", "loss"]
    versions = ", ".join(f"{k} {v}" for k, v in piece["versions"].items())
    return (
        f"## {piece['model']}\n\n{piece['shapes']}. {piece['date']}; "
        f"{piece['rounds']} rounds of turns of at least {piece['seconds']:g} s "
        f"({piece['steps']} steps in an epoch); {piece['machine']}; "
        f"{versions}.\n\n{_table(header, rows)}\n"
    )


_ABOUT = """\
Steps per second, in turns within one process (A B A B); medians of the rounds'
ratios, in brackets their quartiles. All train the same model from the same
weights on the same batches in the same order, with Adam, and compute the same
metrics; *loss* is the mean of the first epoch's, by which that is checked
(dropout, in the MLP alone, draws other masks in each). Compilation and first
epochs are not counted. legato is `legato.fit` as it comes, with a summary every
100 steps and a checkpoint at each epoch's end. The compute limit is the step by
hand on batches that lie on the device.
"""

_ABOUT_TORCH = """\
By hand, with Lightning and Accelerate it is an equivalent `torch.nn` module
with the same weights, since nobody would write a PyTorch loop over a Keras
model for speed, and Keras's layers cost more than such small operations. These
two are spared logging, progress and the collating of examples. `torch.compile`
compiles the model with its loss, and Adam is fused.
"""


def as_text(pieces: Sequence[Piece]) -> str:
    """The whole table of a backend."""
    backend = pieces[0]["backend"]
    about = _ABOUT + (_ABOUT_TORCH if backend == "torch" else "")
    judged = [row for piece in pieces for row in _judged(piece)]
    header = ["model", "legato against", "times as fast", "target", "met"]
    newest = max(piece["date"] for piece in pieces)
    parts = [f"# Speed on {backend}, {newest}\n", about]
    if judged:
        parts.append(_table(header, judged) + "\n")
    return "\n".join([*parts, *map(_section, pieces)])


def keep(piece: Piece) -> None:
    """Keep a piece in `results/speed`, in the place of an older one."""
    PIECES.mkdir(parents=True, exist_ok=True)
    path = PIECES / f"{piece['backend']}-{piece['model']}.json"
    path.write_text(json.dumps(piece, indent=1) + "\n")


def kept(backend: str, models: Sequence[str]) -> list[Piece]:
    """The pieces of a backend, in the order of the models."""
    paths = [PIECES / f"{backend}-{model}.json" for model in models]
    return [json.loads(p.read_text()) for p in paths if p.exists()]


def write(backend: str, models: Sequence[str]) -> Path:
    """Write table and picture of all pieces of a backend; returns the table."""
    pieces = kept(backend, models)
    newest = max(piece["date"] for piece in pieces)
    path = RESULTS / f"{newest}-speed-{backend}.md"
    text = as_text(pieces)
    head, _, rest = text.partition("\n\n")
    picture = path.with_suffix(".png")
    path.write_text(f"{head}\n\n![a bar for each]({picture.name})\n\n{rest}")
    draw(pieces, picture)
    return path


def draw(pieces: Sequence[Piece], path: Path) -> None:
    """A panel for each model, a bar for each contestant."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = [len(piece["rates"]) for piece in pieces]
    figure = Figure(
        figsize=(9, 0.8 + sum(0.55 + 0.24 * count for count in counts)),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(pieces), 1, squeeze=False, height_ratios=[c + 1.5 for c in counts]
    )[:, 0]
    for piece, axes in zip(pieces, panels, strict=True):
        _panel(axes, piece)
    panels[-1].set_xlabel("steps per second; quartiles of the rounds")
    figure.suptitle(f"Speed on {pieces[0]['backend']}")
    figure.savefig(path, dpi=110)


def _panel(axes, piece: Piece) -> None:
    rates = piece["rates"]
    names = sorted(rates, key=lambda name: statistics.median(rates[name]))
    for row, name in enumerate(names):
        low, middle, high = quartiles(rates[name])
        colour = "C0" if name == "legato" else "0.7"
        if name.startswith("limit"):
            colour = "0.88"
        axes.barh(row, middle, color=colour)
        axes.errorbar(
            middle, row, xerr=[[middle - low], [high - middle]],
            color="0.3", capsize=2,
        )  # fmt: skip
        axes.text(high, row, f"  {middle:,.0f}", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(piece["shapes"], loc="left", fontsize=8)
    axes.margins(x=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
