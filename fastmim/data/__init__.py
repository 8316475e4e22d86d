"""Batches of random image crops for pretraining, read from folders, tar shards or packed datasets.

The order of samples, the crops and the flips depend only on the seed, the epoch and the sample, so a run can resume in
the middle of an epoch.
"""

# From the rest of fastmim, this package imports checks of arguments, `Patches` and the resampling in C++. Its modules:
# - `philox`, `order`, `crops`, `seeds`, `masks`: random numbers, the samples of each batch, boxes within an image,
#   masks of samples.
# - `resample`: crops, or patches of them, resized to their size in a batch.
# - `formats`, `images`, `jpeg`, `dali`, `dali_probe`: names of image files, and decoding.
# - `tar_members`, `tars`, `packed`, `sources`: reading samples.
# - `decoders`: choice of a decoding backend.
# - `threads`, `transfer`, `feeds`, `prefetch`: background threads, copies to a device, samples in order, batches.
# - `quarantine`, `loader_state`, `loader`: unreadable files, saved states, `ImageLoader`.
# - `lock`, `pack`, `check_data`: locks of folders, and the commands `fastmim pack` and `fastmim check-data`.

from .loader import Batch, ImageLoader, PairBatch, PatchBatch

__all__ = ["Batch", "ImageLoader", "PairBatch", "PatchBatch"]
