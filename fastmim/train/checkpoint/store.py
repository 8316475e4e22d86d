"""Checkpoints that can be trusted: folders that are whole or not there, and say so themselves.

A checkpoint is written aside, every file flushed to the disk, and renamed into place; its manifest holds the SHA-256
sum and the size of each file, which are verified before anything is read. Nothing in it is ever unpickled: tensors are
safetensors, the rest is JSON.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
# being written, being deleted
ASIDE = (".tmp", ".old")


class Damaged(ValueError):
    """A checkpoint that isn't what was written; says which file and how."""


def write(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint of `step` into `folder`, and point `latest` there; returns where it is.

    Args:
        folder: where checkpoints are.
        step: updates made.
        tensors: name of a file -> its tensors, on the CPU, contiguous.
        state: what JSON can hold.

    Raises:
        OSError: the disk is full or gone, naming the file; what was there before stays as it was.
    """
    final = folder / f"step-{step:08d}"
    aside = final.with_name(final.name + ASIDE[0])
    # without its parents: a run's folder that is gone is not made anew
    folder.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        for name, values in tensors.items():
            write_tensors(aside / f"{name}.safetensors", values)
        with naming(aside / "state.json") as path:
            path.write_text(json.dumps(state, indent=1))
        sums = {path.name: {"sha256": digest(path), "bytes": path.stat().st_size} for path in sorted(aside.iterdir())}
        with naming(aside / MANIFEST) as path:
            path.write_text(json.dumps({"files": sums}, indent=1))
        for path in (*aside.iterdir(), aside):
            flush(path)
        if final.exists():
            # a checkpoint of the same step, of which this one is a repetition
            _remove(final)
        aside.rename(final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    flush(folder)
    pointer = folder / f"latest{ASIDE[0]}"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(final.name)
    pointer.replace(folder / "latest")
    return final


def verify(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        Damaged: a file is missing, of another size or sum, or not in the manifest.
    """
    try:
        listed = json.loads((path / MANIFEST).read_text())["files"]
        expected = {str(name): (entry["sha256"], entry["bytes"]) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path / MANIFEST} is missing or damaged: {error!r}") from None
    try:
        found = {file.name for file in path.iterdir()} - {MANIFEST}
        for name in sorted(found | expected.keys()):
            if name not in found:
                raise Damaged(f"{path / name} is missing")
            if name not in expected:
                raise Damaged(f"{path / name} is not in {MANIFEST}")
            total, size = expected[name]
            if (path / name).stat().st_size != size:
                raise Damaged(f"{path / name} has {(path / name).stat().st_size} bytes, {MANIFEST} says {size}")
            if digest(path / name) != total:
                raise Damaged(f"{path / name} has another SHA-256 sum than {MANIFEST} says")
    except OSError as error:
        raise Damaged(f"{path} can't be read: {error}") from None
    if not {"model.safetensors", "state.json"} <= expected.keys():
        raise Damaged(f"{path / MANIFEST} lacks model.safetensors or state.json")


def read_state(path: Path) -> dict[str, Any]:
    """What `write` was given as `state`."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise Damaged(f"{path / 'state.json'} can't be read: {error}") from None
    return state


def found(folder: Path) -> Iterator[tuple[int, Path]]:
    """Step and place of each checkpoint, newest first, good or not."""
    paths = folder.iterdir() if folder.is_dir() else ()
    steps = [(int(match[1]), path) for path in paths if (match := NAME.fullmatch(path.name)) and path.is_dir()]
    yield from sorted(steps, reverse=True)


def newest(folder: Path) -> tuple[Path | None, list[Damaged]]:
    """The newest good checkpoint, and why newer ones were refused.

    Those are put aside under the name step-N.damaged, so that nothing takes them for good or writes over them.
    """
    refused = []
    for _, path in found(folder):
        try:
            verify(path)
        except Damaged as error:
            refused.append(error)
            # a disk may allow reading only
            with contextlib.suppress(OSError):
                path.rename(_unused(path.with_name(path.name + ".damaged")))
        else:
            return path, refused
    return None, refused


def prune(folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the last ones and those of every so many steps, and what interrupted runs left aside."""
    for index, (step, path) in enumerate(found(folder)):
        if index >= keep_last and not (keep_every and step % keep_every == 0):
            _remove(path)
    sweep(folder)


def sweep(folder: Path) -> None:
    """Delete what was being written or deleted when a run was killed."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix in ASIDE and NAME.fullmatch(path.stem):
            shutil.rmtree(path, ignore_errors=True)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def flush(path: Path) -> None:
    """Make what was written to a file or folder outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[Path]:
    """Let an OSError name the file that is being written."""
    try:
        yield path
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """A whole new file, as `write(place)` writes it, or the old one and nothing beside it."""
    aside = path.with_name(path.name + ASIDE[0])
    try:
        with naming(aside):
            write(aside)
        flush(aside)
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, of tensors on the CPU.

    Raises:
        OSError: it can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, {"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, f"{error}", str(path)) from error


def _remove(path: Path) -> None:
    """A checkpoint is gone at once, then its files."""
    aside = _unused(path.with_name(path.name + ASIDE[1]))
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _unused(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path
