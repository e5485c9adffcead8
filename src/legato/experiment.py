"""Experiments: a task, how it is trained, and where, in one config.

An experiment is named on the command line in one of three ways: a YAML file,
a built-in name such as `digits`, or `package.module:experiment`. Reading a
YAML file imports neither Keras nor the task; that happens when the task is
built, after the backend was chosen.
"""

import functools
import importlib
import importlib.resources
import inspect
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from legato.config import (
    OBJECT,
    Arguments,
    Config,
    DataConfig,
    Document,
    TrainerConfig,
    apply_overrides,
    check_object,
    dump_yaml,
    load_yaml,
    nearest,
    parse_yaml,
    validate,
    validate_mapping,
)
from legato.errors import ConfigError, LegatoError

if TYPE_CHECKING:
    import keras

    from legato.summaries import SummaryManagerInterface
    from legato.task import Task
    from legato.trainer import Trainer


def _check_task(value: str) -> str:
    if ":" in value:
        return check_object(value)
    if value not in built_in_names():
        raise ValueError(
            'must be "package.module:Class" or a built-in name'
            + _suggest(value, built_in_names())
        )
    return value


def _check_callback(value: str) -> str:
    if ":" in value:
        return check_object(value)
    if not value.isidentifier():
        raise ValueError(
            'must be "package.module:Class", or the name of a class of '
            'keras.callbacks such as "EarlyStopping"'
        )
    return value


class CallbackSpec(Config):
    """A callback to make.

    Attributes:
        type: the class: "package.module:Class", or the bare name of a class
            of `keras.callbacks`.
        config: keyword arguments for it.
    """

    type: Annotated[str, pydantic.AfterValidator(_check_callback)]
    config: Arguments = pydantic.Field(default_factory=dict)


class Experiment(Config):
    """All that a training run is made of, as plain data.

    Attributes:
        task: the task: "package.module:Class" (or a function that returns a
            task), or a built-in name such as "digits".
        task_config: keyword arguments for it.
        data: the data of "train" and of "validation", in the place of what
            the task's `build_inputs` gives for them.
        trainer: how it is trained.
        callbacks: Keras callbacks, in the order in which they are called.
        run_dir: the directory of the run; None is `runs/` and the name of the
            experiment.
        backend: the Keras backend, where neither the command line nor the
            environment asks for one.
    """

    task: Annotated[str, pydantic.AfterValidator(_check_task)]
    task_config: Arguments = pydantic.Field(default_factory=dict)
    data: dict[Literal["train", "validation"], DataConfig] = pydantic.Field(
        default_factory=dict
    )
    trainer: TrainerConfig = TrainerConfig()
    callbacks: list[CallbackSpec] = pydantic.Field(default_factory=list)
    run_dir: str | None = None
    backend: Literal["jax", "tensorflow", "torch"] | None = None

    # Where each value was written, for mistakes that show only when the task
    # and the callbacks are built.
    _document: Document = pydantic.PrivateAttr(
        default_factory=lambda: Document({})
    )

    def __eq__(self, other: object) -> bool:
        """Where the values were written is no part of what they are."""
        if not isinstance(other, Experiment):
            return NotImplemented
        return self.model_dump() == other.model_dump()


def built_in_names() -> list[str]:
    """Returns the names of the experiments that come with legato."""
    # By their files: importing `legato.tasks` would import Keras.
    return sorted(
        name.removesuffix(".yaml")
        for entry in _built_in_directory().iterdir()
        if (name := entry.name).endswith(".yaml")
    )


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
        document = _built_in(text)
    else:
        raise ConfigError(
            f"{text}: there is no such experiment. CONFIG is a YAML file, "
            "package.module:experiment or a built-in name"
            + _suggest(text, built_in_names())
        )
    document = apply_overrides(document, overrides)
    experiment = validate(Experiment, document, source=text)
    if experiment.run_dir is None:
        experiment = experiment.replace(run_dir=f"runs/{name}")
    experiment._document = document
    return experiment


