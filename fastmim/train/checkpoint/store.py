"""Checkpoint folders that are complete or absent, and whose files can be verified.

A checkpoint is written to a temporary folder, every file flushed to disk, and then renamed; its manifest holds the
SHA-256 sum and the size of each file, which are verified before anything is read. Nothing is unpickled: tensors are
safetensors, the rest is JSON.
"""

import contextlib
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._files import flush, naming_errors
from ...interop.convert.shards import is_sharded, read_shards, shards_among

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
# suffixes of folders that are being written, and being deleted
ASIDE = (".tmp", ".old")
# errors of a full disk
FULL = (errno.ENOSPC, errno.EDQUOT)
# sum and size of a file in the manifest
Entry = dict[str, str | int]


class Damaged(ValueError):
    """Error for a checkpoint that is damaged; the message names the file and the fault."""


def write(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint of `step` into `folder`, point `latest` to it, and return its path.

    Args:
        folder: the folder of all checkpoints of the run.
        step: number of updates made.
        tensors: contiguous CPU tensors, by the name of their file without suffix, then by their own.
        state: data that JSON can hold.

    Raises:
        OSError: the disk is full or gone, naming the file; earlier checkpoints stay as they were.
    """
    aside = aside_of(folder, step)
    try:
        begin(aside)
        for name, values in tensors.items():
            write_tensors(aside / f"{name}.safetensors", values)
        sums = {}
        for path in sorted(aside.iterdir()):
            flush(path)
            sums[path.name] = entry_of(path)
        return complete(aside, sums, state)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def aside_of(folder: Path, step: int) -> Path:
    """Return the temporary folder in which the checkpoint of `step` is written."""
    return folder / f"step-{step:08d}{ASIDE[0]}"


def begin(aside: Path) -> None:
    """Make an empty temporary folder."""
    # not its parents: a run's folder that has vanished is not to be recreated
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()


def complete(aside: Path, sums: Mapping[str, Entry], state: Mapping[str, Any]) -> Path:
    """Add state and manifest to a temporary folder whose files are on disk, and put it in its place.

    Args:
        aside: the temporary folder.
        sums: the entries of its files for the manifest, by their names.
        state: data that JSON can hold.
    """
    folder, final = aside.parent, aside.with_suffix("")
    with naming_errors(aside / "state.json") as path:
        path.write_text(json.dumps(state, indent=1))
    files = {**sums, path.name: entry_of(path)}
    with naming_errors(aside / MANIFEST) as path:
        path.write_text(json.dumps({"files": files}, indent=1))
    for path in (aside / "state.json", aside / MANIFEST, aside):
        flush(path)
    if final.exists():
        # an earlier checkpoint of the same step
        _remove(final)
    aside.rename(final)
    flush(folder)
    pointer = folder / f"latest{ASIDE[0]}"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(final.name)
    pointer.replace(folder / "latest")
    return final


def entry_of(path: Path) -> Entry:
    """Return the entry of a file for the manifest."""
    return {"sha256": digest(path), "bytes": path.stat().st_size}


def verify(path: Path, *, sums: bool = True) -> None:
    """Compare every file with the manifest; without `sums` by its size alone.

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
            if sums and digest(path / name) != total:
                raise Damaged(f"{path / name} has another SHA-256 sum than {MANIFEST} says")
    except OSError as error:
        raise Damaged(f"{path} can't be read: {error}") from None
    shards, of = shards_among(expected)
    if "state.json" not in expected or not ("model.safetensors" in expected or shards):
        raise Damaged(f"{path / MANIFEST} lacks model.safetensors or state.json")
    if len(shards) != of:
        raise Damaged(f"{path / MANIFEST} lists {len(shards)} of {of} shards")


def read_state(path: Path) -> dict[str, Any]:
    """Read the `state` that `write` was given."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise Damaged(f"{path / 'state.json'} can't be read: {error}") from None
    return state


def read_tensors(path: Path, part: str) -> dict[str, Tensor]:
    """Read a part of a checkpoint, such as "model", whole, in whichever form it was saved; empty without that part."""
    from safetensors.torch import load_file

    if is_sharded(path):
        return read_shards(path, part)
    file = path / f"{part}.safetensors"
    found: dict[str, Tensor] = load_file(file) if file.is_file() else {}
    return found


def list_checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield step and path of each checkpoint, damaged ones too, newest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    steps = [(int(match[1]), path) for path in paths if (match := NAME.fullmatch(path.name)) and path.is_dir()]
    yield from sorted(steps, reverse=True)


def newest(folder: Path) -> tuple[Path | None, list[Damaged]]:
    """Return the path of the newest good checkpoint, or None, and the errors of newer, damaged ones.

    Damaged checkpoints are renamed to step-N.damaged, so that they are neither used nor overwritten.
    """
    refused = []
    for _, path in list_checkpoints(folder):
        try:
            verify(path)
        except Damaged as error:
            refused.append(error)
            # the file system may be read-only
            with contextlib.suppress(OSError):
                path.rename(_unused(path.with_name(path.name + ".damaged")))
        else:
            return path, refused
    return None, refused


def prune(folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete checkpoints other than the last `keep_last` and those of every `keep_every` steps, and partial ones."""
    for index, (step, path) in enumerate(list_checkpoints(folder)):
        if index >= keep_last and not (keep_every and step % keep_every == 0):
            _remove(path)
    sweep(folder)


def sweep(folder: Path) -> None:
    """Delete folders that were being written or deleted when a run was killed."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix in ASIDE and NAME.fullmatch(path.stem):
            shutil.rmtree(path, ignore_errors=True)


def digest(path: Path) -> str:
    """Return the SHA-256 sum of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file of CPU tensors, with texts for its header.

    Raises:
        OSError: the file can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, {"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, f"{error}", str(path)) from error


def _remove(path: Path) -> None:
    """Delete a checkpoint, renaming it first so that it never looks like a damaged one."""
    aside = _unused(path.with_name(path.name + ASIDE[1]))
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _unused(path: Path) -> Path:
    """Delete the file or folder at a path, if there is one, and return the path."""
    shutil.rmtree(path, ignore_errors=True)
    return path
