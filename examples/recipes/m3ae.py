"""M3AE. Chen et al., "Multi-modal masked autoencoders for medical vision-and-language pre-training", MICCAI 2022.

Masked: 75% of an image's patches, and 15% of its report's words, by a token in the encoder. Blocks of each side attend
to the other side. A decoder reconstructs pixels from states in the middle of these, a head the words from their end;
a classifier tells pairs of image and report from others.
Paid for visible and predicted tokens alone: the image's side, and the head of words. The text's side takes all words.
Differs: both encoders are small and start from random weights; the words' head is linear.
"""

import torch
import torch.nn.functional as F
from _train import SMALL, SMALL_DECODER, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking, ops
from fastmim.nn import Block, run_blocks


class M3AE(nn.Module):
    def __init__(self, image: fastmim.MaskedAutoencoder, num_words: int, depth: int) -> None:
        super().__init__()
        width, heads = image.embed_dim, image.num_heads
        self.image, self.mask_id = image, num_words
        self.words = nn.Embedding(num_words + 1, width)
        self.text = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.to_text, self.to_image = (
            nn.ModuleList(Block(width, heads, kv_dim=width) for _ in range(depth)) for _ in range(2)
        )
        self.word, self.match = nn.Linear(width, num_words), nn.Linear(2 * width, 2)

    def fuse(self, image: Tensor, text: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the image's states after half of the blocks, and those of image and text at the end."""
        middle = image
        for index, (image_block, text_block) in enumerate(zip(self.to_text, self.to_image)):
            image, text = (
                image_block(image, memory=text, memory_mask=real),
                text_block(text, memory=image, key_mask=real),
            )
            middle = image if index == len(self.to_text) // 2 - 1 else middle
        return middle, image, text

    def read(self, words: Tensor, real: Tensor) -> Tensor:
        return run_blocks(self.text, self.norm, self.words(words), key_mask=real)

    def forward(self, images: Tensor, words: Tensor, real: Tensor) -> Tensor:
        """Return the loss of images with reports, words (B, T), of which real (B, T) are not padding."""
        mask = masking.random(len(images), self.image.num_patches, 0.75, device=images.device)
        hidden = masking.random(*words.shape, 0.15, valid=real)  # a ragged mask: reports differ in length
        removed = torch.zeros_like(real).scatter(1, hidden.ids_predict, hidden.valid_predict)
        latent, text = self.image.encode(images, mask), self.read(words.masked_fill(removed, self.mask_id), real)
        middle, _, seen = self.fuse(latent, text, real)
        pixels = self.image.loss(self.image.decode(middle, mask), images, mask)
        logits = self.word(ops.gather_tokens(seen, hidden.ids_predict))
        target = words.gather(1, hidden.ids_predict).masked_fill(~hidden.valid_predict, -100)
        spelled = F.cross_entropy(logits.transpose(1, 2), target)
        own = torch.rand(len(images), device=images.device) < 0.5  # others get the next report
        other = torch.where(own, 0, 1) + torch.arange(len(own), device=own.device)
        other = other.remainder(len(own))
        _, image, seen = self.fuse(latent, text[other], real[other])
        matched = F.cross_entropy(self.match(torch.cat([image[:, 0], seen[:, 0]], 1)), own.long())
        return pixels + spelled + matched


def example() -> tuple[nn.Module, tuple]:
    """Return a small model, and a batch of pictures with reports of 8 to 15 words."""
    image = fastmim.MaskedAutoencoder(**SMALL, **SMALL_DECODER, norm_pix_loss=True)
    words = (torch.arange(8)[:, None] + torch.arange(15)).remainder(16)
    real = torch.arange(15) < torch.arange(8, 16)[:, None]
    return M3AE(image, num_words=16, depth=2), (pictures(), words, real)


if __name__ == "__main__":
    train(*example())