def build_task(experiment: Experiment) -> "Task":
    """Makes the experiment's task; imports Keras and the task's module.

    Raises:
        ConfigError: if it cannot be found, or `task_config` does not fit it.
    """
    from legato.task import Task

    name = experiment.task
    if ":" not in name:
        name = _built_in(name).data["task"]
    task = _build(
        name, experiment, ("task",), experiment.task_config, ("task_config",)
    )
    if not isinstance(task, Task):
        raise ConfigError(
            f"{_where(experiment, ('task',))}: {name} made a "
            f"{type(task).__name__}, which is not a legato.Task."
        )
    task.configured_inputs = {
        split: functools.partial(_build_data, experiment, split)
        for split in experiment.data
    }
    return task


def _build_data(experiment: Experiment, split: Any) -> Any:
    """The data of a split, as its config says."""
    from legato import data, files
    from legato.workers import Pad

    spec = experiment.data[split]
    at = ("data", split)
    name = spec.type if ":" in spec.type else _FILES[spec.type]
    made = _build(name, experiment, (*at, "type"), spec.config, (*at, "config"))
    if spec.batch_size is None:
        return made
    if spec.select is not None:
        where = _where(experiment, (*at, "select"))
        made = tuple(_selected(made, part, where) for part in spec.select)
    given = spec.arguments(split)
    transform = spec.transform
    # (A list holds examples, as it does for `RandomAccessSource`.)
    is_arrays = data.are_arrays(made) and not isinstance(made, list)
    if is_arrays and transform is None and not spec.workers:
        return data.ArraySource(made, **given)
    if transform is not None:
        where = _where(experiment, (*at, "transform"))
        given["transform"] = import_object(transform, where)
    if isinstance(made, files.CocoDetection):
        given["collate"] = Pad(made.padding)
    return data.RandomAccessSource(
        made,
        workers=spec.workers,
        processes=spec.processes,
        prefetch=spec.prefetch,
        **given,
    )


_FILES = {
    "npz": "legato.files:npz",
    "image_folder": "legato.files:ImageFolder",
    "coco": "legato.files:CocoDetection",
}


def _selected(made: Any, part: str, where: str) -> Any:
    if not isinstance(made, dict):
        raise ConfigError(
            f"{where}: {part!r} is to be selected, and the data are a "
            f"{type(made).__name__}, not a dict. Leave `select` out."
        )
    if part not in made:
        raise ConfigError(
            f"{where}: the data have no {part!r}, but {', '.join(made)}."
        )
    return made[part]


def build_callbacks(experiment: Experiment) -> "list[keras.callbacks.Callback]":
    """Makes the experiment's callbacks; imports Keras and their modules.

    Raises:
        ConfigError: if a class cannot be found, or its `config` does not fit.
    """
    import keras

    callbacks = []
    for index, spec in enumerate(experiment.callbacks):
        at = ("callbacks", index, "type")
        name = spec.type if ":" in spec.type else f"keras.callbacks:{spec.type}"
        callback = _build(
            name, experiment, at, spec.config, ("callbacks", index, "config")
        )
        if not isinstance(callback, keras.callbacks.Callback):
            raise ConfigError(
                f"{_where(experiment, at)}: {name} made a "
                f"{type(callback).__name__}, which is not a "
                "keras.callbacks.Callback."
            )
        callbacks.append(callback)
    return callbacks


def run_experiment(
    experiment: Experiment,
    mode: str = "train_and_eval",
    run_dir: str | os.PathLike[str] | None = None,
    summary_manager: "SummaryManagerInterface | None" = None,
    eval_summary_manager: "SummaryManagerInterface | None" = None,
    save_summary: bool = True,
) -> Any:
    """Runs an experiment, or goes on with it.

    Args:
        experiment: what to run.
        mode: "train_and_eval", "train" (no validation), "eval" (the newest
            checkpoint on the validation data), or "continuous_eval" (each
            checkpoint, while another process trains).
        run_dir: the directory of the run; None takes the experiment's, or
            `runs/` and the task's name.
        summary_manager: writes the summaries of training; see `Trainer`.
        eval_summary_manager: writes what validation, or evaluation, measures.
        save_summary: False writes no summaries, neither by the run itself nor
            by these managers; `metrics.jsonl` stays.

    Returns:
        What `Trainer.train`, `Trainer.evaluate` or
        `Trainer.evaluate_continuously` returns.

    Raises:
        ConfigError: if the mode is not known or the experiment is not valid.
    """
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
            return trainer.evaluate_continuously()
        case _:
            return trainer.train()


