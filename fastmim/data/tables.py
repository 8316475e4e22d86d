"""Columns of images in Parquet files, and in folders that `save_to_disk` of Hugging Face's datasets wrote."""

import json
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .base_source import Stamp, digest, refuse_duplicates, stamp_of
from .chunks import Kept, chunk_of, kept_chunks
from .images import Unreadable
from .philox import Ints
from .resample import Pixels
from .rows import IMAGES, LABELS, content
from .tars import labels_of

STATE, SPLITS = "state.json", "dataset_dict.json"
SUFFIX = ".parquet"


class Part(NamedTuple):
    """A group of rows in a file: how many there are, and a number that changes with its content."""

    file: Path
    group: int
    rows: int
    checksum: int


class Table:
    """Rows of the tables in `files`, in order; each is a file of Parquet, or of Arrow with `mapped`.

    Images are bytes, or structs of bytes and path as in Hugging Face's datasets. Rows of Arrow are read at random from
    mapped memory. Of Parquet a group of rows is read at once, and the groups are the chunks of the source.

    Raises:
        ValueError: pyarrow isn't installed, a file is damaged or has other columns, no column holds images.
    """

    def __init__(self, root: Path, files: list[Path], *, mapped: bool) -> None:
        if find_spec("pyarrow") is None:
            raise ValueError(f"source {root} needs pyarrow: pip install 'fastmim[parquet]'")
        self.root: Path | None = root
        self.title = str(root if len(files) > 1 or mapped else files[0])
        self.left_out: dict[str, int] = {}
        self._read = _mapped if mapped else _group
        files = sorted(files)
        names = [path.relative_to(root).as_posix() for path in files]
        refuse_duplicates(names)
        self._parts: list[Part] = []
        self.names: list[str] = []
        labels: list[int | None] = []
        self._column, self._label, self.classes = "", None, list[str]()
        for path, name in zip(files, names):
            try:
                found = (_arrow if mapped else _parquet)(path)
                column, label, classes = columns_of(found.schema)
            except (ValueError, OSError) as error:  # those of pyarrow are ValueError too
                raise ValueError(f"source {path} can't be read: {_line(error)}") from error
            if path != files[0] and (column, label) != (self._column, self._label):
                raise ValueError(f"source {path} must have the columns of {files[0]}, {self._column} and {self._label}")
            if classes and self.classes and classes != self.classes:
                raise ValueError(f"source {path} must have the classes of {files[0]}, which are others")
            self._column, self._label, self.classes = column, label, self.classes or classes
            self._parts += found.parts
            rows = sum(part.rows for part in found.parts)
            self.names += [f"{name}/{row:09}" for row in range(rows)]
            labels += [None] * rows if label is None else found.read(label)
        if not self.names:
            raise ValueError(f"source {self.title} holds no row")
        self.labels: Ints | None = labels_of(self.title, self.names, labels)
        self.classes = self.classes if self.labels is not None else []
        self._starts: Ints = np.cumsum([0, *(part.rows for part in self._parts[:-1])])
        self.chunks: Ints | None = None if mapped else self._starts
        self._kept = Kept(self._load, len(self._parts) if mapped else kept_chunks(self._starts, len(self.names)))

    def _load(self, number: int) -> Any:
        part = self._parts[number]
        return self._read(part.file, part.group, self._column)

    def read(self, sample: int, most: int = -1) -> bytes | Pixels:
        number, place = chunk_of(self._starts, sample)
        image = self._kept.get(number)[place].as_py()
        if image is None:
            raise Unreadable("the row holds no image")
        return content(image, most, self.root)

    def stamp(self, sample: int) -> Stamp | None:
        return stamp_of(self._parts[chunk_of(self._starts, sample)[0]].file)

    def checksum(self, sample: int) -> int:
        """Return a number of the group of rows that holds a sample, which changes with the sizes of its images."""
        return self._parts[chunk_of(self._starts, sample)[0]].checksum

    def identity(self) -> str:
        total = digest(self.names, self.labels)
        total.update(f"{self._column} {[] if self.chunks is None else self.chunks.tolist()}".encode())
        return total.hexdigest()


def open_saved(root: Path) -> Table:
    """Return the rows of a folder that `save_to_disk` wrote. Raises ValueError, also where it holds several splits."""
    try:
        if (root / SPLITS).exists():
            splits = json.loads((root / SPLITS).read_text())["splits"]
            raise ValueError(f"source {root} holds the splits {', '.join(splits)}: name one, as in {root / splits[0]}")
        files = [root / file["filename"] for file in json.loads((root / STATE).read_text())["_data_files"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"source {root} is no folder of save_to_disk: {type(error).__name__}: {error}") from error
    if not files:
        raise ValueError(f"source {root} holds no row")
    return Table(root, files, mapped=True)


def columns_of(schema: Any) -> tuple[str, str | None, list[str]]:
    """Return the column of images of a schema, that of integer labels or None, and the names of the labels."""
    import pyarrow as pa

    def holds_images(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return bool({"bytes", "path"} & {field.name for field in kind})
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    images = [field.name for field in schema if holds_images(field.type)]
    named = [name for name in IMAGES if name in images] or images
    if not images or (len(named) > 1 and named[0] not in IMAGES):
        raise ValueError(
            f"it must have one column of images, bytes or structs of bytes and path, or one called {IMAGES[0]}; it has "
            + ", ".join(f"{field.name} ({field.type})" for field in schema)
        )
    integers = [field.name for field in schema if pa.types.is_integer(field.type)]
    label = next((name for name in LABELS if name in integers), None)
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        classes = [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        classes = []
    return named[0], label, classes


# ---- files -----------------------------------------------------------------------------------------------------------


class _File(NamedTuple):
    """The schema of a file, its groups of rows, and a function that returns a column as a list."""

    schema: Any
    parts: list[Part]
    read: Callable[[str], list[Any]]


def _parquet(path: Path) -> _File:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, memory_map=True) as file:
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        schema = file.schema_arrow
    sizes = [[group.column(column).total_uncompressed_size for column in range(group.num_columns)] for group in groups]
    parts = [
        Part(path, number, group.num_rows, zlib.crc32(str(size).encode()))
        for number, (group, size) in enumerate(zip(groups, sizes))
        if group.num_rows
    ]
    return _File(schema, parts, lambda column: pq.read_table(path, columns=[column])[column].to_pylist())


def _group(path: Path, group: int, column: str) -> Any:
    """Return a column of a group of rows of a Parquet file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, memory_map=True) as file:
        return file.read_row_group(group, [column], use_threads=False)[column]


def _stream(path: Path) -> Any:
    """Open a file of Arrow, whose batches of rows are views of mapped memory."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(path)))


def _arrow(path: Path) -> _File:
    with _stream(path) as stream:
        batches = list(stream)
        schema = stream.schema
    parts = [
        Part(path, number, batch.num_rows, zlib.crc32(f"{batch.num_rows} {batch.nbytes}".encode()))
        for number, batch in enumerate(batches)
        if batch.num_rows
    ]
    return _File(schema, parts, lambda column: [v for batch in batches for v in batch.column(column).to_pylist()])


def _mapped(path: Path, group: int, column: str) -> Any:
    """Return a column of a batch of rows of an Arrow file."""
    with _stream(path) as stream:
        for _ in range(group):
            stream.read_next_batch()
        return stream.read_next_batch().column(column)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
