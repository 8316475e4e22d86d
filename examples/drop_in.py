"""fastmim's ops inside another model: a plain ViT whose encoder sees only visible patches.

Three lines change: the patch embedding, the attention call, and the loss. The rest stays as it was.
"""

import torch
from torch import nn

from fastmim import masking, ops


class PlainAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, S, 3, H, D)
        return self.out(ops.attention_qkvpacked(qkv).flatten(2))  # was F.scaled_dot_product_attention on q, k, v


class PlainViT(nn.Module):
    def __init__(self, size: int = 64, patch: int = 8, dim: int = 96, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patch, self.num_patches = patch, (size // patch) ** 2
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.pos = nn.Parameter(torch.randn(self.num_patches, dim) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.encoder = nn.ModuleList(PlainAttention(dim, heads) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.decoder = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0, batch_first=True, norm_first=True)
        self.head = nn.Linear(dim, patch * patch * 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mask = masking.random(len(images), self.num_patches, 0.9, decode_ratio=0.25, device=images.device)
        # was embed(normalise(images)).flatten(2).transpose(1, 2) + pos, then a gather
        x = ops.embed_patches(
            images,
            mask.ids_keep,
            self.embed.weight,
            self.embed.bias,
            pos_embed=self.pos,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        ).float()  # under autocast the embedding is narrow; the residual stream should not be
        for norm, attention in zip(self.norms, self.encoder):
            x = x + attention(norm(x))
        x = self.decoder(ops.decoder_tokens(x, mask.ids_keep, mask.ids_predict, self.mask_token, self.pos))
        pred = self.head(x[:, mask.len_keep :])
        # was mse_loss(pred, patchify(normalise(images)) at the masked patches)
        return ops.pixel_loss(pred, images, mask.ids_predict, self.patch)


torch.manual_seed(0)
images = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
model = PlainViT()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(30):
    loss = model(images)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.4f}")
