"""What a run keeps besides its checkpoints: for those who die without one.

A process that is killed before the first checkpoint may have added to files
of the user's. The next one begins anew, and can put these files back only if
it is told what they were.
"""

import dataclasses
import re
import uuid
from pathlib import Path

from legato import storage
from legato.errors import DamagedError
from legato.storage import strict_json
from legato.types import JSON


@dataclasses.dataclass
class Notes:
    """The notes of one run.

    Attributes:
        token: a word that no other run has.
        by_key: callback -> what its adapter noted before it began.
    """

    token: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    by_key: dict[str, JSON] = dataclasses.field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write them, durably."""
        tree: JSON = {"format": 1, "token": self.token, "notes": self.by_key}
        storage.write_file(path, strict_json.dumps(tree))


def read_notes(path: Path) -> Notes | None:
    """The notes that are there.

    Raises:
        DamagedError: they are none.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    match strict_json.loads(data, name=str(path)):
        case {"format": 1, "token": str(token), "notes": dict(notes)} if (
            # It becomes part of file names.
            re.fullmatch(r"[0-9a-f]{32}", token)
        ):
            return Notes(token, notes)
    raise DamagedError(
        f"{path} is not what callbacks noted when the run began. Remove it, "
        "and what a process wrote that died without a checkpoint stays."
    )
