"""GraphMAE. Hou et al., "GraphMAE: self-supervised masked graph autoencoders", KDD 2022.

Masked: the features of half of the nodes. Most get a learned token, some those of another node. Before the decoder the
states of masked nodes are set to zero, so that only visible neighbours tell what they were.
Paid for masked nodes alone: decoder and scaled cosine error. The encoder's last layer is paid for visible nodes, its
first for all.
Differs: plain graph convolutions (Kipf and Welling, ICLR 2017) in place of graph attention.
"""

import torch
from _train import train
from torch import Tensor, nn

from fastmim import Mask, masking, ops


class GraphMAE(nn.Module):
    """Encoder of two graph convolutions, decoder of one; features (N, F), adjacency (N, N) with rows that sum to 1."""

    def __init__(self, features: int, width: int = 32, mask_ratio: float = 0.5, noise: float = 0.1) -> None:
        super().__init__()
        self.mask_ratio, self.noise = mask_ratio, noise
        self.mask_token = nn.Parameter(torch.zeros(features))
        self.first, self.second = nn.Linear(features, width), nn.Linear(width, width)
        self.act1, self.act2 = nn.PReLU(), nn.PReLU()
        self.encoder_to_decoder = nn.Linear(width, width, bias=False)
        self.decoder = nn.Linear(width, features)

    def corrupt(self, x: Tensor, masked: Tensor) -> Tensor:
        """Replace the features of masked nodes: the first ones by the token, the last by those of random nodes."""
        noisy = int(self.noise * len(masked))
        tokens, others = masked.split([len(masked) - noisy, noisy])
        drawn = torch.randint(len(x), (noisy,), device=x.device)
        return x.index_put((tokens,), self.mask_token).index_put((others,), x[drawn])

    def encode(self, x: Tensor, adjacency: Tensor, rows: Tensor) -> Tensor:
        """Return the states of the nodes `rows`."""
        return self.act2(self.second(adjacency[rows] @ self.act1(adjacency @ self.first(x))))

    def decode(self, hidden: Tensor, adjacency: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Predict masked nodes from the visible ones: re-masked states are zero, and so add nothing to a neighbour."""
        return self.decoder(adjacency[masked][:, visible] @ self.encoder_to_decoder(hidden))

    def forward(self, x: Tensor, adjacency: Tensor, mask: Mask | None = None) -> Tensor:
        mask = mask or masking.random(1, len(x), self.mask_ratio, device=x.device)
        visible, masked = mask.ids_keep[0], mask.ids_predict[0]
        hidden = self.encode(self.corrupt(x, masked), adjacency, visible)
        return ops.scaled_cosine_loss(self.decode(hidden, adjacency, visible, masked), x[masked], gamma=2.0)


def read_graph(nodes: int = 120, features: int = 16) -> tuple[Tensor, Tensor]:
    """Return features (N, F) of three communities, and the normalised adjacency (N, N), mostly within them."""
    community = torch.randint(3, (nodes,))
    x = torch.randn(3, features)[community] + 0.3 * torch.randn(nodes, features)
    chance = torch.where(community[:, None] == community, 0.2, 0.01)
    linked = torch.triu(torch.rand(nodes, nodes) < chance, 1)
    linked = (linked | linked.T | torch.eye(nodes, dtype=torch.bool)).float()
    return x, linked / linked.sum(1, keepdim=True)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return GraphMAE(features=16), read_graph()


if __name__ == "__main__":
    train(*example())
