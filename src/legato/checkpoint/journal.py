"""The journal of commits: it tells that a checkpoint was removed."""

from pathlib import Path

from legato import storage
from legato.errors import DamagedError
from legato.storage import strict_json


class Journal:
    """`commits.jsonl`: one line for each commit, and one for each rewind.

    A line `{"step", "manifest_sha256"}` is written after a commit is durable,
    so the journal never claims what was not there. `{"rewound_to"}` takes back
    the claims about later steps (-1: about all): the run went on from there.
    Lines are only ever added, so that a kill leaves at most a torn last line,
    which the next writer cuts off.

    Args:
        path: the file; made by the first record.
        fs: how to write.
    """

    def __init__(self, path: Path, *, fs: storage.FileSystem):
        self.path = path
        self._fs = fs

    def record_commit(self, step: int, sha256: str) -> None:
        """Claims a checkpoint, durably.

        Raises:
            OSError: if it could not be written.
        """
        self._append({"step": step, "manifest_sha256": sha256})

    def record_rewind(self, step: int) -> None:
        """Takes back the claims about steps after this one, durably.

        Raises:
            OSError: if it could not be written.
        """
        self._append({"rewound_to": step})

    def newest(self) -> int | None:
        """The newest step that is claimed.

        Raises:
            DamagedError: if the file is not a journal, or cannot be read.
        """
        return max(self._read()[0], default=None)

    def is_overtaken(self, step: int) -> bool:
        """Whether a rewind took back the last claim of a step.

        Raises:
            DamagedError: if the file is not a journal, or cannot be read.
        """
        claimed, taken_back = self._read()
        return step in taken_back - claimed

    def _read(self) -> tuple[set[int], set[int]]:
        """The steps that are claimed, and those that once were."""
        try:
            return self._parse()
        except FileNotFoundError:
            return set(), set()
        except OSError as e:
            raise DamagedError(f"{self.path}: {e.strerror}") from e

    def _parse(self) -> tuple[set[int], set[int]]:
        claimed: set[int] = set()
        once: set[int] = set()
        with storage.open_regular(self.path) as file:
            while line := file.readline(1000):
                if not line.endswith(b"\n") and len(line) < 1000:
                    break  # torn by a kill
                match strict_json.loads(line, name=str(self.path)):
                    case {"step": int(step), "manifest_sha256": str()}:
                        claimed.add(step)
                    case {"rewound_to": int(step)}:
                        once |= claimed
                        claimed = {s for s in claimed if s <= step}
                    case _:
                        raise DamagedError(f"{self.path}: a malformed line")
        return claimed, once

    def _append(self, record: dict[str, int | str]) -> None:
        lines = storage.JsonLines(self.path, fs=self._fs)
        try:
            lines.append(record)
            lines.sync()
        finally:
            lines.close()
