"""Other systems in plain PyTorch, each with fastmim's algorithm: gather first, compute what is predicted.

Written from the formulas of VideoMAE (Tong et al., NeurIPS 2022), CrossMAE (Fu et al., 2024) and DMAE (Bai et al.,
CVPR 2023). Letters as in `plain_mae`. Pixio is `plain_mae` with several class tokens and learned positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.models.arguments import IMAGENET_MEAN, IMAGENET_STD
from rivals.plain_mae import Attention, Ids, Mlp, Patches, Plain, PlainEncoder, PlainGatherMAE
from rivals.sizes import Cell, Sizes


class PlainVideoMAE(PlainGatherMAE):
    """Predict pixels in 0..1 of cubes, normalised in each channel; cubes that are visible have no loss."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.decoder_embed = nn.Linear(sizes.width, sizes.decoder_width, bias=False)

    def error(self, pred: Tensor, target: Tensor, ids: Ids) -> Tensor:
        """Return the loss of predictions (B, M, P) of cubes (B, M, 3, t, p, p)."""
        mean, std = (torch.tensor(x, dtype=target.dtype, device=target.device) for x in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = target.flatten(3).transpose(2, 3) * std + mean
        var, mean = torch.var_mean(pixels, 2, keepdim=True)
        errors = (pred - ((pixels - mean) / (var.sqrt() + 1e-6)).flatten(2)).square().mean(-1)
        hidden = ids.restore.gather(1, ids.predict) >= ids.keep.shape[1]
        return (errors * hidden).sum() / hidden.sum()


class CrossAttention(Attention):
    """Attention of tokens to a memory (B, S, memory)."""

    def __init__(self, width: int, memory: int, heads: int) -> None:
        super().__init__(width, heads)
        del self.qkv
        self.q, self.kv = nn.Linear(width, width), nn.Linear(memory, 2 * width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        """Attend from the tokens x (B, M, D) to the memory: (B, M, D)."""
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (2, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Attention to a memory, then an MLP, with norms before."""

    def __init__(self, width: int, memory: int, heads: int) -> None:
        super().__init__()
        self.norm_cross = nn.LayerNorm(width, eps=1e-6)
        self.norm_memory = nn.LayerNorm(memory, eps=1e-6)
        self.cross_attn = CrossAttention(width, memory, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.cross_attn(self.norm_cross(x), self.norm_memory(memory))
        return x + self.mlp(self.norm2(x))


class PlainCrossMAE(PlainGatherMAE):
    """Decode each predicted patch by itself, from mixtures of the encoder's states, one for each block."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        del self.norm, self.decoder_embed
        self.mixture = nn.Linear(sizes.depth + 1, sizes.decoder_depth, bias=False)
        self.decoder_blocks = nn.ModuleList(
            CrossBlock(sizes.decoder_width, sizes.width, sizes.decoder_heads) for _ in range(sizes.decoder_depth)
        )

    def predict(self, patches: Patches, ids: Ids) -> Tensor:
        """Predict patches: (B, M, P)."""
        states = torch.stack(list(self.states(self.embed(patches, ids.keep))))
        memories = (self.mixture.weight @ states.flatten(1)).unflatten(1, states.shape[1:])
        x = self.mask_token + self.decoder_pos_embed[0, self.sizes.prefix :][ids.predict]
        for block, memory in zip(self.decoder_blocks, memories):
            x = block(x, memory)
        return self.decoder_pred(self.decoder_norm(x))

    def sequences(self, cell: Cell) -> dict[str, tuple[nn.ModuleList, int, int, int]]:
        """Return blocks, heads, queries and keys of each stage."""
        encoder = PlainEncoder.sequences(self, cell)
        (_, _, visible, _) = encoder["encoder"]
        return encoder | {
            "decoder": (self.decoder_blocks, self.sizes.decoder_heads, self.sizes.predicted(cell), visible)
        }


class Student(PlainGatherMAE):
    """Masked autoencoder that predicts patches as they are."""

    def error(self, pred: Tensor, target: Tensor, ids: Ids) -> Tensor:
        """Return the loss of predictions (B, M, P) of patches (B, M, 3, p, p)."""
        return F.mse_loss(pred, target.permute(0, 1, 3, 4, 2).reshape(pred.shape))


class PlainDMAE(Plain):
    """Student's loss, and the distance of a state of its blocks to the teacher's last, both scaled to length 1.

    The teacher sees the visible patches alone.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tap = tap(sizes.depth)
        self.student, self.teacher = Student(sizes), PlainEncoder(sizes.teacher).requires_grad_(False)
        self.projections = nn.ModuleList([nn.Linear(sizes.width, sizes.teacher.width)])

    def score(self, images: Tensor, ids: Ids) -> Tensor:
        """Return the loss of normalised images."""
        student, teacher = self.student, self.teacher
        patches = Patches(images, student.sizes)
        with torch.no_grad():
            for state in teacher.states(teacher.embed(patches, ids.keep)):
                target = state
        for count, state in enumerate(student.states(student.embed(patches, ids.keep))):
            if count == 1 + self.tap:
                tapped = state
        pred = student.decode(student.decoder_embed(student.norm(state)), ids)
        own = student.error(pred, patches.pick(ids.predict), ids)
        guided = F.normalize(self.projections[0](tapped).to(target.dtype), dim=-1)
        return own + F.mse_loss(guided, F.normalize(target, dim=-1))

    def sequences(self, cell: Cell) -> dict[str, tuple[nn.ModuleList, int, int, int]]:
        """Return blocks, heads, queries and keys of each stage."""
        _, _, visible, _ = self.student.sequences(cell)["encoder"]
        teacher = self.teacher.blocks, self.teacher.sizes.heads, visible, visible
        return self.student.sequences(cell) | {"teacher": teacher}


def tap(depth: int) -> int:
    """Return the block of the student that DMAE compares, the 9th of 12."""
    return depth * 3 // 4 - 1
