"""Files that are whole or not there: what a run, a sample or a figure leaves behind never ends in the middle."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write that takes its place at `path` once it is complete and on the disk.

    A kill, a power cut or an error leaves what was there before, never a piece.

    Raises:
        OSError: the disk is full or the folder cannot be written, with the name of the file; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:  # not the system's: a TimeoutError that somebody raised
            raise
        # of a full disk it does not say where
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Puts `content` at `path` as a `whole_file`."""
    with whole_file(path) as file:
        file.write(content)
