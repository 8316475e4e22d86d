"""NVIDIA DALI decodes plain JPEGs, only the part that the crops need; on a GPU it resizes and mirrors too.

Where regions can't be decoded (regions.py) it decodes them whole.

DALI is handed its crops and draws nothing. On a CPU the decoded part is resized as on every backend: DALI's own cubic
filter is up to 8 grey levels off at sharp edges. What is no plain JPEG goes to Pillow.

Not run on a GPU.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch.utils.dlpack import from_dlpack

from . import jpeg, pictures
from .crops import Crop, Crops
from .decoders import Decoder
from .philox import Floats
from .pictures import Note, Pixels, Unreadable, ignore
from .transfer import Link, Row


class Job(NamedTuple):
    """A plain JPEG, its crops, and the box that is decoded: that around them, or the whole picture."""

    data: bytes
    crops: list[Crop]
    box: Crop


class Dali(Decoder):
    """A pipeline that is built when it is needed, and again after a file that it can't decode: such a file kills it."""

    def __init__(
        self, crops: Crops, device: torch.device, threads: int, link: Link | None = None, *, regions: bool = True
    ) -> None:
        super().__init__(crops)
        self.regions = regions
        # a link copies crops out of DALI's memory; without one they are resized out of it
        self.device, self.threads, self.link = device, threads, link
        # DALI's memory that copies are queued from, and the event behind them
        self._read: tuple[Any, Any] | None = None
        self._pool = ThreadPoolExecutor(threads, "fastmim-dali")
        self._pipeline: Any = None
        self._room = 0

    def prepare(self, data: bytes | Pixels, draws: Floats, note: Note = ignore) -> Job | list[Pixels]:
        assert isinstance(data, bytes)
        size = jpeg.plain_size(data)
        if size:
            crops = self.crops.of(draws, *size)
            return Job(data, crops, _around(crops) if self.regions else Crop(0, 0, *size, False))
        return self._resized(pictures.decode(data, note), draws)

    def _cut(self, picture: Any, crops: list[Crop]) -> list[Pixels]:
        return [pictures.resize(picture, crop, self.crops.size) for crop in crops]

    def finish(self, prepared: list[Job | list[Pixels]]) -> tuple[list[Row], dict[int, str]]:
        jobs = {place: item for place, item in enumerate(prepared) if isinstance(item, Job)}
        rows: dict[int, Row] = {place: item for place, item in enumerate(prepared) if not isinstance(item, Job)}
        decoded = dict(zip(jobs, self._decode(list(jobs.values()))))
        bad = {}
        for place, crops in decoded.items():
            if crops is not None:
                rows[place] = crops
                continue
            try:
                rows[place] = self._cut(pictures.decode(jobs[place].data), jobs[place].crops)
            except Unreadable as error:
                bad[place] = str(error)
        if len(jobs) > 1 and not bad and all(crops is None for crops in decoded.values()):
            raise RuntimeError("DALI decodes none of a batch of files that Pillow reads: is its installation whole?")
        return [rows[place] for place in range(len(prepared)) if place not in bad], bad

    def _decode(self, jobs: list[Job]) -> list[Row | None]:
        """The crops of each job, None of what DALI can't decode: copies, for the next run may take DALI's memory.

        A pipeline doesn't survive a bad file nor always name it, so the halves are tried apart.
        """
        if not jobs:
            return []
        pipeline = self._built(len(jobs))
        try:
            return self._run(pipeline, jobs)
        except RuntimeError:
            self.close_pipeline()
            if len(jobs) == 1:
                return [None]
            half = len(jobs) // 2
            return self._decode(jobs[:half]) + self._decode(jobs[half:])

    def _built(self, room: int) -> Any:
        """A pipeline for batches of up to `room`."""
        if self._pipeline is None or self._room < room:
            self.close_pipeline()
            self._room = max(room, self._room)
            self._pipeline = self._build(self._room)
        return self._pipeline

    def _build(self, room: int) -> Any:
        def given(name: str, dtype: Any, ndim: int) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim)

        pipeline = Pipeline(room, self.threads, self.device.index, prefetch_queue_depth=1)
        with pipeline:
            data = given("data", types.UINT8, 1)
            where = "mixed" if self.device.type == "cuda" else "cpu"
            if self.regions:
                start, shape = given("start", types.INT32, 1), given("shape", types.INT32, 1)
                pixels = fn.decoders.image_slice(data, start, shape, axes=(0, 1), device=where)
            else:
                pixels = fn.decoders.image(data, device=where)
            if self.link is None:
                pipeline.set_outputs(pixels)
                return self._ready(pipeline)
            outputs = []
            for repeat in range(self.crops.repeats):
                start, shape = given(f"start{repeat}", types.INT32, 1), given(f"shape{repeat}", types.INT32, 1)
                crop = fn.slice(pixels, start, shape, axes=(0, 1))
                # one axis at a time, the horizontal first, rounded in between: as on a CPU
                first = given(f"first{repeat}", types.FLOAT, 1)
                crop = fn.resize(crop, size=first, interp_type=types.INTERP_CUBIC, antialias=True)
                crop = fn.resize(crop, size=self.crops.size, interp_type=types.INTERP_CUBIC, antialias=True)
                outputs.append(fn.flip(crop, horizontal=given(f"flip{repeat}", types.INT32, 0)))
            pipeline.set_outputs(*outputs)
            return self._ready(pipeline)

    @staticmethod
    def _ready(pipeline: Any) -> Any:
        pipeline.build()
        return pipeline

    def _run(self, pipeline: Any, jobs: list[Job]) -> list[Row | None]:
        def feed(name: str, values: list[Any], dtype: Any = np.int32) -> None:
            pipeline.feed_input(name, [np.array(value, dtype) for value in values])

        pipeline.feed_input("data", [np.frombuffer(job.data, np.uint8) for job in jobs])
        if self.regions:
            feed("start", [(job.box.top, job.box.left) for job in jobs])
            feed("shape", [(job.box.height, job.box.width) for job in jobs])
        inside = [[_inside(crop, job.box) for crop in job.crops] for job in jobs]
        if self.link is None:
            (out,) = pipeline.run()
            return list(self._pool.map(lambda place: self._cut(out.at(place), inside[place]), range(len(jobs))))
        for repeat, crops in enumerate(zip(*inside)):
            feed(f"start{repeat}", [(crop.top, crop.left) for crop in crops])
            feed(f"shape{repeat}", [(crop.height, crop.width) for crop in crops])
            feed(f"first{repeat}", [(crop.height, self.crops.size[1]) for crop in crops], np.float32)
            feed(f"flip{repeat}", [crop.flip for crop in crops])
        self.release()
        # run() returns when the pixels are there
        outputs = pipeline.run()
        # handed over on the stream of copies
        copies = self.link.joined(from_dlpack(out.as_tensor()) for out in outputs)
        self._read = outputs, self.link.mark()
        return list(copies.unflatten(0, (self.crops.repeats, len(jobs))).unbind(1))

    def release(self) -> None:
        """Wait until crops are copied, and let DALI have its memory again."""
        if self.link is not None and self._read is not None:
            self.link.wait(self._read[1])
        self._read = None

    def close_pipeline(self) -> None:
        self.release()
        self._pipeline = None

    def close(self) -> None:
        self.close_pipeline()
        self._pool.shutdown(cancel_futures=True)


def _around(crops: list[Crop]) -> Crop:
    left, top = min(crop.left for crop in crops), min(crop.top for crop in crops)
    right, bottom = max(crop.left + crop.width for crop in crops), max(crop.top + crop.height for crop in crops)
    return Crop(left, top, right - left, bottom - top, False)


def _inside(crop: Crop, box: Crop) -> Crop:
    return Crop(crop.left - box.left, crop.top - box.top, crop.width, crop.height, crop.flip)
