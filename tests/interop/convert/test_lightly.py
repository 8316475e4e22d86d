"""Models loaded from lightly's masked autoencoders compute the same features and predictions."""

import warnings

import pytest
import torch
from small_mae import HEADS
from torch import Tensor, nn

from fastmim import load


class MAE(nn.Module):
    """Model of lightly's examples; the decoder contains the linear layers (older) or they are beside it."""

    def __init__(self, timm, modules, *, older: bool) -> None:
        super().__init__()
        vit = timm.models.VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
        self.backbone = modules.MaskedVisionTransformerTIMM(vit=vit)
        self.older = older
        if older:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.decoder = modules.MAEDecoderTIMM(
                    num_patches=16, patch_size=8, embed_dim=32, decoder_embed_dim=16, decoder_depth=2,
                    decoder_num_heads=4,
                )  # fmt: skip
        else:
            self.decoder_embed = nn.Linear(32, 16)
            self.decoder = modules.MaskedVisionTransformerDecoderTIMM(
                num_patches=16, embed_dim=16, depth=2, num_heads=4
            )
            self.prediction_head = nn.Linear(16, 192)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)

    def predict(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict all patches in grid order, from the class token and the visible patches."""
        embed = self.decoder.embed if self.older else self.decoder_embed
        tokens = embed(latent)
        masked = self.decoder.mask_token.expand(len(tokens), 17 - tokens.shape[1], -1)
        patches = torch.cat([tokens[:, 1:], masked], dim=1)
        patches = patches.gather(1, ids_restore[..., None].expand_as(patches))
        decoded = torch.cat([tokens[:, :1], patches], dim=1)
        if self.older:
            return self.decoder.predict(self.decoder.decode(decoded))[:, 1:]
        return self.prediction_head(self.decoder.decode(self.decoder.add_pos_embed(decoded)))[:, 1:]


@pytest.fixture(params=[True, False], ids=["MAEDecoderTIMM", "MaskedVisionTransformerDecoderTIMM"])
def theirs(request, timm, lightly_modules):
    return MAE(timm, lightly_modules, older=request.param).double()


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_features_and_predictions_agree(theirs, tmp_path, key):
    state = theirs.state_dict()
    torch.save(state if key is None else {key: state, "epoch": 1}, tmp_path / "mae.ckpt")
    ours = load(tmp_path / "mae.ckpt", **HEADS)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(ours.forward_features(images), theirs.backbone.encode(images), rtol=1e-9, atol=1e-12)

    out = ours(images, noise=torch.rand(2, 16), predict="all")
    # lightly's ids count the class token
    keep = torch.cat([torch.zeros(2, 1, dtype=torch.int64), out.ids_keep + 1], dim=1)
    latent = theirs.backbone.encode(images, idx_keep=keep)
    assert torch.allclose(out.pred, theirs.predict(latent, out.ids_restore), rtol=1e-9, atol=1e-12)


def test_every_bit_is_kept_but_the_unused_mask_token(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "mae.pth")
    ours = load(tmp_path / "mae.pth", **HEADS).state_dict()
    kept = [value for name, value in theirs.state_dict().items() if name != "backbone.mask_token"]
    assert len(kept) == len(ours)
    assert all(any(value.equal(found) for found in ours.values()) for value in kept)


def test_leftovers_are_named(theirs, tmp_path):
    torch.save({**theirs.state_dict(), "classifier.weight": torch.zeros(3, 32)}, tmp_path / "mae.pth")
    with pytest.raises(ValueError, match=r"missing \[\], left over \['classifier\.weight'\]"):
        load(tmp_path / "mae.pth", **HEADS)
    load(tmp_path / "mae.pth", **HEADS, allow_leftover="classifier.*")
