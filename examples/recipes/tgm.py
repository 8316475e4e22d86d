"""TGM. Fan et al., "Text-guided video masked autoencoder", ECCV 2024.

Masked: the 75% of a clip's patches that match its caption best, by a frozen model of images and text. Beside the
pixels, the pooled visible tokens are contrasted with the caption (masked video-text contrast).
Paid for visible and predicted patches alone: the step and the contrast. The frozen model embeds all patches.
Differs: the frozen model is a projection of patches and words at random, in place of CLIP.
"""

import torch
import torch.nn.functional as F
from _train import SMALL, SMALL_DECODER, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import losses, masking


class TGM(nn.Module):
    def __init__(self, model: fastmim.MaskedAutoencoder, look: nn.Module, read: nn.Module, mask_ratio: float) -> None:
        super().__init__()
        self.model, self.mask_ratio = model, mask_ratio
        self.look, self.read = look.requires_grad_(False), read.requires_grad_(False)
        self.video, self.text = (nn.Linear(width, 32) for width in (model.embed_dim, read.embedding_dim))

    @torch.no_grad()
    def similarity(self, clips: Tensor, captions: Tensor) -> Tensor:
        """Return the similarity (B, L) of each patch of a clip with its caption (B, T)."""
        return F.cosine_similarity(self.look(clips), self.read(captions)[:, None], dim=2)

    def forward(self, clips: Tensor, captions: Tensor) -> Tensor:
        mask = masking.from_scores(self.similarity(clips, captions), self.mask_ratio)
        latent = self.model.encode(clips, mask)
        pixels = self.model.loss(self.model.decode(latent, mask), clips, mask)
        seen, told = self.video(latent.mean(1)), self.text(self.read(captions))
        return pixels + losses.info_nce(seen, told, temperature=0.1, symmetric=True)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model, and a batch of clips with captions of 5 words."""
    sizes = {**SMALL, "img_size": (4, 32, 32), "patch_size": (2, 8, 8), "num_prefix_tokens": 0}
    model = fastmim.MaskedAutoencoder(**sizes, **SMALL_DECODER, norm_pix_loss=True)
    look, read = fastmim.nn.PatchEmbed((4, 32, 32), (2, 8, 8), 3, 16), nn.EmbeddingBag(32, 16)
    clips = pictures(8, channels=12).unflatten(1, (3, 4))
    return TGM(model, look, read, 0.75), (clips, torch.randint(32, (8, 5)))


if __name__ == "__main__":
    train(*example())
