"""Tar shards at URLs that fsspec opens, such as s3://, gs://, https:// and memory://.

A shard is downloaded whole into a temporary file without a name, and serves its samples from there. The index of its
images is stored in the cache folder, so that a later run downloads a shard only when its samples are due.
"""

import hashlib
import json
import os
import re
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .base_source import Stamp, digest, refuse_duplicates
from .chunks import Kept, kept_chunks
from .images import Unreadable
from .tar_members import Place
from .tars import Content, Image, Tars, content_in
from .threads import map_ahead

FORMAT = 1
# downloads of a shard before its samples count as unreadable, and seconds between them
ATTEMPTS, PAUSE = 3, 1.0
# what file systems call the version of a file, or the time of its last change
VERSION = ("ETag", "etag", "mtime", "LastModified", "Last-Modified", "created", "md5", "Content-MD5")
# shards that are indexed at a time
INDEXED = 8


def is_url(source: object) -> bool:
    """Return whether a source is a URL."""
    return isinstance(source, str) and re.match(r"[A-Za-z][A-Za-z0-9+.:-]*://", source) is not None


def expanded(text: str) -> list[str]:
    """Return the texts that braces stand for: {000..127}, with zeros in front as written, and {a,b}."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if found is None:
        return [text]
    first, last, words = found.groups()
    if words is None:
        low, high = sorted((int(first), int(last)))
        parts = [str(number).zfill(len(first)) for number in range(low, high + 1)]
    else:
        parts = words.split(",")
    return [f"{text[: found.start()]}{part}{rest}" for part in parts for rest in expanded(text[found.end() :])]


class RemoteTars(Tars):
    """Samples in tar shards at URLs. The shards are the chunks of the source.

    Raises:
        ValueError: fsspec isn't installed, a URL is none of a .tar file, or a shard is damaged or can't be read.
    """

    def __init__(self, urls: list[str]) -> None:
        for url in urls:
            if not url.lower().endswith(".tar"):
                raise ValueError(f"source must be URLs that end in .tar, got {url}")
        if find_spec("fsspec") is None:
            raise ValueError(f"source {urls[0]} needs fsspec: pip install 'fastmim[remote]'")
        refuse_duplicates(urls)
        urls = sorted(urls)
        self.root, self.title = None, urls[0] if len(urls) == 1 else f"{urls[0]} to {urls[-1]}"
        # names are relative to the common folder, so that shards may move
        folders = [url.split("/")[:-1] for url in urls]
        common = next((at for at, parts in enumerate(zip(*folders)) if len(set(parts)) > 1), min(map(len, folders)))
        names = ["/".join(url.split("/")[common:]) for url in urls]
        self._urls, self._numbers = urls, {name: number for number, name in enumerate(names)}
        self._files: Kept[BinaryIO] = Kept(_Download(urls), INDEXED)
        self._hold(zip(names, map_ahead(INDEXED, self._content, range(len(urls)))))
        first = [place for place, (a, b) in enumerate(pairwise(self._places), 1) if a[0] != b[0]]
        self.chunks = np.array([0, *first], np.int64)
        self._files.keep = kept_chunks(self.chunks, len(self.names))

    def _content(self, number: int) -> Content:
        """Return the content of a shard, from the cache folder or the shard itself."""
        url = self._urls[number]
        path = _index_path(url)
        if path is not None and (found := _stored(path)) is not None:
            return found
        try:
            with _copied(self._files.get(number)) as file:
                file.seek(0)
                content = content_in(file, url)
        except Unreadable as error:
            raise ValueError(f"source {url} can't be read: {error}") from error
        if path is not None:
            _store(path, content)
        return content

    def _opened(self, shard: str) -> BinaryIO:
        return _copied(self._files.get(self._numbers[shard]))

    def stamp(self, sample: int) -> Stamp | None:
        """Return the size of the image; the times of a remote file are not asked for."""
        return self._places[sample][1].size, 0, 0

    def checksum(self, sample: int) -> int:
        """Return the size of an image and its position in its shard, as one number."""
        place = self._places[sample][1]
        return place.start << 31 | max(place.size, 0)

    def identity(self) -> str:
        total = digest(self.names, self.labels)
        total.update(str(None if self.chunks is None else self.chunks.tolist()).encode())
        return total.hexdigest()


def _copied(file: BinaryIO) -> BinaryIO:
    """Return a second handle of a file, which stays readable when the first is closed."""
    return os.fdopen(os.dup(file.fileno()), "rb", 0)


class _Download:
    """Function of a number that downloads the shard of that number."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls

    def __call__(self, number: int) -> BinaryIO:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with tempfile.TemporaryDirectory(prefix="fastmim-") as folder:
                    path = Path(folder, "shard.tar")
                    system, name = _file_system(self.urls[number])
                    system.get_file(name, str(path))
                    return open(path, "rb", 0)
            except FileNotFoundError as error:
                raise Unreadable(f"no such file: {self.urls[number]}") from error
            except Exception:  # file systems raise errors of any type where a connection fails
                if attempt == ATTEMPTS:
                    raise
                time.sleep(PAUSE)
        raise AssertionError


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, one per process, and the name of the file there."""
    from fsspec.core import url_to_fs

    try:
        system, name = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"source {url} can't be opened by fsspec: {' '.join(str(error).split())}") from error
    return system, name


# ---- stored indices --------------------------------------------------------------------------------------------------


def _index_path(url: str) -> Path | None:
    """Return the file of the cache folder for the index of a shard as it is now.

    None if there is no such folder, or if the file system doesn't tell whether a shard changed.
    """
    system, name = _file_system(url)
    try:
        info = system.info(name)
        version = [str(info.get(key)) for key in VERSION]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmim"
    except Exception:  # of a shard that can't be read, reading it tells the reason
        return None
    if set(version) == {"None"}:
        return None
    version.append(str(info.get("size")))
    key = json.dumps([FORMAT, url, version])
    return folder / f"tar-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _stored(path: Path) -> Content | None:
    try:
        found = json.loads(path.read_text())
        images = [Image(name, _place(*place), label) for name, place, label in found["images"]]
        return Content(images, Counter(found["left_out"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _place(start: int, size: int, parts: list[list[int]] | None, problem: str | None) -> Place:
    return Place(start, size, None if parts is None else tuple((offset, length) for offset, length in parts), problem)


def _store(path: Path, content: Content) -> None:
    """Write an index, atomically; a cache folder that can't be written to is not an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            complete = Path(folder, path.name)
            complete.write_text(json.dumps({"images": content.images, "left_out": content.left_out}))
            os.replace(complete, path)
    except OSError:
        pass
