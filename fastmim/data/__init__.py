"""Batches of random image crops for pretraining, read from folders, tar shards or packed datasets.

The order of samples, the crops and the flips depend only on the seed, the epoch and the sample, so a run can resume in
the middle of an epoch.
"""

# From the rest of fastmim, this package imports the checks of arguments only. Its modules:
# - `philox`, `order`, `crops`: random numbers, the samples of each batch, boxes within an image.
# - `formats`, `images`, `jpeg`, `dali`, `dali_probe`: names of image files, and decoding.
# - `tar_members`, `tars`, `packed`, `sources`: reading samples.
# - `decoders`: choice of a decoding backend.
# - `threads`, `transfer`, `prefetch`: background threads, and copies to a device.
# - `quarantine`, `loader_state`, `loader`: unreadable files, saved states, `ImageLoader`.
# - `lock`, `pack`, `check_data`: locks of folders, and the commands `fastmim pack` and `fastmim check-data`.

from .loader import Batch, ImageLoader

__all__ = ["Batch", "ImageLoader"]
