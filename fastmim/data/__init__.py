"""Images that keep up: batches of crops for pretraining from folders, tar shards or packed datasets, nothing lost.

The room stands alone. It reads upwards: philox and order say which samples make up a batch, crops where they are cut,
sources where they come from, pictures, jpeg and dali how they become pixels, feed runs it in the background, loader is
what a user holds.
"""

from .loader import Batch, ImageLoader

__all__ = ["Batch", "ImageLoader"]
