"""The compiled steps of a run: one for each shape of batch that there is.

A compiler makes a program for fixed shapes. A partial last batch is a second
one, and ragged or bucketed data bring more; a source whose every batch has
another shape would compile for ever. So each new one is told, and there is a
limit.
"""

import contextlib
from collections.abc import Callable, Iterator

from legato.backends import CompiledLoop
from legato.data import DataSource, Shapes, array_specs
from legato.errors import DataError


class LoopsByShape:
    """Compiled loops, by the shapes of the batches that they take.

    Args:
        source: whose batches they take.
        what: what is compiled, for messages, such as "The training step".
        limit: how many shapes there may be. (Where nothing is compiled, the
            oldest is forgotten for a new one.)
        announce: told of each shape that was not to be expected.
    """

    def __init__(
        self,
        source: DataSource,
        what: str,
        limit: int,
        announce: Callable[[str], None],
    ) -> None:
        self._announce = announce
        self._source = source
        self._what = what
        self._limit = limit
        self._loops: dict[Shapes, CompiledLoop] = {}
        self._usual: Shapes | None = None

    def __contains__(self, shapes: object) -> bool:
        return shapes in self._loops

    def __getitem__(self, shapes: Shapes) -> CompiledLoop:
        return self._loops[shapes]

    def __len__(self) -> int:
        return len(self._loops)

    def __iter__(self) -> Iterator[CompiledLoop]:
        return iter(self._loops.values())

    def make_room(self, shapes: Shapes, *, is_expected: bool) -> None:
        """To be called before a loop for new shapes is made.

        Args:
            shapes: these.
            is_expected: whether they are the usual ones, or a partial batch's.

        Raises:
            DataError: there are too many already.
        """
        count = len(self._loops)
        if not count or is_expected:
            return
        is_eager = any(loop.mode == "eager" for loop in self)
        if count < self._limit:
            if not is_eager:
                self._announce(
                    f"{self._what} is compiled for a new shape of batch, "
                    f"{self._shown(shapes)}: number {count + 1} of at most "
                    f"{self._limit}."
                )
        elif is_eager:
            del self._loops[next(iter(self._loops))]
        else:
            raise DataError(
                f"{self._what} was compiled for {count} shapes of batches, and "
                f"a batch of yet another shape came, {self._shown(shapes)}; "
                f"max_batch_shapes={self._limit} is the limit, since each "
                "takes time and memory. Pad the batches to a few lengths "
                "(legato.Pad(boundaries=[...])), or raise the limit: the run "
                "goes on from its newest checkpoint."
            )

    @contextlib.contextmanager
    def naming(self, shapes: Shapes, which: str) -> Iterator[None]:
        """Says of what is raised inside which batch it is about.

        A layer that does not take the shape names itself alone.

        Args:
            shapes: of the batch, for which a loop may be made inside.
            which: batch it is, such as "the batch of step 5".
        """
        try:
            yield
        except Exception as error:
            if self._usual not in (None, shapes):
                error.add_note(
                    f"(This is {which}, with the shapes "
                    f"{self._shown(shapes)}; the first batches had "
                    f"{self._shown(self._usual)}.)"
                )
            raise

    def add(self, shapes: Shapes, loop: CompiledLoop) -> None:
        """Keep a loop."""
        self._usual = self._usual or shapes
        self._loops[shapes] = loop

    def _shown(self, shapes: Shapes) -> str:
        paths = list(array_specs(self._source))
        if len(paths) != len(shapes):
            paths = [str(number) for number in range(len(shapes))]
        return ", ".join(
            f"{path}: {list(shape)}"
            for path, shape in zip(paths, shapes, strict=True)
        )
