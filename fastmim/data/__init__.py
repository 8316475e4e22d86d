"""Batches of random crops for pretraining: of images in folders, tar shards or packed datasets, of arrays, and
of videos.

The order of samples, the crops and the flips depend only on the seed, the epoch and the sample, so a run can resume in
the middle of an epoch.
"""

# From the rest of fastmim, this package imports checks of arguments, `Patches` and the resampling in C++. Its modules:
# - `philox`, `order`, `crops`, `seeds`, `masks`: random numbers, the samples of each batch, boxes within an image,
#   masks of samples.
# - `resample`: crops, or patches of them, resized to their size in a batch.
# - `formats`, `images`, `jpeg`, `dali`, `dali_probe`: names of image files, and decoding.
# - `base_source`, `chunks`: what a source is, parts of one that are read whole.
# - `folders`, `tar_members`, `tars`, `remote`, `rows`, `tables`, `pairs`, `packed`: kinds of sources.
# - `sources`: which kind a path or an object is.
# - `array_formats`, `array_files`, `array_crops`, `array_reader`: arrays in files, and reading crops of them.
# - `clip_files`, `clip_decoders`, `clip_crops`: videos in files, frames of them, and clips.
# - `clip_packed`, `clip_pack`: videos that were cut into patches of several frames.
# - `patch_shards`, `patch_writer`: arrays that were cut into patches, each of which is one contiguous read.
# - `decoders`: choice of a decoding backend.
# - `threads`, `transfer`, `feeds`, `prefetch`: background threads, copies to a device, samples in order, batches.
# - `quarantine`, `loader_state`: unreadable files, saved states.
# - `base_loader`, `loader`, `array_loader`, `clip_loader`: what loaders share, and each of them.
# - `lock`, `pack`, `pack_arrays`, `check_data`, `check_arrays`, `stats`: locks of folders, and the commands `fastmim
#   pack`, `check-data` and `stats`.

from .array_loader import ArrayBatch, ArrayLoader
from .clip_loader import ClipLoader
from .loader import Batch, CovisibleBatch, ImageLoader, PairBatch, PatchBatch

__all__ = [
    "ArrayBatch",
    "ArrayLoader",
    "Batch",
    "ClipLoader",
    "CovisibleBatch",
    "ImageLoader",
    "PairBatch",
    "PatchBatch",
]
