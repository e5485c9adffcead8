"""Saves what a finished run predicts as a picture.

    python examples/predictions.py segmentation predictions segmentation.png

evaluates the run of an experiment (a built-in name or a YAML file) once more,
and stacks the pictures that its Task draws in validation, here those that it
names "predictions".
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import legato
from legato.experiment import resolve, run_experiment

COLOURS = 224  # so that textures take little space


def save(pictures: Any, path: Path) -> None:
    """Writes a figure, or images `[n, height, width, 3]` one below another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pictures, Figure):
        pictures.savefig(path, dpi=80)
    else:
        stacked = Image.fromarray(np.concatenate(pictures, axis=0))
        stacked.quantize(COLOURS).save(path, optimize=True)


def main() -> None:
    """Evaluates the run, and saves the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="as for `legato train`")
    parser.add_argument("name", help="of the pictures among the results")
    parser.add_argument("out", type=Path, help="the PNG file")
    parser.add_argument("--run-dir", help="where it was trained, if elsewhere")
    arguments = parser.parse_args()

    def write(name: str, value: Any, step: int) -> None:
        if name == arguments.name:
            save(value, arguments.out)
            print(f"{arguments.out}: {name} at step {step}")

    # A summary manager decides what becomes of the results of an evaluation.
    with tempfile.TemporaryDirectory() as folder:
        manager = legato.SummaryManager(folder, write)
        run_experiment(
            resolve(arguments.config),
            mode="eval",
            run_dir=arguments.run_dir,
            eval_summary_manager=manager,
        )
        manager.flush()


if __name__ == "__main__":
    main()
