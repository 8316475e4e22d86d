"""VideoMAE and VideoMAE V2 against plain formulas."""

import math

import pytest
import torch
from mae_from_paper import assert_exact, gradients
from plain_autoencoder import plain_blocks, plain_latent, plain_norm, rows
from torch import Tensor

from fastmim import Mask, VideoMAE

MEAN, STD = ((torch.tensor(x, dtype=torch.float64)) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def build(**changes) -> VideoMAE:
    torch.manual_seed(0)
    sizes = dict(img_size=(8, 16, 8), patch_size=(2, 4, 2), embed_dim=24, depth=2, num_heads=2)
    decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    model = VideoMAE(**sizes | decoder | changes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def plain_predict(model: VideoMAE, video: Tensor, keep: Tensor, predict: Tensor) -> Tensor:
    """Decode [visible; mask tokens], each with its position; a patch that is visible and predicted has two tokens."""
    table = model.decoder_pos_embed[0]
    visible = plain_latent(model, video, keep) @ model.decoder_embed.weight.T + table[keep]
    tokens = torch.cat([visible, model.mask_token[0] + table[predict]])
    out = plain_blocks(model.decoder_blocks, tokens)[-1][len(keep) :]
    return model.decoder_pred(plain_norm(model.decoder_norm, out))


def plain_loss(model: VideoMAE, videos: Tensor, mask: Mask) -> Tensor:
    """Return the mean error of predicted patches that are hidden, of pixels in 0..1 normalised in each channel."""
    errors = []
    for video, (keep, predict) in zip(videos, rows(mask)):
        pixels = (video * STD.view(3, 1, 1, 1) + MEAN.view(3, 1, 1, 1)).reshape(3, 4, 2, 4, 4, 4, 2)
        cubes = pixels.permute(1, 3, 5, 2, 4, 6, 0).reshape(64, 16, 3)
        if model.norm_pix_loss:
            cubes = (cubes - cubes.mean(1, keepdim=True)) / (cubes.std(1, keepdim=True) + 1e-6)
        pred = plain_predict(model, video, keep, predict)
        hidden = ~torch.isin(predict, keep)
        errors.append((pred - cubes.flatten(1)[predict]).square().mean(1)[hidden])
    return torch.cat(errors).mean()


@pytest.mark.parametrize("norm", ["channel", False])
@pytest.mark.parametrize("decode_ratio", [1.0, 0.5])
def test_equals_the_paper(decode_ratio, norm):
    """VideoMAE, and VideoMAE V2, whose decoder sees half of all patches, some of them visible too."""
    model, videos = build(norm_pix_loss=norm), torch.randn(3, 3, 8, 16, 8, dtype=torch.float64)
    out = model(videos, 0.75, decode_ratio)
    mask = Mask(out.ids_keep, out.ids_predict, out.ids_restore, 64)
    frames = out.mask.view(3, 4, 16)
    assert torch.equal(frames, frames[:, :1].expand(-1, 4, -1)) and (frames.sum(2) == 12).all()
    assert out.pred.shape[1] == (48 if decode_ratio == 1 else 32)
    assert torch.isin(out.ids_predict[0], out.ids_keep[0]).any() == (decode_ratio < 1)
    expected = plain_loss(model, videos, mask)
    assert_exact(out.loss, expected)
    assert_exact(gradients(out.loss, model), gradients(expected, model))


def test_positions_are_of_one_axis():
    table = build().pos_embed[0]
    for patch, column in ((5, 0), (5, 1), (63, 6), (63, 23)):
        angle = patch / 10000 ** (2 * (column // 2) / 24)
        assert math.isclose(table[patch, column], (math.cos if column % 2 else math.sin)(angle), abs_tol=1e-6)


def test_uint8_videos_and_pictures():
    """Integers have the loss of the same videos, normalised; pictures of perfect predictions are the videos."""
    model = build(norm_pix_loss=False)
    videos = torch.randint(0, 256, (2, 3, 8, 16, 8), dtype=torch.uint8)
    floating = (videos / 255.0 - MEAN.view(3, 1, 1, 1)) / STD.view(3, 1, 1, 1)
    noise = torch.rand(2, 64)
    out = model(videos, 0.75, noise=noise)
    torch.testing.assert_close(out.loss, model(floating, 0.75, noise=noise).loss, rtol=1e-5, atol=1e-5)
    out.pred = model.patchify(videos / 255.0).gather(1, out.ids_predict[..., None].expand_as(out.pred))
    torch.testing.assert_close(model.reconstruct(videos, out), videos / 255.0)
    torch.testing.assert_close(model.reconstruct(floating, out), videos / 255.0)
