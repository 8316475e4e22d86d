"""The photographs as every kind of source that people name; samples have the numbers that they have as files."""

import io
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import torch
from PIL import Image

KINDS = ("saved", "parquet", "dataset", "remote", "pairs")
# rows of a group in Parquet, and images of a remote shard
CHUNK = 6


def files_of(root):
    return sorted(root.rglob("*.jpg"), key=lambda path: path.relative_to(root).as_posix())


class Rows:
    """A map-style dataset whose rows are tuples of an image, in one of several forms, and a label."""

    def __init__(self, root, form="bytes"):
        self.files, self.form = files_of(root), form

    def __len__(self):
        return len(self.files)

    def __getitem__(self, row):
        path = self.files[row]
        label = int(path.parent.name[-1])
        if self.form == "bytes":
            return path.read_bytes(), label
        if self.form == "path":
            return str(path), torch.tensor(label)
        image = Image.open(path)
        if self.form == "dict":
            return {"img": image, "label": label, "text": "a picture"}
        if self.form == "array":
            return np.asarray(image), np.int32(label)
        return image if self.form == "image" else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def write_pairs(root, path, masks=None):
    """Write each photograph of `root` with the first one as a pair; `masks` by sample are beside the list."""
    files, lines = files_of(root), ["# pictures, mask and label"]
    for sample, first in enumerate(files):
        mask = f"{sample}.npy" if masks and sample in masks else "-"
        if mask != "-":
            np.save(path.with_name(mask), masks[sample])
        lines.append(f"{first} {files[0]} {mask} {first.parent.name[-1]}")
    path.write_text("\n".join(reversed(lines)) + "\n")
    return path


def make(kind, root, out):
    """Write the photographs of `root` below `out` as a source of a kind, and return it."""
    files = files_of(root)
    if kind == "dataset":
        return Rows(root)
    out.mkdir(exist_ok=True)
    if kind == "pairs":
        return write_pairs(root, out / "pairs.txt")
    if kind == "remote":
        memory, urls = fsspec.filesystem("memory"), []
        for shard, start in enumerate(range(0, len(files), CHUNK)):
            held = io.BytesIO()
            with tarfile.open(fileobj=held, mode="w") as tar:
                for sample in range(start, min(start + CHUNK, len(files))):
                    label = files[sample].parent.name[-1].encode()
                    for suffix, data in (("jpg", files[sample].read_bytes()), ("cls", label)):
                        member = tarfile.TarInfo(f"{sample:05}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
            urls.append(f"memory://{out.name}-{id(out)}/{shard:03}.tar")
            memory.pipe(urls[-1], held.getvalue())
        return f"memory://{out.name}-{id(out)}/{{000..{len(urls) - 1:03}}}.tar"
    import datasets

    names = sorted({path.parent.name for path in files})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": None}, "label": names.index(path.parent.name)} for path in files
    ]
    made = datasets.Dataset.from_list(rows, features=features)
    if kind == "saved":
        made.save_to_disk(out / "data")
        return out / "data"
    made.to_parquet(out / "data.parquet", batch_size=CHUNK)
    return Path(out / "data.parquet")
