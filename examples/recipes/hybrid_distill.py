"""Hybrid Distill. Shi et al., "Hybrid distillation: connecting masked autoencoders with contrastive learners", ICLR
2024.

Masked: redundant patches, progressively: after each third of the student's blocks those that resemble the others most
are dropped. Relations among the last tokens, of queries to keys and of values to values, come from a teacher trained by
masked modelling; features from one trained by contrast.
Paid for visible patches alone: both teachers, and the losses; the student's blocks as its tokens become fewer.
Differs: relations are compared in the last block, in the paper in blocks before it. The rule of redundancy is our
reading, mean cosine similarity, since no code is public; small encoders of random weights are the teachers.
"""

import torch
import torch.nn.functional as F
from _train import SMALL, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking, ops


def relations(encoder: fastmim.Encoder, before: Tensor) -> list[Tensor]:
    """Return log-probabilities (B, H, K, K) of q·k and v·v in the last block, of patches; before: its input."""
    block = encoder.blocks[-1]
    qkv = block.attn.qkv(block.norm1(before)).unflatten(2, (3, encoder.num_heads, -1))
    q, k, v = qkv[:, encoder.num_prefix_tokens :].permute(2, 0, 3, 1, 4)
    return [(a @ b.transpose(2, 3) * q.shape[-1] ** -0.5).log_softmax(-1) for a, b in ((q, k), (v, v))]


class HybridDistill(nn.Module):
    def __init__(self, student: fastmim.Encoder, masked: fastmim.Encoder, contrastive: fastmim.Encoder) -> None:
        super().__init__()
        self.student = student
        self.masked, self.contrastive = masked.requires_grad_(False), contrastive.requires_grad_(False)
        self.head = nn.Linear(student.embed_dim, contrastive.embed_dim)
        self.keep = 0.75  # of the tokens, at each drop

    def drop(self, tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, 1+K, D) and ids (B, K) without those most similar to the others."""
        unit = F.normalize(tokens[:, 1:].detach(), dim=2)
        likeness = (unit @ unit.mean(1, keepdim=True).transpose(1, 2)).squeeze(2)
        kept = masking.from_scores(likeness, 1 - self.keep).ids_keep
        return torch.cat([tokens[:, :1], ops.gather_tokens(tokens[:, 1:], kept)], 1), ids.gather(1, kept)

    def forward(self, images: Tensor) -> Tensor:
        student, third = self.student, len(self.student.blocks) // 3
        ids = torch.arange(student.num_patches, device=images.device).expand(len(images), -1)
        patches = student.embed(images, ids) + student.pos_embed[:, 1:]
        tokens = torch.cat([student.cls_token.expand(len(images), -1, -1), patches], 1)
        for index, block in enumerate(student.blocks):
            if index in (third, 2 * third):
                tokens, ids = self.drop(tokens, ids)
            before, tokens = tokens, block(tokens)
        with torch.no_grad():
            removed = torch.ones_like(patches[..., 0], dtype=torch.bool).scatter(1, ids, False)
            mask = masking.from_bool(removed, len_keep=ids.shape[1])
            place = mask.ids_restore.gather(1, ids)  # of each of the student's patches among the teachers'
            _, (state,) = self.masked.encode(images, mask, taps=[len(self.masked.blocks) - 2], stop=True)
            state = torch.cat([state[:, :1], ops.gather_tokens(state[:, 1:], place)], 1)
            features = self.contrastive.encode(images, mask)[:, 1:]
            features = F.layer_norm(ops.gather_tokens(features, place), features.shape[-1:])
        pairs = zip(relations(student, before), relations(self.masked, state))
        shared = sum(F.kl_div(own, taught, log_target=True, reduction="none").sum(-1).mean() for own, taught in pairs)
        return shared + F.smooth_l1_loss(self.head(student.norm(tokens)[:, 1:]), features)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    student = fastmim.Encoder(**{**SMALL, "depth": 3})
    return HybridDistill(student, fastmim.Encoder(**SMALL), fastmim.Encoder(**SMALL)), (pictures(),)


if __name__ == "__main__":
    train(*example())
