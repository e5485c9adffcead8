"""Bytes on disk that survive kills and show damage; nothing of training."""

from legato.storage.commit import (
    Manifest,
    check_names,
    clean_leftovers,
    commit_directory,
    copy_directory,
    locate,
    read_directory,
    read_manifest,
    remove_directory,
)
from legato.storage.files import (
    OS,
    FileSystem,
    JsonLines,
    Lines,
    RecordFile,
    open_regular,
    read_file,
    require_kind,
    sync_directory,
    write_file,
)
from legato.storage.lock import RunLock
from legato.storage.tensors import (
    TensorArena,
    TensorLayout,
    parse_tree,
    read_safetensors,
    read_tensors,
    spec,
)

__all__ = [
    "OS",
    "FileSystem",
    "JsonLines",
    "Lines",
    "Manifest",
    "RecordFile",
    "RunLock",
    "TensorArena",
    "TensorLayout",
    "check_names",
    "clean_leftovers",
    "commit_directory",
    "copy_directory",
    "locate",
    "open_regular",
    "parse_tree",
    "read_directory",
    "read_file",
    "read_manifest",
    "read_safetensors",
    "read_tensors",
    "remove_directory",
    "require_kind",
    "spec",
    "sync_directory",
    "write_file",
]
