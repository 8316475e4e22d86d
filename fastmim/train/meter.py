"""Speed of a run: images per second, and its share of the machine's matrix product rate."""

import time

import torch

from ..data import Batch, PairBatch
from ..masking import Mask
from ..models.cost import step_flops
from ..models.masked_autoencoder import MaskedAutoencoder
from .config import Config
from .distributed import Processes
from .masks import Masks
from .objective import PixelObjective
from .registry import takes_pairs


class Meter:
    """Clock of a run; the loop adds to `waited` the seconds that it spends waiting for data."""

    def __init__(self, masks: Masks, config: Config, processes: Processes, dtype: torch.dtype) -> None:
        product = dtype if processes.device.type == "cuda" else torch.promote_types(dtype, torch.float32)
        rate = matmul_rate(processes.device, product) * processes.world
        self.share_of_rate = flops_per_image(config, masks) / rate
        # with `repeats` a batch has several crops of an image
        self.batch_size = config.batch_size * config.data_options.get("repeats", 1)

    def start(self, step: int) -> None:
        """Start the clock at a step."""
        self.since, self.since_step, self.waited = time.perf_counter(), step, 0.0

    def read(self, step: int, steps: int) -> dict[str, float]:
        """Return the metrics of the steps since the last call, and start again; `steps` is the length of the run."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        rate = max(step - self.since_step, 1) * self.batch_size / seconds
        found = {
            "images_per_second": rate,
            "matmul_share": rate * self.share_of_rate,
            "waiting": self.waited / seconds,
            "seconds_left": (steps - step) * self.batch_size / rate,
        }
        self.start(step)
        return found


def flops_per_image(config: Config, masks: Masks) -> int:
    """Return the FLOPs of one image's forward and backward pass: matrix products, of objective mae.

    Those that a masked autoencoder needs are known by its sizes. Of models with another decoder or two views those of
    the ops are counted, on tensors without values.
    """
    kept, predicted = masks.counts
    with torch.device("meta"):
        model = config.build()
    if getattr(model, "decoder", None) != "self":
        return _counted(model, kept, predicted)
    visible = model.num_prefix_tokens + kept
    return step_flops(
        model.decoder_pred.out_features,
        model.embed_dim,
        len(model.blocks),
        model.mask_token.shape[-1],
        len(model.decoder_blocks),
        embedded=kept,
        visible=visible,
        decoded=visible + predicted,
        queries=predicted,
        scored=predicted,
    )


def _counted(model: MaskedAutoencoder, kept: int, predicted: int) -> int:
    """Return the FLOPs of one image by counting those of a model on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        images = torch.empty(1, model.in_chans, *model.img_size)
        ids = torch.empty(1, model.num_patches, dtype=torch.int64)
        mask = Mask(ids[:, :kept], ids[:, :predicted], ids, model.num_patches)
        batch = PairBatch(images, images, None, ids) if takes_pairs(model) else Batch(images, None, ids)
    with FlopCounterMode(display=False) as counter:
        PixelObjective(model)(batch, mask).backward()
    return int(counter.get_total_flops())


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large square product, the best of three."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
