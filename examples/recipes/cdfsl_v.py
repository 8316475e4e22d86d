"""CDFSL-V. Samarasinghe et al., "CDFSL-V: cross-domain few-shot learning for videos", ICCV 2023.

Masked: first, 90% of the patches of clips of two domains, in tubes: VideoMAE on both, without labels. Then a curriculum
moves from labels of the source domain to the target domain, on which the model is to agree with its own average; there
nothing is masked.
Paid for visible patches alone: the encoder of the first stage; for visible and predicted ones its decoder. The second
stage encodes whole clips.
Differs: the curriculum is linear, while their code weighs both terms equally and lowers the learning rate of the
classifier; noise stands for strong augmentation. Agreement is as there: the cross-entropy to the average's classes of
the weakly augmented clip, sharpened by 0.1.
"""

import copy

import torch
import torch.nn.functional as F
from _train import move, train
from torch import Tensor, nn

import fastmim


class CDFSLV(nn.Module):
    """Both stages; `second_stage()` goes on to the second, of `total_steps` steps."""

    def __init__(self, model: fastmim.VideoMAE, classes: int, total_steps: int, momentum: float = 0.99) -> None:
        super().__init__()
        self.student = nn.ModuleList([model, nn.Linear(model.embed_dim, classes)])
        self.total_steps, self.momentum = total_steps, momentum
        self.average: nn.ModuleList | None = None

    def second_stage(self) -> None:
        self.average, self.step = copy.deepcopy(self.student).requires_grad_(False), 0

    def reconstruct(self, source: Tensor, target: Tensor) -> Tensor:
        """Return the loss of the first stage, of both domains in one batch."""
        return self.student[0](torch.cat([source, target]), mask_ratio=0.9).loss

    def curriculum(self, source: Tensor, labels: Tensor, target: Tensor, progress: float) -> Tensor:
        """Return the loss of the second stage: of labels at progress 0, of agreement on the target domain at 1."""
        with torch.no_grad():
            agreed = (classify(self.average, target) / 0.1).softmax(1)
        logits = classify(self.student, torch.cat([source, target + 0.1 * torch.randn_like(target)]))
        of_source, of_target = logits.split([len(source), len(target)])
        return (1 - progress) * F.cross_entropy(of_source, labels) + progress * F.cross_entropy(of_target, agreed)

    def forward(self, source: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        if self.average is None:
            return self.reconstruct(source, target)
        return self.curriculum(source, labels, target, min(self.step / self.total_steps, 1))

    def after_update(self) -> None:
        if self.average is not None:
            self.step += 1
            move(self.average, self.student, self.momentum)


def classify(model: nn.ModuleList, clips: Tensor) -> Tensor:
    """Return the logits of whole clips, from the mean of their patches."""
    encoder, head = model
    return head(encoder.encode(clips).mean(1))


def read_domain(batch: int, level: float) -> tuple[Tensor, Tensor]:
    """Return clips (B, 3, 4, 16, 16) of stripes that move, around `level`, and which of 2 directions they move in."""
    labels, line = torch.randint(2, (batch,)), torch.arange(16)
    time = torch.arange(4)[:, None, None] * (2 * labels - 1).view(-1, 1, 1, 1, 1)
    return (level + torch.sin(0.7 * (line + time) + torch.rand(batch, 3, 1, 1, 1))).expand(-1, 3, -1, 16, -1), labels


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch: clips of the source domain with labels, and clips of the target domain."""
    decoder = dict(decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)
    model = fastmim.VideoMAE((4, 16, 16), (2, 4, 4), 3, 48, 2, 4, **decoder)
    return CDFSLV(model, classes=2, total_steps=20), (*read_domain(4, 0.0), read_domain(4, 1.0)[0])


if __name__ == "__main__":
    model, batch = example()
    train(model, batch)
    model.second_stage()
    train(model, batch)
