"""Data in a config: what is read, and how it is made into batches."""

from typing import Annotated, Any, Literal

import pydantic

from legato.config.model import Config
from legato.config.objects import Arguments, check_object

FILES = ("npz", "image_folder", "coco")
"""The kinds of files that have a name of their own."""


def _check_type(value: str) -> str:
    if ":" in value:
        return check_object(value)
    if value not in FILES:
        raise ValueError(
            f'must be {", ".join(FILES)}, or "package.module:function" of a '
            "function or class that gives data"
        )
    return value


class DataConfig(Config):
    """The data of a split, for `Experiment.data`.

    Attributes:
        type: what gives the data: "npz", "image_folder" or "coco", of
            `legato.files`; or "package.module:function" of a function or
            class, which gives arrays or a dataset of single examples, or
            anything that `Task.build_inputs` may return.
        config: keyword arguments for `type`; paths are relative to the working
            directory.
        select: of data that are a dict, such as those of an .npz file: the
            names of the parts that make a batch, in this order, such as
            [x, y]. None leaves the dict.
        batch_size: examples in a batch; None where `type` gives batches.
        shuffle: a new order in each epoch; by default in training alone.
        seed: the seed of the order; None takes the run's.
        drop_remainder: leave out a partial last batch.
        transform: "package.module:function", called with each example and a
            generator of random numbers: see `legato.RandomAccessSource`.
        workers: how many threads or processes make batches; 0 makes them
            where they are needed.
        processes: make them processes, where threads would wait for each
            other.
        prefetch: batches that each worker makes ahead.
    """

    type: Annotated[str, pydantic.AfterValidator(_check_type)]
    config: Arguments = pydantic.Field(default_factory=dict)
    select: list[str] | None = None
    batch_size: Annotated[int, pydantic.Field(ge=1)] | None = None
    shuffle: bool | Literal["batch"] | None = None
    seed: Annotated[int, pydantic.Field(ge=0)] | None = None
    drop_remainder: bool = False
    transform: Annotated[str, pydantic.AfterValidator(check_object)] | None = (
        None
    )
    workers: Annotated[int, pydantic.Field(ge=0)] = 0
    processes: bool = False
    prefetch: Annotated[int, pydantic.Field(ge=1)] = 2

    @pydantic.model_validator(mode="after")
    def _batches(self) -> "DataConfig":
        if self.batch_size is not None:
            return self
        if self.type in FILES:
            raise ValueError(
                f"type {self.type!r} gives single examples: say how many make "
                "a batch (batch_size)"
            )
        given = sorted(self.changed() - {"type", "config"})
        if given:
            raise ValueError(
                f"{', '.join(given)} say how batches are made of examples, and "
                "there is no batch_size: give it, or leave them out"
            )
        return self

    def arguments(self, split: str) -> dict[str, Any]:
        """Those that `ArraySource` and `RandomAccessSource` share.

        Args:
            split: "train" or "validation".
        """
        shuffle = self.shuffle
        return {
            "batch_size": self.batch_size,
            "shuffle": split == "train" if shuffle is None else shuffle,
            "seed": self.seed,
            "drop_remainder": self.drop_remainder,
        }
