"""A transformer block with a memory, masks, rotation, layer scale and drop path in plain PyTorch, as timm writes it.

It has the modules and parameter names of `fastmim.nn.Block`, so that it loads the weights of one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rivals.plain_mae import Mlp


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, memory: int | None) -> None:
        super().__init__()
        self.heads = heads
        if memory is None:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.kv = nn.Linear(width, width), nn.Linear(memory, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        key_mask: Tensor | None,
        bias: Tensor | None,
        turns: tuple[Tensor, Tensor] | None,
        memory_turns: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        heads = self.heads, -1
        if memory is None:
            q, k, v = self.qkv(x).unflatten(-1, (3, *heads)).permute(2, 0, 3, 1, 4)
        else:
            q = self.q(x).unflatten(-1, heads).transpose(1, 2)
            k, v = self.kv(memory).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        if turns is not None and memory_turns is not None:
            q, k = turn(q, *turns).to(v.dtype), turn(k, *memory_turns).to(v.dtype)
        mask = bias
        if key_mask is not None:
            seen = key_mask[:, None, None]
            mask = seen if bias is None else bias.masked_fill(~seen, -torch.inf)
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        *,
        self_attention: bool = True,
        kv_dim: int | None = None,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.rate, self.self_attention, self.crossed = drop_path, self_attention, kv_dim is not None

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else Scale(width)

        if self_attention:
            self.norm1, self.attn, self.ls1 = nn.LayerNorm(width), Attention(width, heads, None), scale()
        if kv_dim is not None:
            self.norm_cross, self.norm_memory = nn.LayerNorm(width), nn.LayerNorm(kv_dim)
            self.cross_attn, self.ls_cross = Attention(width, heads, kv_dim), scale()
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width), Mlp(width), scale()

    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor | None = None,
        key_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        bias: Tensor | None = None,
        turns: tuple[Tensor, Tensor] | None = None,
        memory_turns: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Apply the block to x (B, S, D); `turns` are cosines and sines."""
        if self.self_attention:
            x = x + self.dropped(self.ls1(self.attn(self.norm1(x), None, key_mask, bias, turns, turns)))
        if self.crossed:
            normed = self.norm_cross(x), self.norm_memory(memory)
            x = x + self.dropped(self.ls_cross(self.cross_attn(*normed, memory_mask, None, turns, memory_turns)))
        return x + self.dropped(self.ls2(self.mlp(self.norm2(x))))

    def dropped(self, x: Tensor) -> Tensor:
        """Return x, multiplied by zero in some rows of the batch."""
        if not self.rate or not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate).div_(1 - self.rate)


def cosines(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (B, 1, S, D) of angles (B, S, A, n), for each value of a head of D = 2An values."""
    twice = angles.repeat_interleave(2, 2).flatten(2)[:, None]
    return twice.cos(), twice.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, H, S, D), two axes of equal parts each, by halves."""
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    return x * cos + torch.stack([-second, first], -2).flatten(-3) * sin
