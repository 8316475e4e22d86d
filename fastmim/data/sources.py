"""Sources of samples: which one a path, a list of paths or a dataset is."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import formats
from .base_source import Source
from .folders import Files, folder, listed, walk
from .packed import INDEX, Packed
from .pairs import SUFFIX as PAIRS
from .pairs import Pairs
from .remote import RemoteTars, expanded, is_url
from .rows import Dataset
from .tables import SPLITS, STATE, Table, open_saved
from .tables import SUFFIX as PARQUET
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
    shown = " ".join(repr(source).split())
    raise TypeError(f"source must be a path or a list of paths, got {type(source).__name__} {shown:.80}")


def open_source(source: object) -> Source:
    """Return the source at a path, of a list of paths, at URLs, or of a dataset, and log the files that it leaves out.

    Raises:
        TypeError: `source` is none of these, or the dataset holds no images.
        ValueError: the source doesn't exist, holds no image, or is damaged; or a package that it needs isn't installed.
    """
    if _is_dataset(source):
        return Dataset(source)
    if is_url(source) or (isinstance(source, Sequence) and any(map(is_url, source))):
        return RemoteTars([url for text in _texts(source) for url in expanded(text)])
    given = paths_of(source)
    try:
        found = _from_path(given) if isinstance(given, Path) else _from_list(given)
    except OSError as error:
        shown = given if isinstance(given, Path) else formats.first_names([str(path) for path in given])
        raise ValueError(f"source {shown} can't be read: {type(error).__name__}: {error}") from error
    formats.report(found.title, found.left_out)
    return found


def _is_dataset(source: object) -> bool:
    """Return whether a source is a map-style dataset: it has `len()` and rows, and is no path nor list of paths."""
    if isinstance(source, (str, bytes, os.PathLike, Mapping)) or not hasattr(source, "__getitem__"):
        return False
    if not hasattr(source, "__len__"):
        raise TypeError(f"source must have len() to be a dataset, got {type(source).__name__}")
    return not isinstance(source, (list, tuple)) or bool(source and not isinstance(source[0], (str, os.PathLike)))


def _texts(source: object) -> list[str]:
    if isinstance(source, str):
        return [source]
    assert isinstance(source, Sequence)
    if others := [path for path in source if not is_url(path)]:
        raise ValueError(f"source must be URLs or paths, got both in one list: {others[0]} is no URL")
    return list(source)


def _from_path(path: Path) -> Source:
    if path.is_dir():
        if (path / INDEX).exists():
            return Packed(path)
        if (path / STATE).exists() or (path / SPLITS).exists():
            return open_saved(path)
        names = [name for name in sorted(os.listdir(path)) if not name.startswith(".") and (path / name).is_file()]
        shards = [path / name for name in names if name.lower().endswith(".tar")]
        if shards:
            return _tars_of_folder(path, shards)
        if tables := [path / name for name in names if name.lower().endswith(PARQUET)]:
            return Table(path, tables, mapped=False)
        return Files(path, *folder(path, formats.readable_suffixes()))
    if _is_tar(path):
        return Tars([path])
    if path.suffix.lower() == PAIRS and path.is_file():
        return Pairs(path)
    if _is_parquet(path) and path.is_file():
        return Table(path.parent, [path], mapped=False)
    if formats.is_archive(path.name):
        raise ValueError(f"source {path}: {COMPRESSED}")
    got = path if os.path.lexists(path) else f"{path}, which doesn't exist"
    raise ValueError(
        "source must be a folder, a .tar file, a .parquet file, a .txt file of pairs, a packed dataset, a list of "
        f"files, the URL of a .tar file or a dataset; got {got}"
    )


def _from_list(paths: list[Path]) -> Source:
    if not paths:
        raise ValueError("source must hold at least one file, got an empty list")
    for path in paths:
        if formats.is_archive(path.name) and not _is_tar(path):
            raise ValueError(f"source holds {path}: {COMPRESSED}")
        # only for names without the suffix of an image, since each call of is_dir costs time
        if not formats.is_image(path.name) and path.is_dir():
            raise ValueError(f"source must be images, .tar or .parquet files, got the folder {path} in a list")
    for is_kind, open_all in ((_is_tar, Tars), (_is_parquet, _tables)):
        of_kind = [is_kind(path) for path in paths]
        if any(of_kind) and not all(of_kind):
            raise ValueError("source must be all images or .tar files or .parquet files, got several kinds in one list")
        if any(of_kind):
            return open_all(paths)
    return Files(*listed(paths))


def _tables(paths: list[Path]) -> Source:
    absolute = [path.absolute() for path in paths]
    return Table(Path(os.path.commonpath([path.parent for path in absolute])), absolute, mapped=False)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == PARQUET


def _is_tar(path: Path) -> bool:
    return path.suffix.lower() == ".tar"


def _tars_of_folder(root: Path, shards: list[Path]) -> Tars:
    """Return the source of a folder's tar files; it leaves out the images beside them."""
    names, left_out = walk(root, formats.readable_suffixes())
    left_out[".tar"] -= len(shards)
    left_out[formats.BESIDE_TARS] += len(names)
    return Tars(shards, left_out)
