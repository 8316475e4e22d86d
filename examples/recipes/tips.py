"""TIPS. Maninis et al., "TIPS: text-image pretraining with spatial awareness", ICLR 2025.

Masked: rectangles that cover half of the patches, for one of four losses: a moving average's assignment of each removed
patch to prototypes (iBOT). The others are CLIP's, of two class tokens with two captions (from the web, and synthetic),
and the average's assignment of a small crop to prototypes (DINO).
Paid for visible and predicted patches alone: of the masked pass, embedding, and of the last block all but keys and
values; head and loss. The unmasked passes, of the student and of the average, take all patches.
Differs: assignments are centred by their mean over the batch; the crop is a quarter of the image, enlarged.
"""

import copy

import torch
import torch.nn.functional as F
from _train import SMALL, move, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import losses, masking, ops
from fastmim.nn import Block, run_blocks


class Text(nn.Module):
    """Transformer on words (B, T), averaged to (B, D)."""

    def __init__(self, num_words: int, dim: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(num_words, dim), nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))

    def forward(self, words: Tensor) -> Tensor:
        return run_blocks(self.blocks, self.norm, self.words(words)).mean(1)


def assigned(logits: Tensor, taught: Tensor) -> Tensor:
    """Return the cross-entropy of logits (R, C) with a teacher's, which are centred and sharpened."""
    return F.cross_entropy(logits / 0.1, ((taught - taught.mean(0)) / 0.04).softmax(1))


class TIPS(nn.Module):
    def __init__(self, model: fastmim.MaskedAutoencoder, text: Text, momentum: float) -> None:
        super().__init__()
        self.student = nn.ModuleDict(
            dict(model=model, image=nn.Linear(model.embed_dim, model.decoder_pred.out_features))
        )
        self.average = copy.deepcopy(self.student).requires_grad_(False)
        self.text, self.momentum = text, momentum

    def forward(self, images: Tensor, web: Tensor, synthetic: Tensor) -> Tensor:
        model, target = self.student["model"], self.average["model"]
        mask = masking.blocks(len(images), model.grid_size, model.num_patches // 2, device=images.device)
        classes = model.encode(images)[:, :2]
        pairs = zip(classes.unbind(1), (web, synthetic))
        clip = (
            sum(losses.info_nce(image, self.text(words), temperature=0.1, symmetric=True) for image, words in pairs) / 2
        )
        with torch.no_grad():
            whole = target.encode(images)
            taught = target.decoder_pred(ops.gather_tokens(whole[:, 2:], mask.ids_predict)).flatten(0, 1)
            seen = self.average["image"](whole[:, 0])
        ibot = assigned(model.predict(images, mask).flatten(0, 1), taught)
        top, left = torch.randint(model.img_size[0] // 2 + 1, (2,)).tolist()
        crop = images[..., top : top + model.img_size[0] // 2, left : left + model.img_size[1] // 2]
        local = model.encode(F.interpolate(crop, model.img_size, mode="bilinear"))[:, 0]
        return clip + ibot + assigned(self.student["image"](local), seen)

    def after_update(self) -> None:
        move(self.average, self.student, self.momentum)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model, and a batch of pictures with two captions each."""
    model = fastmim.MaskedAutoencoder(**SMALL, decoder=None, num_prefix_tokens=2, out_dim=16)
    words = torch.arange(8)[:, None]
    web, synthetic = (words * 3 + torch.randint(3, (8, 6)) for _ in range(2))
    return TIPS(model, Text(24, 32, 2, 1), momentum=0.99), (pictures(), web, synthetic)


if __name__ == "__main__":
    train(*example())
