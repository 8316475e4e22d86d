"""Sources of samples: which one a path, a list of paths or a dataset is."""

import os
from collections.abc import Sequence
from pathlib import Path

from . import formats
from .base_source import Source
from .folders import Files, folder, listed, walk
from .packed import INDEX, Packed
from .tar_members import COMPRESSED
from .tars import Tars


def paths_of(source: object) -> Path | list[Path]:
    """Check that the argument `source` is a path or a list of paths, and return it as such.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(source, (str, os.PathLike)):
        return Path(source)
    if isinstance(source, Sequence) and all(isinstance(path, (str, os.PathLike)) for path in source):
        return [Path(path) for path in source]
    raise TypeError(f"source must be a path or a list of paths, got {type(source).__name__} {source!r:.80}")


def open_source(source: object) -> Source:
    """Return the source at a path or of a list of paths, and log the files that it leaves out.

    Raises:
        TypeError: `source` is neither a path nor a list of paths.
        ValueError: the source doesn't exist, holds no image, or is damaged.
    """
    given = paths_of(source)
    try:
        found = _from_path(given) if isinstance(given, Path) else _from_list(given)
    except OSError as error:
        shown = given if isinstance(given, Path) else formats.first_names([str(path) for path in given])
        raise ValueError(f"source {shown} can't be read: {type(error).__name__}: {error}") from error
    formats.report(found.title, found.left_out)
    return found


def _from_path(path: Path) -> Source:
    if path.is_dir():
        if (path / INDEX).exists():
            return Packed(path)
        shards = [path / name for name in sorted(os.listdir(path)) if name.lower().endswith(".tar")]
        shards = [shard for shard in shards if shard.is_file() and not shard.name.startswith(".")]
        return _tars_of_folder(path, shards) if shards else Files(path, *folder(path, formats.readable_suffixes()))
    if _is_tar(path):
        return Tars([path])
    if formats.is_archive(path.name):
        raise ValueError(f"source {path}: {COMPRESSED}")
    got = path if os.path.lexists(path) else f"{path}, which doesn't exist"
    raise ValueError(f"source must be a folder, a .tar file, a packed dataset or a list of files; got {got}")


def _from_list(paths: list[Path]) -> Source:
    if not paths:
        raise ValueError("source must hold at least one file, got an empty list")
    for path in paths:
        if formats.is_archive(path.name) and not _is_tar(path):
            raise ValueError(f"source holds {path}: {COMPRESSED}")
        # only for names without the suffix of an image, since each call of is_dir costs time
        if not formats.is_image(path.name) and path.is_dir():
            raise ValueError(f"source must be images or .tar files, got the folder {path} in a list")
    shards = [_is_tar(path) for path in paths]
    if any(shards) and not all(shards):
        raise ValueError("source must be images or .tar files, got both in one list")
    return Tars(paths) if any(shards) else Files(*listed(paths))


def _is_tar(path: Path) -> bool:
    return path.suffix.lower() == ".tar"


def _tars_of_folder(root: Path, shards: list[Path]) -> Tars:
    """Return the source of a folder's tar files; it leaves out the images beside them."""
    names, left_out = walk(root, formats.readable_suffixes())
    left_out[".tar"] -= len(shards)
    left_out[formats.BESIDE_TARS] += len(names)
    return Tars(shards, left_out)
