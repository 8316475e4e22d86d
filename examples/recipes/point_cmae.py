"""Point-CMAE. Ren et al., "Bringing masked autoencoders explicit contrastive properties for point cloud self-supervised
learning", ACCV 2024.

Masked: 60% of the groups of a cloud, twice, independently. Each view is decoded by a decoder of its own; the states of
groups that both views mask are to agree, beside the Chamfer distance of the masked points.
Paid for visible groups alone: embedding and encoder; for visible and masked ones the decoders; for masked
ones the loss.
Differs: positions are added once, before the first block.
"""

from _points import PointDecoder, PointEncoder, chamfer, clouds, group
from _train import train
from torch import Tensor, nn

from fastmim import Mask, masking, ops


class PointCMAE(nn.Module):
    def __init__(self, count: int = 16, size: int = 16, width: int = 32) -> None:
        super().__init__()
        self.count, self.size = count, size
        self.encoder = PointEncoder(count, width)
        self.decoders = nn.ModuleList([PointDecoder(width), PointDecoder(width)])
        self.head = nn.Linear(width, 3 * size)

    def draw(self, points: Tensor) -> list[Mask]:
        options = dict(len_keep=self.count - int(0.6 * self.count), device=points.device)
        return [masking.random(len(points), self.count, **options) for _ in range(2)]

    def forward(self, points: Tensor, masks: list[Mask] | None = None) -> Tensor:
        centres, groups = group(points, self.count, self.size)
        masks = masks or self.draw(points)
        states, loss = [], 0
        for mask, decoder in zip(masks, self.decoders):
            states.append(decoder(self.encoder((centres, groups), mask), mask, centres))
            pred = self.head(states[-1]).unflatten(2, (self.size, 3))
            target = ops.gather_tokens(groups.flatten(2), mask.ids_predict).unflatten(2, (self.size, 3))
            loss = loss + chamfer(pred, target).mean()
        return loss + agreement(*states, *masks)


def agreement(first: Tensor, second: Tensor, mask1: Mask, mask2: Mask) -> Tensor:
    """Return 1 - cos of the states (B, M, D) of two views, over the groups that both of them mask."""
    place = mask2.ids_restore.gather(1, mask1.ids_predict) - mask2.len_keep
    same = second.take_along_dim(place.clamp(min=0)[..., None], 1)
    return ops.scaled_cosine_loss(first, same, gamma=1.0, weight=(place >= 0).float())


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return PointCMAE(), (clouds(),)


if __name__ == "__main__":
    train(*example())
