"""Files that are whole or not there: what a run, a sample or a figure leaves behind never ends in the middle."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def whole_file(path: pathlib.Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes its place at `path` once it is complete and on the disk.

    A kill, a power cut or an error leaves what was there before, never a piece. With `durable=False` nothing waits for
    the disk, for thousands of small files: whole after a kill or an error, not necessarily after a power cut.

    Raises:
        OSError: the disk is full or the folder cannot be written, with the name of the file; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:  # not the system's: a TimeoutError that somebody raised
            raise
        # of a full disk it does not say where
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    if durable and os.name == "posix":  # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def require_writable(folder: pathlib.Path) -> None:
    """Finds out before long work whether a file can be written into `folder` after it.

    Raises:
        OSError: it cannot, with the name of the folder.
    """
    probe = folder / f".writable.{os.getpid()}.tmp"
    try:
        probe.touch()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Puts `content` at `path` as a `whole_file`."""
    with whole_file(path) as file:
        file.write(content)
