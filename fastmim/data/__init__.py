"""Batches of random image crops for pretraining, read from folders, tar shards or packed datasets.

The order of samples, the crops and the flips depend only on the seed, the epoch and the sample, so a run can resume in
the middle of an epoch. Of the rest of fastmim, only the checks of arguments are imported here.

Modules, from the inside out: `philox` (random numbers), `order` (samples of each batch), `crops` (boxes within an
image), `formats` (file names), `images`, `jpeg` and `dali` (decoding), `sources`, `tars` and `packed` (reading),
`decoders` (choice of a backend), `transfer` (copies to a device), `prefetch` (background threads), `loader`
(`ImageLoader`).
"""

from .loader import Batch, ImageLoader

__all__ = ["Batch", "ImageLoader"]
