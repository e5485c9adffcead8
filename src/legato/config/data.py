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


_Name = Annotated[str, pydantic.AfterValidator(check_object)]
_Positive = Annotated[int, pydantic.Field(ge=1)]


class PadConfig(Config):
    """How examples of different lengths become a batch: see `legato.Pad`.

    Attributes:
        values: what arrays are filled up with: a number for all of them, or
            numbers nested as the examples are.
        boundaries: the lengths that batches may have, ascending.
        multiple: batches have lengths that are multiples of it.
        truncate: cut off what is longer than the last boundary.
        mask: tell beside each padded array of a dict where examples are.
    """

    values: Any = 0
    boundaries: list[_Positive] | None = None
    multiple: _Positive | None = None
    truncate: bool = False
    mask: bool = False


class BucketsConfig(Config):
    """Which examples are put into one batch: see `legato.Buckets`.

    Attributes:
        lengths: "package.module:function", called with each example once,
            which returns its length.
        boundaries: the greatest length in each bucket, ascending; or a number
            of buckets, of as many examples each.
        batch_sizes: examples in a batch, of each bucket; null takes
            `batch_size` for all.
    """

    lengths: _Name
    boundaries: list[_Positive] | _Positive
    batch_sizes: list[_Positive] | None = None


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
        collate: "package.module:function", which makes a batch of a list of
            examples; by default their arrays are stacked.
        pad: in its place, for arrays of different lengths.
        bucket_by: puts examples of like length into one batch.
        workers: how many threads or processes make batches; 0 makes them
            where they are needed.
        processes: make them processes, where threads would wait for each
            other.
        prefetch: batches that each worker makes ahead.
    """

    type: Annotated[str, pydantic.AfterValidator(_check_type)]
    config: Arguments = pydantic.Field(default_factory=dict)
    select: list[str] | None = None
    batch_size: _Positive | None = None
    shuffle: bool | Literal["batch"] | None = None
    seed: Annotated[int, pydantic.Field(ge=0)] | None = None
    drop_remainder: bool = False
    transform: _Name | None = None
    collate: _Name | None = None
    pad: PadConfig | None = None
    bucket_by: BucketsConfig | None = None
    workers: Annotated[int, pydantic.Field(ge=0)] = 0
    processes: bool = False
    prefetch: _Positive = 2

    @pydantic.model_validator(mode="after")
    def _one_collates(self) -> "DataConfig":
        if self.collate is not None and self.pad is not None:
            raise ValueError(
                "collate and pad each say how examples become a batch: leave "
                "one out"
            )
        return self

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

    @property
    def makes_examples(self) -> bool:
        """Whether something is done with single examples, or beside."""
        given = self.transform, self.collate, self.pad, self.bucket_by
        return self.workers > 0 or any(each is not None for each in given)

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
