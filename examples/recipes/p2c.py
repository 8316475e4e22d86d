"""P2C. Cui et al., "P2C: self-supervised point cloud completion from single partial clouds", ICCV 2023.

Masked: a third of the groups of a partial cloud. A complete cloud is generated from the visible groups. It is to match
every region that is observed, and only there: its points far from what is observed are free to complete it. Surfaces
are to be flat: the points around a generated one have a small spread along their normal.
Paid for visible groups alone: embedding and encoder. The generator and the losses are paid for whole clouds.
Differs: the abstract is the source. Regions are all groups, masked ones of weight 1 as visible ones; the spread along
the normal stands for the consistency of normals; the second, latent group of patches is left out.
"""

import torch
from _points import PointEncoder, chamfer, clouds, group, nearest, pick
from _train import train
from torch import Tensor, nn

from fastmim import Mask, masking


class P2C(nn.Module):
    def __init__(self, count: int = 12, size: int = 16, width: int = 32, generated: int = 128) -> None:
        super().__init__()
        self.count, self.size = count, size
        self.encoder = PointEncoder(count, width)
        hidden = 4 * width
        self.generator = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 3 * generated))

    def complete(self, centres: Tensor, groups: Tensor, mask: Mask | None = None) -> Tensor:
        """Return complete clouds (B, generated, 3), from the groups that are visible."""
        latent = self.encoder((centres, groups), mask)
        return self.generator(latent.amax(1)).unflatten(1, (-1, 3))

    def forward(self, points: Tensor, mask: Mask | None = None) -> Tensor:
        centres, groups = group(points, self.count, self.size)
        kept = self.count - self.count // 3
        mask = mask or masking.random(len(points), self.count, len_keep=kept, device=points.device)
        cloud = self.complete(centres, groups, mask)
        return region_chamfer(cloud, centres, groups).mean() + 0.1 * roughness(cloud).mean()


def region_chamfer(cloud: Tensor, centres: Tensor, groups: Tensor) -> Tensor:
    """Return the Chamfer distance (B, G) of each observed group to as many points of the cloud around its centre."""
    around = pick(cloud, nearest(cloud, centres, groups.shape[2]))
    return chamfer(around - centres[:, :, None], groups)


def roughness(cloud: Tensor, size: int = 8) -> Tensor:
    """Return the share (B, N) of the spread of the points around each point that is along their normal."""
    around = pick(cloud, nearest(cloud, cloud, size))
    around = around - around.mean(2, keepdim=True)
    spread = around.mT @ around + 1e-6 * torch.eye(3, device=cloud.device)
    return torch.linalg.eigvalsh(spread)[..., 0] / spread.diagonal(dim1=-2, dim2=-1).sum(-1)


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
