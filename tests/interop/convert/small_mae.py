"""A small model of ours, and what the tests of checkpoints ask of its weights."""

import torch
from torch import Tensor, nn

from fastmim import MaskedAutoencoderViT

SIZES = dict(
    img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=1,
    decoder_num_heads=4, mlp_ratio=2.0,
)  # fmt: skip
HEADS = dict(num_heads=2, decoder_num_heads=4)


def build(**changes) -> MaskedAutoencoderViT:
    """A small model with every parameter that is trained away from its initial value."""
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**{**SIZES, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    assert found.keys() == weights.keys()
    return all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in weights.items())


def is_decoder(name: str) -> bool:
    return name.startswith("decoder_") or name == "mask_token"


def encoder_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in weights_of(model).items() if not is_decoder(name)}
