"""I2P-MAE. Zhang et al., "Learning 3D representations from 2D pre-trained models via image-to-point masked
autoencoders", CVPR 2023.

Masked: 75% of the groups of a cloud; those that a frozen image model finds salient are more likely to stay visible. Its
features of depth maps from three sides, brought back to the points, are predicted at visible groups; points at masked.
Paid for visible groups alone: embedding, encoder, and the loss of features; for visible and masked ones the decoder;
for masked ones the Chamfer distance. The image model takes three whole depth maps.
Differs: a small image encoder of random weights in place of CLIP; likeness to its class token in place of attention;
one scale; positions are added once, before the first block; features come from the encoder's output.
"""

import torch
import torch.nn.functional as F
from _points import PointDecoder, PointEncoder, chamfer, clouds, farthest, nearest, pick
from _train import SMALL, train
from torch import Tensor, nn

import fastmim
from fastmim import Mask, masking, ops


class I2PMAE(nn.Module):
    def __init__(self, teacher: fastmim.Encoder, count: int = 16, size: int = 16, width: int = 32) -> None:
        super().__init__()
        self.count, self.size = count, size
        self.teacher = teacher.eval().requires_grad_(False)
        self.encoder, self.decoder = PointEncoder(count, width), PointDecoder(width)
        self.points, self.features = nn.Linear(width, 3 * size), nn.Linear(width, teacher.embed_dim)

    @torch.no_grad()
    def look(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, N, D) and saliency (B, N) of points in -1..1, the mean over views along three axes."""
        side, grid = self.teacher.img_size[0], self.teacher.grid_size[0]
        features, saliency = 0, 0
        for axis in range(3):
            place = ((points / 2 + 0.5) * side).long().clamp(0, side - 1).roll(-axis, 2)
            depth = torch.zeros(len(points), side * side, device=points.device)
            pixel, height = place[..., 1] * side + place[..., 2], points[..., axis] + 2
            depth = depth.scatter_reduce(1, pixel, height, "amax").view(-1, 1, side, side)
            cls, patches = self.teacher(depth).split([1, grid * grid], 1)
            step = side // grid
            ids = (place[..., 1] // step * grid + place[..., 2] // step)[..., None]
            features = features + patches.take_along_dim(ids, 1) / 3
            saliency = saliency + F.cosine_similarity(patches, cls, dim=2).take_along_dim(ids[..., 0], 1) / 3
        return features, saliency

    def draw(self, saliency: Tensor) -> Mask:
        """Keep groups in proportion to the softmax of their saliency (B, G)."""
        return masking.weighted(saliency.softmax(1), len_keep=self.count - int(0.75 * self.count))

    def forward(self, points: Tensor) -> Tensor:
        features, saliency = self.look(points)
        centres = ops.gather_tokens(points, farthest(points, self.count))
        ids = nearest(points, centres, self.size)
        groups = pick(points, ids) - centres[:, :, None]
        mask = self.draw(pick(saliency[..., None], ids).mean((2, 3)))
        latent = self.encoder((centres, groups), mask)
        pred = self.points(self.decoder(latent, mask, centres)).unflatten(2, (self.size, 3))
        target = ops.gather_tokens(groups.flatten(2), mask.ids_predict).unflatten(2, (self.size, 3))
        seen = ops.gather_tokens(pick(features, ids).mean(2), mask.ids_keep)
        return chamfer(pred, target).mean() + F.mse_loss(self.features(latent), seen)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return I2PMAE(fastmim.Encoder(**SMALL, in_chans=1)), (clouds(),)


if __name__ == "__main__":
    train(*example())
