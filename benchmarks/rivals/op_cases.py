"""Cases of each op: its eager form as a careful PyTorch user writes it, and its least bytes or FLOPs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim import ops
from fastmim.ops.tokens import sum_rows
from rivals import attention_forms
from rivals.plain_mae import patch_grid, squared_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, L, K, D = 16, 196, 49, 768


@dataclass
class Case:
    """One op at one size: its forms, which take the same inputs, and its least bytes or FLOPs."""

    forms: dict[str, Callable[..., Any]]
    inputs: list[Tensor]
    bytes: float = 0
    flops: float = 0


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_(grad)


def ids(batch: int, limit: int, count: int) -> Tensor:
    return torch.rand(batch, limit, device=DEVICE).argsort(1)[:, :count].contiguous()


def nbytes(*tensors: Tensor) -> float:
    return sum(t.numel() * t.element_size() for t in tensors)


# ---- eager forms, as a careful PyTorch user writes them --------------------------------------------------------------


def two_argsorts(noise: Tensor) -> tuple[Tensor, ...]:
    """Mask as facebookresearch/mae does: ids that are kept, each patch's rank, and the mask."""
    shuffle = noise.argsort(1)
    restore = shuffle.argsort(1)
    places = torch.arange(L, device=DEVICE).expand(noise.shape)
    mask = (places >= K).float().gather(1, restore)
    return places.gather(1, shuffle[:, :K]), restore, mask


def by_rank(noise: Tensor) -> tuple[Tensor, ...]:
    keep, _, restore = ops.random_masking(*noise.shape, K, noise=noise)
    return keep, restore, (restore >= K).float()


