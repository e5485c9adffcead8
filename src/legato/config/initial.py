"""Where a new run takes its weights from."""

from typing import Annotated, Any, Literal

import pydantic

from legato.config.model import Config


def _check_which(value: Any) -> Any:
    is_step = isinstance(value, int) and not isinstance(value, bool)
    if value in ("best", "latest") or (is_step and value >= 0):
        return value
    raise ValueError(
        'must be "best", "latest", or the step of a checkpoint, such as 100'
    )


class InitConfig(Config):
    """Weights for a run that begins, for `TrainerConfig.init_from`.

    Patterns are as in a shell (`*` is anything, also with slashes in it), and
    are matched with the paths that the report shows, such as
    "model/4_dense/kernel".

    Attributes:
        path: the directory of a run or of a checkpoint of it; or a `.keras`,
            `.weights.h5` or `.safetensors` file.
        checkpoint: of a run: "best", "latest" or a step.
        weights: of a run: the model's own ("model"), or the averages that its
            optimizer keeps ("average").
        include: patterns; only variables that one of them matches are taken.
        exclude: patterns; variables that one of them matches are not taken,
            such as those of a new head.
    """

    path: Annotated[str, pydantic.Field(min_length=1)]
    checkpoint: Annotated[
        int | Literal["best", "latest"],
        pydantic.PlainValidator(_check_which),
    ] = "latest"
    weights: Literal["model", "average"] = "model"
    include: list[str] = pydantic.Field(default_factory=lambda: ["*"])
    exclude: list[str] = pydantic.Field(default_factory=list)


def from_path(value: Any) -> Any:
    """A path alone is short for what has no other field."""
    return {"path": value} if isinstance(value, str) else value
