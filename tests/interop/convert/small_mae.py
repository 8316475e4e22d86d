"""Small MaskedAutoencoderViT of the checkpoint tests, and helpers for its weights."""

import torch
from torch import Tensor, nn

from fastmim import MaskedAutoencoderViT

SIZES = dict(
    img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=1,
    decoder_num_heads=4, mlp_ratio=2.0,
)  # fmt: skip
HEADS = dict(num_heads=2, decoder_num_heads=4)


def build(**changes) -> MaskedAutoencoderViT:
    """Build a small model with all trained parameters moved away from their initial values."""
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**{**SIZES, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def random_(module: nn.Module) -> nn.Module:
    """Move all parameters away from their initial values."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(model: nn.Module | dict[str, Tensor], weights: nn.Module | dict[str, Tensor]) -> bool:
    """Return whether two models or state dicts have equal weights, in the same dtypes."""
    found, expected = (x.state_dict() if isinstance(x, nn.Module) else x for x in (model, weights))
    assert found.keys() == expected.keys()
    return all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items())


def is_decoder(name: str) -> bool:
    return name.startswith("decoder_") or name == "mask_token"


def encoder_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in weights_of(model).items() if not is_decoder(name)}
