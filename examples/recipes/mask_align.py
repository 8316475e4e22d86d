"""MaskAlign. Xue et al., "Stare at what you see: masked image modeling without reconstruction", CVPR 2023.

Masked: 70% of the patches; those that the teacher's class token attends to are more often visible. Learned mixtures of
the student's states are aligned with the teacher's last states at the visible patches. Nothing is reconstructed.
Paid for visible patches alone: the student, the alignment. The teacher reads the whole image.
Differs: the teacher is a small encoder of random weights in place of CLIP.
"""

import torch
import torch.nn.functional as F
from _train import SMALL, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking, ops


class MaskAlign(nn.Module):
    def __init__(self, student: fastmim.Encoder, teacher: fastmim.Encoder, top: int) -> None:
        super().__init__()
        depth = len(student.blocks)
        self.student, self.teacher, self.top = student, teacher.requires_grad_(False), top
        self.mixture = nn.Parameter(torch.eye(depth)[-top:] + 0.01)  # of the student's blocks, for each target
        self.heads = nn.ModuleList(nn.Linear(student.embed_dim, teacher.embed_dim) for _ in range(top))
        student.norm = nn.Identity()  # states of blocks are compared

    @torch.no_grad()
    def targets(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the teacher's last `top` states (B, 1+L, D), normalised, and weights (B, L) of patches."""
        blocks = self.teacher.blocks
        taps = range(len(blocks) - max(self.top, 2), len(blocks))
        _, states = self.teacher.encode(images, taps=taps, stop=True)
        qkv = blocks[-1].attn.qkv(blocks[-1].norm1(states[-2])).unflatten(2, (3, blocks[-1].attn.num_heads, -1))
        q, k = qkv[:, :1, 0], qkv[:, :, 1]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        weights = scores.softmax(-1).mean(1)[:, 0, 1:]
        return [F.layer_norm(state, state.shape[-1:]) for state in states[-self.top :]], weights

    def forward(self, images: Tensor) -> Tensor:
        targets, weights = self.targets(images)
        mask = masking.weighted(weights, 0.7)
        depth = len(self.student.blocks)
        _, states = self.student.encode(images, mask, taps=range(depth), stop=True)
        loss = 0.0
        for head, row, target in zip(self.heads, self.mixture, targets):
            mixed = head(sum(factor * state for factor, state in zip(row, states)))
            seen = torch.cat([target[:, :1], ops.gather_tokens(target[:, 1:], mask.ids_keep)], 1)
            loss = loss + 2 * F.smooth_l1_loss(mixed, seen)
        return loss / self.top


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    teacher = fastmim.Encoder(**{**SMALL, "embed_dim": 48, "depth": 3})
    return MaskAlign(fastmim.Encoder(**SMALL), teacher, top=2), (pictures(),)


if __name__ == "__main__":
    train(*example())
