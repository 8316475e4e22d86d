"""Predict a frozen teacher's features instead of pixels; teacher and student see the same visible patches.

The teacher costs what the student costs: it reads only the patches in the shared `ids_keep` (as DMAE does, Bai et
al., CVPR 2023). The loss is GraphMAE's scaled cosine error.
"""

import torch
from torch import nn

import fastmim
from fastmim import masking, ops
from fastmim.nn import run_blocks


class Features(nn.Module):
    """The encoder of a masked autoencoder on chosen patches, without its class token."""

    def __init__(self, mae: fastmim.MaskedAutoencoderViT) -> None:
        super().__init__()
        self.mae = mae

    def forward(self, images: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        mae = self.mae
        x = mae.patch_embed(images, ids_keep, pos_embed=mae.pos_embed[0, 1:], mean=mae.mean, std=mae.std)
        return run_blocks(mae.blocks, mae.norm, x)


torch.manual_seed(0)
size = 64
teacher = Features(fastmim.mae_vit_small_patch16(img_size=size, depth=2)).eval().requires_grad_(False)
student = Features(fastmim.mae_vit_tiny_patch16(img_size=size, depth=2))
project = nn.Linear(192, 384)
parameters = [p for p in (*student.parameters(), *project.parameters()) if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=1e-3)

images = torch.randint(0, 256, (16, 3, size, size), dtype=torch.uint8)
for step in range(30):
    ids_keep = masking.random(len(images), (size // 16) ** 2, 0.75).ids_keep
    with torch.no_grad():
        target = teacher(images, ids_keep)
    loss = ops.scaled_cosine_loss(project(student(images, ids_keep)), target, gamma=2.0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.4f}")
