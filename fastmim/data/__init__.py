"""Batches of random crops for pretraining: of images in folders, tar shards or packed datasets, and of arrays.

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
# - `array_files`, `array_crops`: arrays in files, and crops of them.
# - `decoders`: choice of a decoding backend.
# - `threads`, `transfer`, `feeds`, `prefetch`: background threads, copies to a device, samples in order, batches.
# - `quarantine`, `loader_state`: unreadable files, saved states.
# - `base_loader`, `loader`, `array_loader`: what loaders share, `ImageLoader`, `ArrayLoader`.
# - `lock`, `pack`, `check_data`, `stats`: locks of folders, and the commands `fastmim pack`, `check-data` and `stats`.

from .array_loader import ArrayBatch, ArrayLoader
from .loader import Batch, CovisibleBatch, ImageLoader, PairBatch, PatchBatch

__all__ = ["ArrayBatch", "ArrayLoader", "Batch", "CovisibleBatch", "ImageLoader", "PairBatch", "PatchBatch"]
