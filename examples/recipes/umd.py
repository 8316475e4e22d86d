"""UMD: unified masked diffusion. Hansen-Estruch et al., "Unified auto-encoding with masked diffusion", 2024.

Masked: of half the batch, which is clean, 75% of the patches; of the other half, which is noised, 37.5%. Removed pixels
are reconstructed everywhere, and the noise of visible ones of the noised half. Time modulates every norm (AdaLN).
Paid for visible and predicted patches alone: embedding and encoder, by each half's own count; the losses. Decoder and
head take all tokens, since they predict for visible and removed patches.
Differs: a linear schedule of 1000 steps; time scales and shifts the norms and does not gate the branches.
"""

import torch
from _train import SMALL, SMALL_DECODER, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking, ops
from fastmim.nn import linear, run_blocks


class AdaNorm(nn.Module):
    """LayerNorm whose scale and shift depend on the time embedding (B, T) in `time`, which all norms share."""

    def __init__(self, dim: int, time: dict[str, Tensor], width: int) -> None:
        super().__init__()
        self.norm, self.time = nn.LayerNorm(dim, elementwise_affine=False), time
        self.modulate = nn.Linear(width, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.modulate(self.time["embedding"])[:, None].chunk(2, dim=2)
        return self.norm(x) * (1 + scale) + shift


class UMD(nn.Module):
    def __init__(self, width: int, **sizes) -> None:
        super().__init__()
        self.time: dict[str, Tensor] = {}
        self.embed_time = nn.Sequential(nn.Embedding(1001, width), nn.Linear(width, width), nn.SiLU())
        self.model = fastmim.MaskedAutoencoder(
            **sizes,
            num_prefix_tokens=4,
            out_dim=2 * 3 * sizes["patch_size"] ** 2,
            norm_layer=lambda dim: AdaNorm(dim, self.time, width),
        )
        self.register_buffer("signal", torch.cat([torch.ones(1), (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)]))

    def part(self, images: Tensor, time: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
        """Return the losses of removed pixels, and of the noise of visible patches at times (B,)."""
        model = self.model
        mask = masking.random(len(images), model.num_patches, mask_ratio, device=images.device)
        self.time["embedding"] = self.embed_time(time)
        noise, signal = torch.randn_like(images), self.signal[time][:, None, None, None]
        latent = model.encode(signal.sqrt() * images + (1 - signal).sqrt() * noise, mask)
        tokens = ops.unshuffle(
            linear(latent, model.decoder_embed),
            mask.ids_restore,
            model.mask_token.flatten(),
            model.decoder_pos_embed[0],
            num_prefix_tokens=4,
        )
        out = run_blocks(model.decoder_blocks, model.decoder_norm, tokens, head=model.decoder_pred)[:, 4:]
        pixels, noises = (
            ops.gather_tokens(part.contiguous(), ids)
            for part, ids in zip(out.chunk(2, dim=2), (mask.ids_predict, mask.ids_keep))
        )
        ids, patch = mask.ids_keep, model.patch_size
        return model.loss(pixels, images, mask), ops.pixel_loss(noises, noise, ids, patch, norm_pix=False)

    def forward(self, images: Tensor) -> Tensor:
        clean, noised = images.chunk(2)
        pixels, _ = self.part(clean, torch.zeros(len(clean), dtype=torch.long, device=images.device), 0.75)
        more, noise = self.part(noised, torch.randint(1, 1001, (len(noised),), device=images.device), 0.375)
        return pixels + more + noise / 2


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return UMD(16, **SMALL, **SMALL_DECODER), (pictures(),)


if __name__ == "__main__":
    train(*example())
