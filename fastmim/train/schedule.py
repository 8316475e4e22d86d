"""The optimiser of facebookresearch/mae and its learning rate, a function of the step alone."""

import math

import torch
from torch import nn

from .config import Config


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Of the update after `step` of `steps`: a rise from 0, then half a cosine (He et al., CVPR 2022, table 8)."""
    peak = config.base_lr * config.batch_size / 256
    rising = config.warmup * steps
    if step < rising:
        return peak * step / rising
    # a run that was made shorter than it already is stays at the end
    done = min(1.0, (step - rising) / max(steps - rising, 1))
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW: weights, class and mask token decay; biases and norms, of one axis, don't."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)
    # as its first step would make them: a checkpoint before that is as whole as any other
    for p in weights:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer
