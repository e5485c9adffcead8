"""Experiments: a task, how it is trained, and where, in one config.

An experiment is named on the command line in one of three ways: a YAML file,
a built-in name such as `digits`, or `package.module:experiment`. Reading a
YAML file imports neither Keras nor the task; that happens when the task is
built, after the backend was chosen.
"""

import os
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from legato.building import (
    build_callbacks,
    build_task,
    import_object,
)
from legato.config import (
    OBJECT,
    CallbackSpec,
    Document,
    Experiment,
    apply_overrides,
    built_in,
    built_in_names,
    dump_yaml,
    load_yaml,
    nearest,
    suggest,
    validate,
)
from legato.errors import ConfigError

if TYPE_CHECKING:
    from legato.summaries import SummaryManagerInterface
    from legato.trainer import Trainer

__all__ = [
    "TRAINING_MODES",
    "CallbackSpec",
    "Experiment",
    "build_callbacks",
    "build_model",
    "build_task",
    "build_trainer",
    "built_in_names",
    "import_object",
    "resolve",
    "run_experiment",
]


def resolve(config_argument: str, overrides: Iterable[str] = ()) -> Experiment:
    """Finds an experiment by what the command line calls it.

    Args:
        config_argument: a YAML file, a built-in name, or
            `package.module:experiment`, which is an `Experiment` or a function
            without arguments that returns one. Modules are looked for in the
            working directory too, as `python -m` does.
        overrides: texts such as `"trainer.train_steps=1000"`, put in before
            anything is checked.

    Returns:
        The experiment, with `run_dir` filled in.

    Raises:
        ConfigError: if there is no such experiment, or it is not valid.
    """
    text = str(config_argument)
    if _is_path(text):
        name = pathlib.Path(text).stem
        document = load_yaml(text)
    elif ":" in text:
        module, _, attribute = text.rpartition(":")
        name = attribute.rpartition(".")[2]
        if name == "experiment":
            name = module.rpartition(".")[2]
        document = Document(_load_object(text))
    elif text in built_in_names():
        name = text
        document = built_in(text)
    else:
        raise ConfigError(
            f"{text}: there is no such experiment. CONFIG is a YAML file, "
            "package.module:experiment or a built-in name"
            + suggest(text, built_in_names())
        )
    document = apply_overrides(document, overrides)
    experiment = validate(Experiment, document, source=text)
    if experiment.run_dir is None:
        experiment = experiment.replace(run_dir=f"runs/{name}")
    experiment._document = document
    return experiment


def run_experiment(
    experiment: Experiment,
    mode: str = "train_and_eval",
    run_dir: str | os.PathLike[str] | None = None,
    summary_manager: "SummaryManagerInterface | None" = None,
    eval_summary_manager: "SummaryManagerInterface | None" = None,
    save_summary: bool = True,
    timeout: float | None = None,
) -> Any:
    """Runs an experiment, or goes on with it.

    Args:
        experiment: what to run.
        mode: "train_and_eval", "train" (no validation), "train_and_post_eval"
            (what the run ends with is measured once), "eval" (the newest
            checkpoint on the validation data), or "continuous_eval" (each
            checkpoint, while another process trains, until that has ended).
        run_dir: the directory of the run; None takes the experiment's, or
            `runs/` and the task's name.
        summary_manager: writes the summaries of training; see `Trainer`.
        eval_summary_manager: writes what validation, or evaluation, measures.
        save_summary: False writes no summaries, neither by the run itself nor
            by these managers; `metrics.jsonl` stays.
        timeout: of "continuous_eval": seconds without a new checkpoint after
            which it ends; None waits for ever.

    Returns:
        What `Trainer.train`, `Trainer.evaluate` or
        `Trainer.evaluate_continuously` returns; of "train_and_post_eval" a
        pair of what the first two return.

    Raises:
        ConfigError: if the mode is not known or the experiment is not valid.
    """
    if timeout is not None and mode != "continuous_eval":
        raise ConfigError(
            f'timeout={timeout} is for mode="continuous_eval", and mode is '
            f"{mode!r}. Leave it out."
        )
    if not isinstance(save_summary, bool):
        raise ConfigError(
            f"save_summary={save_summary!r:.80}: it must be True or False."
        )
    if not save_summary:
        kept = [name for name in experiment.trainer.sinks if name != _SUMMARIES]
        document = experiment._document
        experiment = experiment.replace(
            trainer=experiment.trainer.replace(sinks=kept)
        )
        experiment._document = document
        summary_manager = eval_summary_manager = None
    trainer = build_trainer(
        experiment,
        mode,
        run_dir,
        summary_manager=summary_manager,
        eval_summary_manager=eval_summary_manager,
    )
    match mode:
        case "eval":
            return trainer.evaluate()
        case "continuous_eval":
            return trainer.evaluate_continuously(timeout=timeout)
        case "train_and_post_eval":
            history = trainer.train()
            return history, trainer.evaluate()
        case _:
            return trainer.train()


