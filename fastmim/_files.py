"""Files that are written whole or not at all, even if the machine stops."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Yield the path of a file to be written, which then replaces `path`; after an error the old file stays.

    Args:
        path: the file.
        suffix: what the temporary file's name has more than the name of `path`.

    Raises:
        OSError: the file can't be written; the message names it.
    """
    aside = path.with_name(path.name + suffix)
    try:
        with naming_errors(path):
            yield aside
            flush(aside)
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Flush a file or folder to disk, so that it outlasts a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming_errors(path: Path) -> Iterator[Path]:
    """Add the path to an OSError that names no file."""
    try:
        yield path
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
