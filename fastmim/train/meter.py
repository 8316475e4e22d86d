"""How fast a run is: images a second, what they cost in products, and what the machine could do of them."""

import time

import torch

from ..masking import count_kept, count_predicted
from ..models.mae import MaskedAutoencoderViT
from .config import Config
from .distributed import Processes


class Meter:
    """The clock of a run that goes on from `step`; add to `waited` the seconds spent waiting for data."""

    def __init__(self, model: MaskedAutoencoderViT, config: Config, processes: Processes, dtype: torch.dtype) -> None:
        narrow = dtype if processes.device.type == "cuda" else torch.promote_types(dtype, torch.float32)
        rate = matmul_rate(processes.device, narrow) * processes.world
        self.share_of_rate = flops_per_image(model, config) / rate
        self.batch_size = config.batch_size

    def start(self, step: int) -> None:
        self.since, self.since_step, self.waited = time.perf_counter(), step, 0.0

    def read(self, step: int, steps: int) -> dict[str, float]:
        """What a line of metrics says of the steps since the last one, of `steps`."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        rate = max(step - self.since_step, 1) * self.batch_size / seconds
        said = {
            "images_per_second": rate,
            "matmul_share": rate * self.share_of_rate,
            "waiting": self.waited / seconds,
            "seconds_left": (steps - step) * self.batch_size / rate,
        }
        self.start(step)
        return said


def flops_per_image(model: MaskedAutoencoderViT, config: Config) -> float:
    """Of a step, the backward pass taken as twice the forward one: products only, as many as the algorithm needs.

    A block of n tokens of width D takes 24·D²·n + 4·D·n² (an MLP of ratio 4); the last decoder block asks for the
    predicted tokens only.
    """
    patches = model.patch_embed.num_patches
    kept = count_kept(patches, config.mask_ratio)
    predicted = count_predicted(patches - kept, config.decode_ratio)
    visible, tokens = 1 + kept, 1 + kept + predicted
    width, inner = model.cls_token.shape[-1], model.mask_token.shape[-1]
    values = model.decoder_pred.out_features

    def block(d: int, queries: int, keys: int) -> float:
        return 20 * d * d * queries + 4 * d * d * keys + 4 * d * queries * keys

    total = 2 * kept * values * width + len(model.blocks) * block(width, visible, visible)
    total += 2 * visible * width * inner + 2 * predicted * inner * values
    depth = len(model.decoder_blocks)
    if depth:
        total += (depth - 1) * block(inner, tokens, tokens) + block(inner, predicted, tokens)
    return 3.0 * total


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of three."""
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
