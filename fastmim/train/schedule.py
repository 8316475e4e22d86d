"""The optimiser of facebookresearch/mae, and its learning rate as a function of the step."""

import math
from typing import Any

import torch
from torch import nn

from .config import Config


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Return the rate of the update after `step` of `steps`: linear warm-up, then half a cosine or drops to a tenth.

    The cosine is that of He et al., CVPR 2022, table 8; drops are those of microsoft/SimMIM's "multistep".
    """
    peak = config.base_lr * config.batch_size / 256
    rising = config.warmup * steps
    if step < rising:
        return peak * step / rising
    if config.lr_drops:
        dropped: float = peak * 0.1 ** sum(step >= share * steps for share in config.lr_drops)
        return max(config.min_lr, dropped)
    # a run that is continued with fewer steps than it has done stays at the end of the schedule
    done = min(1.0, (step - rising) / max(steps - rising, 1))
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Return fused AdamW with its state made, so that a checkpoint before the first step is complete."""
    optimizer = torch.optim.AdamW(decay_groups(model, config.weight_decay), lr=0.0, betas=config.betas, fused=True)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of trained parameters: weights, class and mask token decay, biases and norms don't."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
