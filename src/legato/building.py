"""What an experiment names: imported, checked, and made."""

import contextlib
import functools
import importlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pydantic

from legato.config import (
    OBJECT,
    Experiment,
    built_in,
    nearest,
    validate_mapping,
)
from legato.errors import ConfigError, LegatoError

if TYPE_CHECKING:
    import keras

    from legato.task import Task


def build_task(experiment: Experiment) -> "Task":
    """Makes the experiment's task; imports Keras and the task's module.

    Raises:
        ConfigError: if it cannot be found, or `task_config` does not fit it.
    """
    from legato.task import Task

    name = experiment.task
    if ":" not in name:
        name = built_in(name).data["task"]
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
    if experiment.optimizer is not None:
        task.configured_optimizer = functools.partial(
            _build_optimizer, experiment, type(task)
        )
    return task


def _build_optimizer(
    experiment: Experiment, task_type: "type[Task]"
) -> "keras.optimizers.Optimizer":
    """The optimizer, as its config says."""
    import keras

    from legato.optimizers import own_step_scales

    spec = experiment.optimizer
    assert spec is not None  # `build_task` looked
    at = ("optimizer", "type")
    is_keras = ":" not in spec.type
    name = f"keras.optimizers:{spec.type}" if is_keras else spec.type
    given = spec.arguments()
    if spec.schedule is not None:
        given["learning_rate"] = _build_schedule(experiment)
    made = _build(
        name,
        experiment,
        at,
        spec.config,
        ("optimizer", "config"),
        given=given,
        is_closed=is_keras,
    )
    if not isinstance(made, keras.optimizers.Optimizer):
        raise ConfigError(
            f"{_where(experiment, at)}: {name} made a {type(made).__name__}, "
            "which is not a keras.optimizers.Optimizer."
        )
    if spec.exclude_from_weight_decay:
        made.exclude_from_weight_decay(var_names=spec.exclude_from_weight_decay)
    scales = spec.loss_scaling
    if scales is None:
        scales = own_step_scales(task_type, experiment.trainer.precision, made)
    return keras.optimizers.LossScaleOptimizer(made) if scales else made


def _build_schedule(experiment: Experiment) -> Any:
    """The learning rate, where it changes."""
    import keras

    from legato.optimizers import add_warmup, make_schedule

    assert experiment.optimizer is not None
    spec, at = experiment.optimizer.schedule, ("optimizer", "schedule")
    assert spec is not None
    if spec.is_own:
        made = _build(
            spec.type,
            experiment,
            (*at, "type"),
            spec.config,
            (*at, "config"),
        )
        wanted = keras.optimizers.schedules.LearningRateSchedule
        if not isinstance(made, wanted):
            raise ConfigError(
                f"{_where(experiment, (*at, 'type'))}: {spec.type} made a "
                f"{type(made).__name__}, which is not a "
                "keras.optimizers.schedules.LearningRateSchedule."
            )
        return add_warmup(spec, made)
    rate = experiment.optimizer.learning_rate
    assert rate is not None  # checked by the config
    with _placing(experiment, at):
        return make_schedule(spec, rate, experiment.trainer.train_steps)


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
    for name in ("transform", "collate"):
        if (value := getattr(spec, name)) is not None:
            given[name] = import_object(value, _where(experiment, (*at, name)))
    if (pad := spec.pad) is not None:
        with _placing(experiment, (*at, "pad")):
            given["collate"] = Pad(**dict(pad))
    # (A list holds examples, as it does for `RandomAccessSource`.)
    is_arrays = data.are_arrays(made) and not isinstance(made, list)
    if is_arrays and not spec.makes_examples:
        return data.ArraySource(made, **given)
    if (buckets := spec.bucket_by) is not None:
        where = _where(experiment, (*at, "bucket_by", "lengths"))
        arguments = dict(buckets)
        arguments["lengths"] = import_object(buckets.lengths, where)
        with _placing(experiment, (*at, "bucket_by")):
            given["bucket_by"] = data.Buckets(**arguments)
    if isinstance(made, files.CocoDetection):
        given.setdefault("collate", Pad(made.padding))
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


def _where(experiment: Experiment, at: tuple[str | int, ...]) -> str:
    dotted = ".".join(map(str, at))
    place = experiment._document.place(at)
    return f"{place}: {dotted}" if place else dotted


@contextlib.contextmanager
def _placing(experiment: Experiment, at: tuple[str | int, ...]) -> Iterator:
    """What is wrong with arguments that stand there, is told with the place."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{_where(experiment, at)}: {error}") from None


def _build(
    name: str,
    experiment: Experiment,
    at: tuple[str | int, ...],
    config: dict[str, Any],
    config_at: tuple[str | int, ...],
    *,
    given: Mapping[str, Any] = types.MappingProxyType({}),
    is_closed: bool = False,
) -> Any:
    """Makes an object of a class or by a function.

    Args:
        name: of it.
        experiment: which names it.
        at: where in it.
        config: keyword arguments for it, to be checked.
        config_at: where they are.
        given: further ones, which are right.
        is_closed: whether it takes no others than it names.
    """
    where = _where(experiment, at)
    factory = import_object(name, where)
    if not callable(factory):
        raise ConfigError(f"{where}: {name} is not a class or a function.")
    arguments = _check_arguments(
        factory, config, experiment, config_at, given, is_closed
    )
    try:
        return factory(**arguments, **given)
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
    given: Iterable[str],
    is_closed: bool,
) -> dict[str, Any]:
    """Checks keyword arguments against a signature and its annotations."""
    maker = factory.__init__ if inspect.isclass(factory) else factory
    namespace = getattr(inspect.unwrap(maker), "__globals__", {})
    fields: dict[str, Any] = {}
    required = []
    open_ended = False
    for name, parameter in inspect.signature(factory).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = not is_closed
        elif name in given:
            pass
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
