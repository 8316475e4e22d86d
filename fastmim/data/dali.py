"""Decode plain JPEGs with NVIDIA DALI, only the region that the crops cover; on a GPU DALI also resizes and flips.

Where decoding regions fails (see dali_probe.py), DALI decodes whole images. The crops are chosen outside of DALI. On a
CPU they are resized as on every backend, since DALI's own cubic filter is up to 8 grey levels off at sharp edges. Files
that are not plain JPEGs go to Pillow.

Not run on a GPU.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch.utils.dlpack import from_dlpack

from . import images, jpeg
from .crops import Crop, Crops
from .images import Note, Unreadable, ignore
from .philox import Floats, Ints
from .resample import Pixels, cut
from .transfer import Link, Row


class Job(NamedTuple):
    """A plain JPEG, its crops, and the box to decode: the region that covers the crops, or the whole image.

    `draws` are the random numbers of the crops; `ids` (repeats, k) are the patches to make, None: whole crops.
    """

    data: bytes
    crops: list[Crop]
    box: Crop
    draws: Floats
    ids: Ints | None


class Dali:
    """Decoder that runs DALI pipelines.

    The pipeline is built at the first batch, and built anew after a file that DALI can't decode, which breaks it.

    Args:
        crops: the crops to take.
        device: a CPU, or a CUDA device with an index.
        threads: number of threads that decode.
        link: copies the finished crops out of DALI's memory; None: DALI only decodes, and this class resizes the crops.
        regions: decode the region that covers the crops instead of the whole image.
    """

    def __init__(
        self, crops: Crops, device: torch.device, threads: int, link: Link | None = None, *, regions: bool = True
    ) -> None:
        self.crops, self.device, self.threads, self.link, self.regions = crops, device, threads, link, regions
        # outputs of DALI that are being copied, and the event after the copies
        self._copying: tuple[Any, Any] | None = None
        self._pool = ThreadPoolExecutor(threads, "fastmim-dali")
        self._pipeline: Any = None
        self._capacity = 0

    def prepare(
        self, data: bytes | Pixels, draws: Floats, note: Note = ignore, ids: Ints | None = None
    ) -> Job | Pixels:
        size = jpeg.plain_size(data) if isinstance(data, bytes) else None
        if not size or not isinstance(data, bytes):
            image = images.decode(data, note) if isinstance(data, bytes) else data
            own = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
            return self._made(image, self._boxes(draws, own), draws, ids)
        crops = self._boxes(draws, size)
        return Job(data, crops, _bounding_box(crops) if self.regions else Crop(0, 0, *size, False), draws, ids)

    def _boxes(self, draws: Floats, size: tuple[int, int]) -> list[Crop]:
        return [Crop(*box) for box in self.crops.boxes(draws[None], *size)[0].tolist()]

    def _made(self, image: Any, boxes: list[Crop], draws: Floats, ids: Ints | None) -> Pixels:
        """Return the crops of a PIL image, or of pixels (H, W, 3), with their colours changed, or patches of them."""
        crops = cut(image, boxes, self.crops, ids).made()
        return crops if ids is not None else self.crops.recolour(crops, draws)

    def finish(self, prepared: list[Job | Pixels]) -> tuple[list[Row], dict[int, str]]:
        jobs = {place: item for place, item in enumerate(prepared) if isinstance(item, Job)}
        rows: dict[int, Row] = {place: item for place, item in enumerate(prepared) if not isinstance(item, Job)}
        decoded = dict(zip(jobs, self._decode(list(jobs.values()))))
        bad = {}
        for place, crops in decoded.items():
            if crops is not None:
                rows[place] = crops
                continue
            try:
                job = jobs[place]
                rows[place] = self._made(images.decode(job.data), job.crops, job.draws, job.ids)
            except Unreadable as error:
                bad[place] = str(error)
        if len(jobs) > 1 and not bad and all(crops is None for crops in decoded.values()):
            raise RuntimeError("DALI decodes no file of a batch, but Pillow decodes all: is DALI installed properly?")
        return [rows[place] for place in range(len(prepared)) if place not in bad], bad

    def _decode(self, jobs: list[Job]) -> list[Row | None]:
        """Return the crops of each job, or None for a file that DALI can't decode.

        A bad file breaks the pipeline, which doesn't always name it: the two halves of the batch are then tried apart.
        """
        if not jobs:
            return []
        pipeline = self._pipeline_for(len(jobs))
        try:
            return self._run(pipeline, jobs)
        except RuntimeError:
            self.close_pipeline()
            if len(jobs) == 1:
                return [None]
            half = len(jobs) // 2
            return self._decode(jobs[:half]) + self._decode(jobs[half:])

    def _pipeline_for(self, count: int) -> Any:
        """Return a pipeline that takes batches of at least `count` samples."""
        if self._pipeline is None or self._capacity < count:
            self.close_pipeline()
            self._capacity = max(count, self._capacity)
            self._pipeline = self._build(self._capacity)
        return self._pipeline

    def _build(self, capacity: int) -> Any:
        def source(name: str, dtype: Any, ndim: int) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim)

        pipeline = Pipeline(capacity, self.threads, self.device.index, prefetch_queue_depth=1)
        with pipeline:
            data = source("data", types.UINT8, 1)
            device = "mixed" if self.device.type == "cuda" else "cpu"
            if self.regions:
                start, shape = source("start", types.INT32, 1), source("shape", types.INT32, 1)
                pixels = fn.decoders.image_slice(data, start, shape, axes=(0, 1), device=device)
            else:
                pixels = fn.decoders.image(data, device=device)
            outputs = [pixels]
            if self.link is not None:
                outputs = [self._resized_by_dali(pixels, row, source) for row in range(self.crops.rows)]
            pipeline.set_outputs(*outputs)
            pipeline.build()
        return pipeline

    def _resized_by_dali(self, pixels: Any, row: int, source: Any) -> Any:
        start, shape = source(f"start{row}", types.INT32, 1), source(f"shape{row}", types.INT32, 1)
        crop = fn.slice(pixels, start, shape, axes=(0, 1))
        # as on a CPU: the horizontal axis first, with rounding between the two
        first = source(f"first{row}", types.FLOAT, 1)
        crop = fn.resize(crop, size=first, interp_type=types.INTERP_CUBIC, antialias=True)
        crop = fn.resize(crop, size=self.crops.size, interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.flip(crop, horizontal=source(f"flip{row}", types.INT32, 0))

    def _run(self, pipeline: Any, jobs: list[Job]) -> list[Row | None]:
        """Return the crops of each job, copied, since the next run may overwrite DALI's memory."""

        def feed(name: str, values: list[Any], dtype: Any = np.int32) -> None:
            pipeline.feed_input(name, [np.array(value, dtype) for value in values])

        pipeline.feed_input("data", [np.frombuffer(job.data, np.uint8) for job in jobs])
        if self.regions:
            feed("start", [(job.box.top, job.box.left) for job in jobs])
            feed("shape", [(job.box.height, job.box.width) for job in jobs])
        inside = [[_relative(crop, job.box) for crop in job.crops] for job in jobs]
        if self.link is None:
            (out,) = pipeline.run()

            def made(place: int) -> Pixels:
                pixels, job = np.ascontiguousarray(out.at(place)), jobs[place]
                return self._made(pixels, inside[place], job.draws, job.ids)

            return list(self._pool.map(made, range(len(jobs))))
        for row, crops in enumerate(zip(*inside)):
            feed(f"start{row}", [(crop.top, crop.left) for crop in crops])
            feed(f"shape{row}", [(crop.height, crop.width) for crop in crops])
            feed(f"first{row}", [(crop.height, self.crops.size[1]) for crop in crops], np.float32)
            feed(f"flip{row}", [crop.flip for crop in crops])
        self.release()
        # run() returns once the pixels are complete
        outputs = pipeline.run()
        copies = self.link.joined(from_dlpack(out.as_tensor()) for out in outputs)
        self._copying = outputs, self.link.mark()
        return list(copies.unflatten(0, (self.crops.rows, len(jobs))).unbind(1))

    def release(self) -> None:
        """Wait until the crops are copied, and let DALI reuse its memory."""
        if self.link is not None and self._copying is not None:
            self.link.wait(self._copying[1])
        self._copying = None

    def close_pipeline(self) -> None:
        self.release()
        self._pipeline = None

    def close(self) -> None:
        self.close_pipeline()
        self._pool.shutdown(cancel_futures=True)


def _bounding_box(crops: list[Crop]) -> Crop:
    left, top = min(crop.left for crop in crops), min(crop.top for crop in crops)
    right, bottom = max(crop.left + crop.width for crop in crops), max(crop.top + crop.height for crop in crops)
    return Crop(left, top, right - left, bottom - top, False)


def _relative(crop: Crop, box: Crop) -> Crop:
    """Return a crop with its position relative to a box."""
    return Crop(crop.left - box.left, crop.top - box.top, crop.width, crop.height, crop.flip)
