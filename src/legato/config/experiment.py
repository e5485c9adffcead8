"""An experiment, as plain data; and those that come with legato."""

import importlib.resources
from typing import Annotated, Any, Literal

import pydantic

from legato.config.data import DataConfig
from legato.config.document import Document, parse_yaml
from legato.config.model import Config, nearest
from legato.config.objects import Arguments, check_class, check_object
from legato.config.optimizer import OptimizerConfig
from legato.config.trainer import TrainerConfig


def _check_task(value: str) -> str:
    if ":" in value:
        return check_object(value)
    if value not in built_in_names():
        raise ValueError(
            'must be "package.module:Class" or a built-in name'
            + suggest(value, built_in_names())
        )
    return value


def _check_callback(value: str) -> str:
    return check_class(value, "keras.callbacks", "EarlyStopping")


class CallbackSpec(Config):
    """A callback to make.

    Attributes:
        type: the class: "package.module:Class", or the bare name of a class
            of `keras.callbacks`.
        config: keyword arguments for the class.
    """

    type: Annotated[str, pydantic.AfterValidator(_check_callback)]
    config: Arguments = pydantic.Field(default_factory=dict)


class Experiment(Config):
    """All that a training run is made of, as plain data.

    Attributes:
        task: the task: "package.module:Class" (or a function that returns a
            task), or a built-in name such as "digits".
        task_config: keyword arguments for the task.
        data: the data of "train" and of "validation", in the place of what
            the task's `build_inputs` gives for them.
        optimizer: the optimizer, in the place of what the task's
            `build_optimizer` gives; null leaves it to the task.
        trainer: how the run goes: its length, cadences and policies.
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
    optimizer: OptimizerConfig | None = None
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
        for entry in _directory().iterdir()
        if (name := entry.name).endswith(".yaml")
    )


def _directory() -> Any:
    return importlib.resources.files("legato").joinpath("tasks")


def built_in(name: str) -> Document:
    """Reads the experiment of such a name."""
    resource = _directory().joinpath(f"{name}.yaml")
    return parse_yaml(resource.read_text("utf-8"), f"{name}.yaml")


def suggest(name: str, known: list[str]) -> str:
    """The end of a message: what was meant, or what there is."""
    meant = nearest(name, known)
    if meant is not None:
        return f" - did you mean {meant!r}?"
    return f"; built in are {', '.join(known)}."
