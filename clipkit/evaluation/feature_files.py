"""Rows with their features in one Arrow file that is named by the hash of its content: whole, or known to be damaged."""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipkit.training.atomic_files import fsync_folder, one_line_os_error, remove_quietly

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIX = ".arrow"


def write_feature_file(folder: Path, columns: Mapping[str, Sequence[Any]], features: Mapping[str, np.ndarray],
                       prefix: str = "") -> Path:
    """Write rows beside what is there already. Any number of processes may write into the folder at once.

    Args:
      folder: made if missing.
      columns: for each name N plain values (numbers, texts, lists of them).
      features: for each name an array (N, D), fp32.
      prefix: put before the hash in the file's name.

    Raises:
      OSError: the file cannot be written; nothing of it stays.
    """
    import pyarrow as pa

    arrays = {name: pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).ravel()), rows.shape[1])
              for name, rows in features.items()}
    table = pa.table({**{name: pa.array(values) for name, values in columns.items()}, **arrays})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue()
    path = folder / f"{prefix}{hashlib.sha256(content).hexdigest()}{SUFFIX}"
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp-", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # a temporary file is its maker's alone; a cache may be shared
        os.replace(temporary, path)
        fsync_folder(folder)
    except OSError as error:
        if temporary is not None:
            remove_quietly(temporary)
        raise one_line_os_error(error, path) from error
    return path


def read_feature_files(folder: Path, prefix: str = "") -> "list[tuple[Path, pa.Table]]":
    """Map the files of a folder into memory, in the order of their names. A damaged one is removed, and a warning says so."""
    import pyarrow as pa

    found = []
    for path in sorted(folder.glob(f"{prefix}*{SUFFIX}")):
        try:
            content = pa.memory_map(str(path)).read_buffer() if path.stat().st_size else b""
        except FileNotFoundError:
            continue  # another process was done with it
        if hashlib.sha256(content).hexdigest() != path.stem.removeprefix(prefix):
            warnings.warn(f"{path} is damaged (its sha256 is not that of its name): it is removed, and what it held is "
                          "encoded again", stacklevel=2)
            remove_quietly(path)
            continue
        found.append((path, pa.ipc.open_file(pa.py_buffer(content)).read_all()))
    return found


def feature_column(table: "pa.Table", name: str) -> np.ndarray:
    """Return the features of a table as `read_feature_files` gives it, (N, D) fp32: its own memory, read-only."""
    column = table[name].chunk(0)  # they are written as one
    return column.values.to_numpy().reshape(len(column), -1)
