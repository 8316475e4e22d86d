"""Speed of a run: images per second, and its share of the machine's matrix product rate."""

import time

import torch

from ..models.cost import step_flops
from ..models.mae import MaskedAutoencoderViT
from .config import Config
from .distributed import Processes
from .masks import Masks


class Meter:
    """Clock of a run; the loop adds to `waited` the seconds that it spends waiting for data."""

    def __init__(
        self, model: MaskedAutoencoderViT, masks: Masks, config: Config, processes: Processes, dtype: torch.dtype
    ) -> None:
        product = dtype if processes.device.type == "cuda" else torch.promote_types(dtype, torch.float32)
        rate = matmul_rate(processes.device, product) * processes.world
        self.share_of_rate = flops_per_image(model, masks) / rate
        self.batch_size = config.batch_size

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


def flops_per_image(model: MaskedAutoencoderViT, masks: Masks) -> int:
    """Return the FLOPs of one image's forward and backward pass, the products that a masked autoencoder needs."""
    kept, predicted = masks.counts
    visible = model.num_prefix_tokens + kept
    return step_flops(
        model.decoder_pred.out_features,
        model.cls_token.shape[-1],
        len(model.blocks),
        model.mask_token.shape[-1],
        len(model.decoder_blocks),
        embedded=kept,
        visible=visible,
        decoded=visible + predicted,
        queries=predicted,
        scored=predicted,
    )


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
