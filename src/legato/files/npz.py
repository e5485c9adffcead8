"""NumPy's archives of arrays."""

import os
import zipfile
from typing import Any

import numpy as np

from legato.errors import DataError
from legato.files.images import Path_

_LOCAL_HEADER = 30  # bytes, before the name and what else there is


def npz(path: Path_) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file, by name; nothing in it is unpickled.

    What `np.savez` has stored is mapped: rows are read as they are needed, and
    the archive's checksum of all of them is not looked at.
    What `np.savez_compressed` has stored is read whole.

    Args:
        path: the file.

    Returns:
        Arrays for `legato.ArraySource`, or a selection of them.

    Raises:
        DataError: it is no such file, or holds objects.
    """
    path = os.fspath(path)
    found: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                array = None
                if member.compress_type == zipfile.ZIP_STORED:
                    array = _mapped(path, file, member.header_offset)
                if array is None:
                    with archive.open(member) as content:
                        array = np.lib.format.read_array(
                            content, allow_pickle=False
                        )
                found[name] = array
    # (Of damaged files come errors of very different classes: a header is read
    # as Python is, an archive by several libraries.)
    except Exception as error:
        raise DataError(
            f"{path!r} cannot be read as an .npz file of arrays: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not found:
        raise DataError(f"{path!r} holds no array.")
    return found


def _mapped(path: str, file: Any, offset: int) -> np.ndarray | None:
    """An array that lies in the archive as it is; None if it cannot be."""
    file.seek(offset)
    header = file.read(_LOCAL_HEADER)
    name = int.from_bytes(header[26:28], "little")
    extra = int.from_bytes(header[28:30], "little")
    file.seek(offset + _LOCAL_HEADER + name + extra)
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        return None
    shape, in_fortran_order, dtype = read(file)
    if dtype.hasobject or 0 in shape or shape == ():
        return None
    order = "F" if in_fortran_order else "C"
    return np.memmap(path, dtype, "r", file.tell(), shape, order)