_SUMMARIES = "tensorboard"
TRAINING_MODES = ("train_and_eval", "train", "train_and_post_eval")
_MODES = (*TRAINING_MODES, "eval", "continuous_eval")


def build_model(experiment: Experiment) -> Any:
    """Makes the experiment's model, or a dict of them; no data are read.

    Raises:
        ConfigError: if the experiment is not valid.
    """
    from legato.parts import precision

    with precision(experiment.trainer.precision):
        return build_task(experiment).build_model()


def build_trainer(
    experiment: Experiment,
    mode: str = "train_and_eval",
    run_dir: str | os.PathLike[str] | None = None,
    *,
    summary_manager: "SummaryManagerInterface | None" = None,
    eval_summary_manager: "SummaryManagerInterface | None" = None,
) -> "Trainer":
    """Makes the experiment's trainer, and what it needs for a mode.

    Args:
        experiment: what to run.
        mode: see `run_experiment`. Callbacks are made only to train.
        run_dir: see `run_experiment`.
        summary_manager: see `run_experiment`.
        eval_summary_manager: see `run_experiment`.

    Raises:
        ConfigError: if the mode is not known or the experiment is not valid.
    """
    if mode not in _MODES:
        meant = nearest(mode, _MODES)
        raise ConfigError(
            f"mode must be one of {', '.join(_MODES)}; got {mode!r}"
            + (f" - did you mean {meant!r}?" if meant else ".")
        )
    from legato.trainer import Trainer

    config = experiment.trainer
    if mode in ("train", "train_and_post_eval"):
        config = config.replace(validation_interval=None)
    trains = mode in TRAINING_MODES
    if trains:
        config.require_length()
        config.require_sinks()
    if run_dir is None:
        task_name = experiment.task.rpartition(":")[2].lower()
        run_dir = experiment.run_dir or f"runs/{task_name}"
    return Trainer(
        build_task(experiment),
        run_dir=run_dir,
        config=config,
        callbacks=build_callbacks(experiment) if trains else [],
        summary_manager=summary_manager,
        eval_summary_manager=eval_summary_manager,
        config_yaml=dump_yaml(experiment),
    )


def _is_path(text: str) -> bool:
    return (
        text.endswith((".yaml", ".yml"))
        or os.sep in text
        or pathlib.Path(text).is_file()
    )


def _load_object(text: str) -> dict[str, Any]:
    if not OBJECT.fullmatch(text):
        raise ConfigError(
            f"{text}: must be of the form package.module:experiment."
        )
    found = import_object(text, text)
    if callable(found) and not isinstance(found, Experiment):
        found = found()
    if not isinstance(found, Experiment):
        raise ConfigError(
            f"{text}: must be a legato.Experiment, or a function without "
            f"arguments that returns one; it is a {type(found).__name__}."
        )
    # Only what was given: defaults would look like it.
    return found.model_dump(mode="json", exclude_unset=True)