_SUMMARIES = "tensorboard"
_MODES = ("train_and_eval", "train", "eval", "continuous_eval")
_LATER_MODES = ("train_and_post_eval",)


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
        meant = " (not yet)" if mode in _LATER_MODES else ""
        raise ConfigError(
            f"mode must be one of {', '.join(_MODES)}; got {mode!r}{meant}."
        )
    from legato.trainer import Trainer

    config = experiment.trainer
    if mode == "train":
        config = config.replace(validation_interval=None)
    trains = mode in ("train", "train_and_eval")
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


def _built_in_directory() -> Any:
    return importlib.resources.files("legato").joinpath("tasks")


def _built_in(name: str) -> Document:
    resource = _built_in_directory().joinpath(f"{name}.yaml")
    return parse_yaml(resource.read_text("utf-8"), f"{name}.yaml")


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


def _where(experiment: Experiment, at: tuple[str | int, ...]) -> str:
    dotted = ".".join(map(str, at))
    place = experiment._document.place(at)
    return f"{place}: {dotted}" if place else dotted


def _build(
    name: str,
    experiment: Experiment,
    at: tuple[str | int, ...],
    config: dict[str, Any],
    config_at: tuple[str | int, ...],
) -> Any:
    where = _where(experiment, at)
    factory = import_object(name, where)
    if not callable(factory):
        raise ConfigError(f"{where}: {name} is not a class or a function.")
    arguments = _check_arguments(factory, config, experiment, config_at)
    try:
        return factory(**arguments)
    except LegatoError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: {name} could not be made: {error}"
        ) from error


def _check_arguments(
    factory: Callable[..., Any],
    config: dict[str, Any],
    experiment: Experiment,
    at: tuple[str | int, ...],
) -> dict[str, Any]:
    """Checks keyword arguments against a signature and its annotations."""
    maker = factory.__init__ if inspect.isclass(factory) else factory
    namespace = getattr(inspect.unwrap(maker), "__globals__", {})
    fields: dict[str, Any] = {}
    required = []
    open_ended = False
    for name, parameter in inspect.signature(factory).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
        elif parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        ):
            fields[name] = _annotation(parameter, namespace)
            if parameter.default is parameter.empty:
                required.append(name)
    return validate_mapping(
        fields,
        config,
        required=required,
        open_ended=open_ended,
        doc=experiment._document,
        at=at,
        source="",
    )


def _annotation(parameter: inspect.Parameter, namespace: dict) -> Any:
    """Returns what the argument is checked against; Any where nothing can.

    Strings are resolved one by one: a name that only a type checker knows
    must not cost the other arguments their checks.
    """
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return Any
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, namespace)
        except Exception:
            return Any
    try:
        if parameter.default is None:
            annotation = annotation | None
        pydantic.create_model(
            "Probe",
            __config__=pydantic.ConfigDict(arbitrary_types_allowed=True),
            field=(annotation, None),
        )
    except (pydantic.errors.PydanticUserError, TypeError):
        return Any
    return annotation


def import_object(name: str, where: str) -> Any:
    """Imports `package.module:Name`, from the working directory too.

    An error inside the module is the user's own and is let through.

    Args:
        name: what to import.
        where: the name was given, for messages.

    Raises:
        ConfigError: if there is no such object.
    """
    if not OBJECT.fullmatch(name):
        raise ConfigError(
            f"{where}: must be of the form package.module:Name (got {name!r})."
        )
    module_name, _, attributes = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise
        raise ConfigError(
            f"{where}: there is no module {missing!r}. Modules are looked for "
            "where Python looks and in the working directory."
        ) from None
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            public = [each for each in dir(found) if not each.startswith("_")]
            meant = nearest(attribute, public)
            raise ConfigError(
                f"{where}: {module_name} has no {attribute!r}"
                + (f" - did you mean {meant!r}?" if meant else ".")
            ) from None
    return found


def _suggest(name: str, known: list[str]) -> str:
    meant = nearest(name, known)
    if meant is not None:
        return f" - did you mean {meant!r}?"
    return f"; built in are {', '.join(known)}."
