"""HiCMAE. Sun et al., "HiCMAE: hierarchical contrastive masked autoencoder for self-supervised audio-visual emotion
recognition", Information Fusion 2024.

Masked: 90% of a clip, in tubes, and 80% of its spectrogram. Pooled states of several blocks of both encoders are
contrasted; fusion blocks attend to the other side; each decoder block attends to the states of one encoder block. The
target of the second frame of each pair is its difference to the first.
Paid for visible and predicted patches alone: everything but the difference of frames.
Differs: sizes; 75% of the small clip is masked.
"""

import torch
from _train import SMALL, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import losses, masking, ops
from fastmim.nn import Block, run_blocks


class Side(nn.Module):
    """Encoder, fusion blocks and decoder of one modality."""

    def __init__(self, encoder: fastmim.Encoder, taps: tuple[int, ...]) -> None:
        super().__init__()
        width, heads = encoder.embed_dim, encoder.num_heads
        self.encoder, self.taps = encoder, taps
        self.fusion = Block(width, heads, kv_dim=width)
        self.decoder = nn.ModuleList(Block(width, heads, kv_dim=width) for _ in taps)
        self.norm = nn.LayerNorm(width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.pred = nn.Linear(width, encoder.patch_embed.proj.weight[0].numel())

    def loss(self, tokens: Tensor, states: list[Tensor], mask: masking.Mask, target: Tensor) -> Tensor:
        """Return the loss of the patches decoded from fused tokens and the encoder's states."""
        table = self.encoder.pos_embed[0]
        tokens = ops.decoder_tokens(tokens, mask.ids_keep, mask.ids_predict, self.mask_token, table)
        count = mask.ids_predict.shape[1]
        pred = run_blocks(self.decoder, self.norm, tokens, memory=states[::-1], num_queries=count, head=self.pred)
        return ops.pixel_loss(pred, target, mask.ids_predict, self.encoder.patch_size)


class HiCMAE(nn.Module):
    def __init__(self, video: Side, audio: Side, video_ratio: float = 0.9) -> None:
        super().__init__()
        self.video, self.audio, self.video_ratio = video, audio, video_ratio

    def forward(self, clips: Tensor, sounds: Tensor) -> Tensor:
        """Return the loss of clips (B, C, T, H, W) with spectrograms (B, 1, F, T)."""
        sides, inputs = (self.video, self.audio), (clips, sounds)
        masks = (
            masking.tube(len(clips), self.video.encoder.grid_size, self.video_ratio, device=clips.device),
            masking.random(len(sounds), self.audio.encoder.num_patches, 0.8, device=sounds.device),
        )
        (video, looks), (audio, hears) = (
            side.encoder.encode(x, mask, taps=side.taps) for side, x, mask in zip(sides, inputs, masks)
        )
        levels = zip(looks, hears)
        alike = sum(losses.info_nce(a.mean(1), b.mean(1), temperature=0.07, symmetric=True) for a, b in levels)
        fused = self.video.fusion(video, memory=audio), self.audio.fusion(audio, memory=video)
        targets = frame_differences(clips), sounds
        pixels = sum(map(Side.loss, sides, fused, (looks, hears), masks, targets))
        return pixels + 0.0025 * alike


def frame_differences(clips: Tensor) -> Tensor:
    """Return clips (B, C, T, H, W) whose odd frames are replaced by their difference to the frame before."""
    first, second = clips.unflatten(2, (-1, 2)).unbind(3)
    return torch.stack([first, second - first], 3).flatten(2, 3)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model, and a batch of clips with spectrograms."""
    sizes = dict(SMALL, num_prefix_tokens=0)
    video = fastmim.Encoder(**{**sizes, "img_size": (4, 32, 32), "patch_size": (2, 8, 8)})
    audio = fastmim.Encoder(**sizes, in_chans=1)
    clips = pictures(8, channels=12).unflatten(1, (3, 4))
    return HiCMAE(Side(video, (0, 1)), Side(audio, (0, 1)), 0.75), (clips, clips[:, 0, :1])


if __name__ == "__main__":
    train(*example())
