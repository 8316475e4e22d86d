"""Uni4Eye. Cai et al., "Uni4Eye: unified 2D and 3D self-supervised pre-training via masked image modeling transformer
for ophthalmic image classification", MICCAI 2022.

Masked: 50% of the patches, at random, of images and of volumes. One trunk serves both, with an embedding for each; two
decoders reconstruct pixels and the map of their gradients (Sobel).
Paid for visible and predicted patches alone: everything but the map of gradients.
"""

import torch
import torch.nn.functional as F
from _train import SMALL, SMALL_DECODER, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking


def sobel(images: Tensor) -> Tensor:
    """Return the magnitude of the gradient of images (B, C, H, W) or, slice by slice, of volumes (B, C, T, H, W)."""
    smooth, slope = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None].to(images)
    slices = images.flatten(0, -3)[:, None]
    found = F.conv2d(F.pad(slices, (1, 1, 1, 1), mode="replicate"), kernels)
    return found.square().sum(1).add(1e-12).sqrt().unflatten(0, images.shape[:-2])


def share(model: fastmim.MaskedAutoencoder, other: fastmim.MaskedAutoencoder, *names: str) -> None:
    for name in names:
        setattr(other, name, getattr(model, name))


class Uni4Eye(nn.Module):
    def __init__(self, plane: dict, volume: dict, sizes: dict) -> None:
        super().__init__()
        self.models = nn.ModuleList()
        for kind in (plane, volume):
            pixels, edges = (fastmim.MaskedAutoencoder(**sizes, **kind) for _ in range(2))
            share(pixels, edges, "patch_embed")
            self.models.extend([pixels, edges])
        for model in self.models[1:]:
            share(self.models[0], model, "cls_token", "blocks", "norm")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the loss of images (B, 1, H, W) or volumes (B, 1, T, H, W)."""
        pixels, edges = self.models[:2] if inputs.dim() == 4 else self.models[2:]
        mask = masking.random(len(inputs), pixels.num_patches, 0.5, device=inputs.device)
        latent = pixels.encode(inputs, mask)
        gradient = edges.loss(edges.decode(latent, mask), sobel(inputs), mask)
        return pixels.loss(pixels.decode(latent, mask), inputs, mask) + gradient


class Both(nn.Module):
    """Loss of a batch of images and one of volumes, which the paper takes in turn."""

    def __init__(self, model: Uni4Eye) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, volumes: Tensor) -> Tensor:
        return self.model(images) + self.model(volumes)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model, and a batch of pictures and of volumes."""
    sizes = {**SMALL, **SMALL_DECODER, "in_chans": 1}
    del sizes["img_size"], sizes["patch_size"]
    plane, volume = dict(img_size=32, patch_size=4), dict(img_size=(8, 32, 32), patch_size=(4, 8, 8))
    batch = pictures(4, channels=1), pictures(4, channels=8).unsqueeze(1)
    return Both(Uni4Eye(plane, volume, sizes)), batch


if __name__ == "__main__":
    train(*example())