def cut(images: Tensor, chosen: Tensor, order: str) -> Tensor:
    deep = images.dtype == torch.uint16
    grid = patch_grid(images.view(torch.int16) if deep else images, 16)  # PyTorch indexes no uint16 on a GPU
    rows = grid[torch.arange(len(images), device=DEVICE)[:, None], chosen // 14, chosen % 14]
    rows = ((rows.int() & 65535).float() / 65535 if deep else rows.float() / 255).sub(0.45).div(0.225)
    return (rows if order == "cpq" else rows.permute(0, 1, 3, 4, 2)).flatten(2)


def eager_gather(images: Tensor, chosen: Tensor) -> Tensor:
    rows = patch_grid(images, 16)[torch.arange(len(images), device=DEVICE)[:, None], chosen // 14, chosen % 14]
    return rows.sub(0.45).div(0.225).flatten(2)


def eager_gather_signals(signals: Tensor, chosen: Tensor) -> Tensor:
    rows = signals.unflatten(2, (L, -1)).transpose(1, 2)
    return rows[torch.arange(len(signals), device=DEVICE)[:, None], chosen].flatten(2)


def eager_embed(images: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    return F.linear(cut(images, chosen, "cpq").to(weight.dtype), weight.flatten(1), bias) + pos[chosen]


def our_embed(images: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    return ops.embed_patches(images, chosen, weight, bias, pos_embed=pos, mean=[0.45] * 3, std=[0.225] * 3)


def eager_embed_signals(signals: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    return F.linear(eager_gather_signals(signals, chosen), weight.flatten(1), bias) + pos[chosen]


def our_embed_signals(signals: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    return ops.embed_patches(signals, chosen, weight, bias, pos_embed=pos)


def eager_assembly(visible: Tensor, keep: Tensor, predict: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    removed = mask_token + pos[1 + predict]
    return torch.cat([visible[:, :1] + pos[:1], visible[:, 1:] + pos[1 + keep], removed], 1)


def eager_unshuffle(visible: Tensor, restore: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    tokens = torch.cat([visible[:, 1:], mask_token.expand(len(visible), L - K, -1)], 1)
    tokens = tokens.gather(1, restore[:, :, None].expand(-1, -1, tokens.shape[2]))
    return torch.cat([visible[:, :1], tokens], 1) + pos


def eager_pixel_loss(pred: Tensor, images: Tensor, chosen: Tensor) -> Tensor:
    return squared_error(pred, cut(images, chosen, "pqc")).mean()


def eager_absolute_loss(pred: Tensor, images: Tensor, chosen: Tensor) -> Tensor:
    return F.l1_loss(pred.float(), cut(images, chosen, "pqc"))


def eager_huber_losses(pred: Tensor, images: Tensor, chosen: Tensor) -> Tensor:
    return F.huber_loss(pred.float(), cut(images, chosen, "pqc"), reduction="none").mean(-1)


def eager_cosine(pred: Tensor, target: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(pred.float(), target.float(), dim=-1)).square().mean()


def sdpa(qkv: Tensor) -> Tensor:
    return attention_forms.sdpa(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)


def matmuls(qkv: Tensor) -> Tensor:
    return attention_forms.matmuls(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)


def eager_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x + residual, weight.shape, weight, bias, 1e-6)


# ---- the cases -------------------------------------------------------------------------------------------------------


def masking(batch: int = 256) -> Case:
    # whole numbers: no two are equal, of which torch's sort may take either first
    noise = torch.rand(batch, L, device=DEVICE).argsort(1).float()
    return Case({"fastmim": by_rank, "eager": two_argsorts}, [noise], batch * (4 * L + 8 * (K + L) + 4 * L))


def attention(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> Case:
    qkv = randn(batch, length, 3, heads, dim, dtype=dtype)
    forms = {"fastmim": ops.attention_qkvpacked, "torch sdpa": sdpa, "two matmuls": matmuls}
    return Case(forms, [qkv], flops=14 * batch * heads * length**2 * dim)


def embed(batch: int = B, pixels: torch.dtype = torch.uint8) -> Case:
    images = torch.randint(torch.iinfo(pixels).max + 1, (batch, 3, 224, 224), device=DEVICE).to(pixels)
    f32 = partial(randn, dtype=torch.float32)
    inputs = [images, ids(batch, L, K), f32(D, 3, 16, 16), f32(D), f32(L, D, grad=False)]
    return Case({"fastmim": our_embed, "eager": eager_embed}, inputs, flops=4 * batch * K * D * 768)


def embed_signals(batch: int = B) -> Case:
    f32 = partial(randn, dtype=torch.float32)
    signals = f32(batch, 12, L * 25, grad=False)
    inputs = [signals, ids(batch, L, K), f32(D, 12, 25), f32(D), f32(L, D, grad=False)]
    return Case({"fastmim": our_embed_signals, "eager": eager_embed_signals}, inputs, flops=4 * batch * K * D * 300)


def pixels(
    batch: int = B, eager: Callable[..., Tensor] = eager_pixel_loss, loss: str = "squared", **options: Any
) -> Case:
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device=DEVICE)
    pred = randn(batch, L - K, 768, grad=False)
    if loss == "absolute":
        pred += 40 * pred.sign()  # no error near 0, where the gradient jumps
    pred.requires_grad_()
    ours = partial(ops.pixel_loss, patch_size=16, mean=[0.45] * 3, std=[0.225] * 3, loss=loss, **options)
    forms = {"fastmim": lambda p, i, c: ours(p, i, c), "eager": eager}
    return Case(forms, [pred, images, ids(batch, L, L - K)], pred.numel() * (2 + 1 + 2))


def assembly(batch: int = B, dtype: torch.dtype = torch.float32) -> Case:
    order = ids(batch, L, L)
    rows = partial(randn, dtype=dtype)
    inputs = [
        rows(batch, 1 + K, 512),
        order[:, :K].contiguous(),
        order[:, K:].contiguous(),
        rows(512),
        rows(1 + L, 512, grad=False),
    ]
    ours = partial(ops.decoder_tokens, num_prefix_tokens=1)
    moved = dtype.itemsize * batch * 512 * (2 * (1 + K) + 2 * (1 + L))
    return Case({"fastmim": lambda *a: ours(*a), "eager": eager_assembly}, inputs, moved)


def unshuffling(batch: int = B) -> Case:
    f32 = partial(randn, dtype=torch.float32)
    inputs = [f32(batch, 1 + K, 512), ids(batch, L, L).argsort(1), f32(512), f32(1 + L, 512, grad=False)]
    ours = partial(ops.unshuffle, num_prefix_tokens=1)
    return Case(
        {"fastmim": lambda *a: ours(*a), "eager": eager_unshuffle},
        inputs,
        4 * batch * 512 * (2 * (1 + K) + 2 * (1 + L)),
    )


def cosine(batch: int = B) -> Case:
    inputs = [randn(batch * K, D), randn(batch * K, D, grad=False)]
    return Case(
        {"fastmim": lambda x, y: ops.scaled_cosine_loss(x, y), "eager": eager_cosine}, inputs, 3 * nbytes(inputs[0])
    )


def norm(batch: int = B, branch: torch.dtype = torch.bfloat16, stream: torch.dtype = torch.float32) -> Case:
    x, residual = randn(batch * (1 + L), 512, dtype=branch), randn(batch * (1 + L), 512, dtype=stream)
    weight, bias = randn(512, dtype=stream), randn(512, dtype=stream)
    ours = {"fastmim": lambda *a: ops.add_layer_norm(*a)[0], "eager": eager_norm}
    # x, residual, normed and the sum; the gradient of normed, the sum, the gradients of residual and of x
    return Case(ours, [x, residual, weight, bias], x.numel() * (2 * branch.itemsize + 6 * stream.itemsize))


def gelu(batch: int = B) -> Case:
    x, bias = randn(batch * (1 + L), 2048), randn(2048)
    return Case({"fastmim": ops.bias_gelu, "eager": lambda x, b: F.gelu(x + b)}, [x, bias], 5 * nbytes(x))


def gather(pixels: torch.dtype) -> Case:
    images = torch.rand(B, 3, 224, 224, device=DEVICE)
    if not pixels.is_floating_point:
        images = (images * torch.iinfo(pixels).max).to(pixels)
    ours = partial(ops.gather_patches, patch_size=16, mean=[0.45] * 3, std=[0.225] * 3, dtype=torch.float32)
    eager = eager_gather if pixels.is_floating_point else partial(cut, order="cpq")
    return Case({"fastmim": lambda *a: ours(*a), "eager": eager}, [images, ids(B, L, K)])


def gather_signals() -> Case:
    signals = randn(B, 12, L * 25, dtype=torch.float32, grad=False)
    ours = partial(ops.gather_patches, patch_size=25)
    return Case({"fastmim": lambda *a: ours(*a), "eager": eager_gather_signals}, [signals, ids(B, L, K)])


def sums(first: int) -> Case:
    x = randn(B, 1 + L, 512, grad=False)[:, first:]
    forms = {"fastmim": lambda x: sum_rows(x, x.dtype), "eager": lambda x: x.sum((0, 1))}
    return Case(forms, [x], nbytes(x))


CASES: dict[str, Callable[[], Case]] = {
    "random_masking 256x196": masking,
    "attention 16x12x50x64": lambda: attention(16, 12, 50, 64, torch.bfloat16),
    "attention 64x12x11x64": lambda: attention(64, 12, 11, 64, torch.bfloat16),
    "attention 16x16x197x32": lambda: attention(16, 16, 197, 32, torch.bfloat16),
    "attention 16x12x50x64 float32": lambda: attention(16, 12, 50, 64, torch.float32),
    "attention 16x16x197x32 float32": lambda: attention(16, 16, 197, 32, torch.float32),
    # longer than a GPU's kernels serve: the op calls torch's own attention there
    "attention 1x12x1157x64": lambda: attention(1, 12, 1157, 64, torch.bfloat16),
    "attention 1x12x1157x64 float32": lambda: attention(1, 12, 1157, 64, torch.float32),
    "embed_patches": embed,
    "embed_patches uint16": partial(embed, pixels=torch.uint16),
    "embed_patches 12x4900": embed_signals,
    "pixel_loss": pixels,
    "pixel_loss absolute": lambda: pixels(eager=eager_absolute_loss, norm_pix=False, loss="absolute"),
    "pixel_loss huber none": lambda: pixels(eager=eager_huber_losses, norm_pix=False, loss="huber", reduction="none"),
    "decoder_tokens": assembly,
    "unshuffle": unshuffling,
    "scaled_cosine_loss": cosine,
    "add_layer_norm": norm,
    "bias_gelu": gelu,
}
# cases beside those that a GPU's time allows
CPU_CASES: dict[str, Callable[[], Case]] = {
    "gather_patches uint8": lambda: gather(torch.uint8),
    "gather_patches uint16": lambda: gather(torch.uint16),
    "gather_patches float32": lambda: gather(torch.float32),
    "gather_patches 12x4900": gather_signals,
    "decoder_tokens bf16": lambda: assembly(dtype=torch.bfloat16),
    "add_layer_norm float32": lambda: norm(branch=torch.float32),
    "add_layer_norm bf16": lambda: norm(stream=torch.bfloat16),
    "sum_rows bf16": lambda: sums(0),
    "sum_rows bf16, last rows": lambda: sums(1 + K),
}
