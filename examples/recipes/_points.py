"""Shared by the recipes for points: groups of points, their distance, an encoder and a decoder of groups."""

import torch
from torch import Tensor, nn

from fastmim import Encoder, Mask, ops
from fastmim.nn import Block, run_blocks


def clouds(batch: int = 8, points: int = 256) -> Tensor:
    """Return clouds (batch, points, 3) on the surfaces of ellipsoids of different shapes, within the unit cube."""
    return nn.functional.normalize(torch.randn(batch, points, 3), dim=2) * (0.3 + 0.7 * torch.rand(batch, 1, 3))


def farthest(points: Tensor, count: int) -> Tensor:
    """Return ids (B, count) of points (B, N, 3), each the farthest from those before it; the first is random."""
    ids = [torch.randint(points.shape[1], (len(points),), device=points.device)]
    distance = torch.full(points.shape[:2], torch.inf, device=points.device)
    rows = torch.arange(len(points), device=points.device)
    for _ in range(count - 1):
        new = (points - points[rows, ids[-1]][:, None]).square().sum(2)
        distance = torch.minimum(distance, new)
        ids.append(distance.argmax(1))
    return torch.stack(ids, 1)


def nearest(points: Tensor, centres: Tensor, size: int) -> Tensor:
    """Return ids (B, G, size) of the points (B, N, 3) nearest to each centre (B, G, 3)."""
    return torch.cdist(centres, points).topk(size, largest=False).indices


def pick(points: Tensor, ids: Tensor) -> Tensor:
    """Return values (B, G, S, D) of points (B, N, D) at ids (B, G, S)."""
    return points.gather(1, ids.flatten(1)[..., None].expand(-1, -1, points.shape[2])).unflatten(1, ids.shape[1:])


def group(points: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return centres (B, count, 3), and groups (B, count, size, 3) of the points around each, relative to it."""
    centres = ops.gather_tokens(points, farthest(points, count))
    return centres, pick(points, nearest(points, centres, size)) - centres[:, :, None]


def chamfer(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared distance (...) to the nearest point, from a (..., S, 3) to b (..., T, 3) and back."""
    distance = (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)
    return distance.amin(-1).mean(-1) + distance.amin(-2).mean(-1)


def position(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))


class PointEncoder(Encoder):
    """Encoder of groups of points, each embedded by a small PointNet, at the position of its centre.

    `encode((centres, groups), mask)`; positions are added before the first block, not before each as in Point-MAE.
    """

    def __init__(self, count: int, width: int = 32, depth: int = 2) -> None:
        super().__init__((count,), (1,), 1, width, depth, 4, num_prefix_tokens=0, pos_embed="none")
        self.patch_embed = None
        self.point = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width))
        self.mix = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.place = position(width)

    def embed(self, inputs: tuple[Tensor, Tensor], ids: Tensor) -> Tensor:
        centres, groups = inputs
        each = self.point(ops.gather_tokens(groups.flatten(2), ids).unflatten(2, groups.shape[2:]))
        whole = each.amax(2, keepdim=True).expand_as(each)
        return self.mix(torch.cat([each, whole], -1)).amax(2) + self.place(ops.gather_tokens(centres, ids))


class PointDecoder(nn.Module):
    """Decoder of the visible groups and a mask token for each predicted one, at the positions of their centres."""

    def __init__(self, width: int = 32, depth: int = 1) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.place, self.norm = position(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(depth))

    def forward(self, latent: Tensor, mask: Mask, centres: Tensor) -> Tensor:
        """Return the states (B, M, D) of the predicted groups."""
        tokens = ops.decoder_tokens(latent, mask.ids_keep, mask.ids_predict, self.mask_token, self.place(centres))
        valid = mask.valid_keep is not None
        keys = torch.cat([mask.valid_keep, mask.valid_predict], 1) if valid else None
        count = mask.ids_predict.shape[1]
        return run_blocks(self.blocks, self.norm, tokens, num_queries=count, key_mask=keys)
