"""P2C. Cui et al., "P2C: self-supervised point cloud completion from single partial clouds", ICCV 2023.

Masked: two thirds of the groups of a partial cloud. A complete cloud is generated from the visible third. Around the
centres of that third and of the second one it is to match what is observed, and only there: points far from them are
free to complete it. Around the centres of the last third, groups of generated points, encoded, are to give the features
of the visible third. Surfaces are to be smooth: the normals around a point are to differ from its own alike.
Paid for visible groups alone: embedding and encoder, once more for the last third. The generator and the losses are
paid for whole clouds.
Differs: PointEncoder, in place of a PointNet of all points of a third; normals are known up to their sign; weights of
the terms are ours.
"""

import torch
import torch.nn.functional as F
from _points import PointEncoder, chamfer, clouds, group, nearest, pick
from _train import train
from torch import Tensor, nn

from fastmim import Mask, masking, ops


class P2C(nn.Module):
    def __init__(self, count: int = 12, size: int = 16, width: int = 32, generated: int = 128) -> None:
        super().__init__()
        self.count, self.size = count, size
        self.encoder = PointEncoder(count, width)
        hidden = 4 * width
        self.generator = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 3 * generated))

    def feature(self, centres: Tensor, groups: Tensor, mask: Mask) -> Tensor:
        """Return the feature (B, D) of a cloud, from the groups that are visible."""
        return self.encoder((centres, groups), mask).amax(1)

    def complete(self, feature: Tensor) -> Tensor:
        """Return complete clouds (B, generated, 3)."""
        return self.generator(feature).unflatten(1, (-1, 3))

    def forward(self, points: Tensor, mask: Mask | None = None) -> Tensor:
        centres, groups = group(points, self.count, self.size)
        mask = mask or masking.random(len(points), self.count, len_keep=self.count // 3, device=points.device)
        feature = self.feature(centres, groups, mask)
        cloud = self.complete(feature)
        second, last = mask.ids_predict.chunk(2, 1)
        matched = [
            region_chamfer(cloud, ops.gather_tokens(centres, ids), gather_groups(groups, ids)).mean()
            for ids in (mask.ids_keep, second)
        ]
        generated = pick(cloud.detach(), nearest(cloud, centres, self.size)) - centres[:, :, None]
        removed = torch.ones_like(centres[..., 0], dtype=torch.bool).scatter(1, last, False)
        others = masking.from_bool(removed, len_keep=last.shape[1])
        latent = F.smooth_l1_loss(feature, self.feature(centres, generated, others))
        return sum(matched) + 0.1 * latent + 0.1 * inconsistency(cloud).mean()


def gather_groups(groups: Tensor, ids: Tensor) -> Tensor:
    """Return the groups (B, K, S, 3) at `ids` (B, K)."""
    return ops.gather_tokens(groups.flatten(2), ids).unflatten(2, groups.shape[2:])


def region_chamfer(cloud: Tensor, centres: Tensor, groups: Tensor) -> Tensor:
    """Return the Chamfer distance (B,) of observed groups to as many points of the cloud around each centre."""
    around = pick(cloud, nearest(cloud, centres, groups.shape[2]))
    return chamfer(around.flatten(1, 2), (groups + centres[:, :, None]).flatten(1, 2))


def inconsistency(cloud: Tensor, size: int = 8) -> Tensor:
    """Return the deviation (B, N) among the 1 - cos of a point's normal and the normals of the points around it."""
    ids = nearest(cloud, cloud, size)
    around = pick(cloud, ids)
    around = around - around.mean(2, keepdim=True)
    spread = around.mT @ around + 1e-6 * torch.eye(3, device=cloud.device)
    normals = torch.linalg.eigh(spread).eigenvectors[..., 0]
    return (1 - (pick(normals, ids) * normals[:, :, None]).sum(3).abs()).std(2)


def partial(points: Tensor, share: float = 0.7) -> Tensor:
    """Return the share of the points (B, N, 3) that a camera in a random direction is nearest to."""
    height = (points * torch.randn(len(points), 1, 3)).sum(2)
    ids = height.topk(int(share * points.shape[1])).indices
    return points.take_along_dim(ids[..., None], 1)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return P2C(), (partial(clouds()),)


if __name__ == "__main__":
    train(*example())
