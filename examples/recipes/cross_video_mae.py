"""CrossVideoMAE. Ahamed et al., "CrossVideoMAE: self-supervised image-video representation learning with masked
autoencoders", 2025.

Masked: of a clip 90% in tubes, of one of its frames 75% at random, in two branches that both reconstruct pixels. Pooled
visible tokens are contrasted: of two augmentations within each branch, and of clip and frame between them.
Paid for visible and predicted patches alone: everything.
Differs: the augmentations are mirroring and brightness; 75% of the small clip is masked.
"""

import torch
from _train import SMALL, SMALL_DECODER, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import losses, masking


class CrossVideoMAE(nn.Module):
    def __init__(self, video: fastmim.MaskedAutoencoder, frame: fastmim.MaskedAutoencoder, video_ratio: float) -> None:
        super().__init__()
        self.video, self.frame, self.video_ratio = video, frame, video_ratio
        self.heads = nn.ModuleList(nn.Linear(model.embed_dim, 32) for model in (video, frame))

    def branch(self, index: int, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of pixels and the pooled visible tokens (B, 32)."""
        model = (self.video, self.frame)[index]
        if index == 0:
            mask = masking.tube(len(images), model.grid_size, self.video_ratio, device=images.device)
        else:
            mask = masking.random(len(images), model.num_patches, 0.75, device=images.device)
        latent = model.encode(images, mask)
        return model.loss(model.decode(latent, mask), images, mask), self.heads[index](latent.mean(1))

    def forward(self, clips: Tensor) -> Tensor:
        """Return the loss of clips (B, C, T, H, W)."""
        frames = clips[:, :, torch.randint(clips.shape[2], ()).item()]
        loss, pooled = 0.0, []
        for index, images in enumerate((clips, frames)):
            views = images, 0.7 * images.flip(-1)
            pixels, tokens = zip(*(self.branch(index, view) for view in views))
            loss = loss + sum(pixels) / 2 + losses.info_nce(*tokens, temperature=0.1, symmetric=True)
            pooled.append(sum(tokens) / 2)
        return loss + losses.info_nce(*pooled, temperature=0.1, symmetric=True)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch of clips."""
    options = dict(**SMALL_DECODER, num_prefix_tokens=0, norm_pix_loss=True)
    video = fastmim.MaskedAutoencoder(**{**SMALL, "img_size": (4, 32, 32), "patch_size": (2, 8, 8)}, **options)
    frame = fastmim.MaskedAutoencoder(**SMALL, **options)
    return CrossVideoMAE(video, frame, 0.75), (pictures(8, channels=12).unflatten(1, (3, 4)),)


if __name__ == "__main__":
    train(*example())
