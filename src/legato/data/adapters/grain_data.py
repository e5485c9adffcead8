"""Grain's datasets and loaders, on any backend."""

from typing import Any

from legato.data.readers import Iterable

_ENDLESS = 2**62  # Grain's length of a dataset that is repeated without end


class GrainDataset(Iterable):
    """Reads a Grain dataset or loader; each pass is the same, as in Keras.

    Args:
        dataset: `grain.MapDataset`, `grain.IterDataset`, `grain.DataLoader`.
    """

    threads = True

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset, f"grain {type(dataset).__name__}")
        # What its transformations may not have is state.
        self.tracked = []
        if self.length is not None and self.length >= _ENDLESS:
            self.length, self.endless = None, True
