"""Sizes, initial distributions, position tables and checkpoints of the masked autoencoder."""

import io
import math

import numpy as np
import pytest
import torch
from mae_from_paper import SIZES, build
from torch import nn

import fastmim
from fastmim import MaskedAutoencoderViT
from fastmim.models.positions import sincos_2d


@pytest.mark.parametrize("dim, grid", [(768, (14, 14)), (1280, (16, 16)), (32, (3, 5)), (12, (7, 1)), (4, (1, 1))])
def test_position_table_is_bit_equal(dim, grid):
    height, width = grid
    column, row = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))

    def encode(position):
        omega = np.arange(dim // 4, dtype=np.float64)
        omega /= dim / 4.0
        out = np.einsum("m,d->md", position.reshape(-1), 1.0 / 10000**omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    expected = np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)
    table = sincos_2d(dim, grid, num_prefix_tokens=1)
    assert table.dtype == torch.float32
    assert np.array_equal(table.numpy(), np.concatenate([np.zeros((1, dim), np.float32), expected]))


def test_position_tables_of_a_model_are_fixed():
    model = MaskedAutoencoderViT(**{**SIZES, "img_size": (24, 40)})
    for table, dim in ((model.pos_embed, 32), (model.decoder_pos_embed, 16)):
        assert not table.requires_grad
        assert torch.equal(table[0], sincos_2d(dim, (3, 5), num_prefix_tokens=1))


def test_initial_distributions():
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**{**SIZES, "embed_dim": 128, "decoder_embed_dim": 96})
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert weights["blocks.0.attn.qkv"].shape == (3 * 128, 128)  # one matrix: its fan differs from three
    weights["patch_embed.proj"] = model.patch_embed.proj.weight.flatten(1)
    for name, weight in weights.items():
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.99 * bound < weight.abs().max() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert bool((module.weight == 1).all()) and not module.bias.any() and module.eps == 1e-6
    assert 0 < model.patch_embed.proj.bias.abs().max() <= 1 / math.sqrt(3 * 8 * 8)
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.2) and abs(token.mean().item()) < 0.008


def test_initialize_weights_draws_all_anew():
    """A model materialised from the meta device gets its initial weights so."""
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.initialize_weights()
    assert [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()] == []


def checkpoint_shapes(
    *, embed_dim, depth, decoder_embed_dim, decoder_depth, patch_size, img_size, in_chans=3, **_
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict of facebookresearch/mae."""

    def pair(name, out, *into):
        return {f"{name}.weight": (out, *into), f"{name}.bias": (out,)}

    def blocks(name, dim, count):
        for i in range(count):
            for part, shape in {
                "norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim),
                "norm2": (dim,), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim),
            }.items():  # fmt: skip
                yield from pair(f"{name}.{i}.{part}", *shape).items()

    rows, width = (img_size // patch_size) ** 2 + 1, decoder_embed_dim
    return {
        "cls_token": (1, 1, embed_dim),
        "pos_embed": (1, rows, embed_dim),
        **pair("patch_embed.proj", embed_dim, in_chans, patch_size, patch_size),
        **dict(blocks("blocks", embed_dim, depth)),
        **pair("norm", embed_dim),
        **pair("decoder_embed", width, embed_dim),
        "mask_token": (1, 1, width),
        "decoder_pos_embed": (1, rows, width),
        **dict(blocks("decoder_blocks", width, decoder_depth)),
        **pair("decoder_norm", width),
        **pair("decoder_pred", patch_size**2 * in_chans, width),
    }


@pytest.mark.parametrize(
    "name, embed_dim, depth, heads, decoder_embed_dim, decoder_depth, decoder_heads",
    [
        ("tiny_patch16", 192, 12, 3, 192, 4, 6),
        ("small_patch16", 384, 12, 6, 256, 4, 8),
        ("base_patch16", 768, 12, 12, 512, 8, 16),
        ("large_patch16", 1024, 24, 16, 512, 8, 16),
        ("huge_patch14", 1280, 32, 16, 512, 8, 16),
    ],
)
def test_sizes(name, embed_dim, depth, heads, decoder_embed_dim, decoder_depth, decoder_heads):
    with torch.device("meta"):
        model = getattr(fastmim, f"mae_vit_{name}")(norm_pix_loss=True)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == checkpoint_shapes(
        embed_dim=embed_dim,
        depth=depth,
        decoder_embed_dim=decoder_embed_dim,
        decoder_depth=decoder_depth,
        patch_size=int(name[-2:]),
        img_size=224,
    )
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert {block.attn.num_heads for block in model.decoder_blocks} == {decoder_heads}
    assert model.norm_pix_loss


def test_a_model_is_built_on_the_device_of_the_context():
    with torch.device("meta"):
        model = MaskedAutoencoderViT(**SIZES)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.to_empty(device="cpu").initialize_weights()
    assert torch.equal(model.pos_embed, MaskedAutoencoderViT(**SIZES).pos_embed)


def test_a_checkpoint_loads_strictly():
    state = {key: torch.randn(shape) for key, shape in checkpoint_shapes(**SIZES).items()}
    model = MaskedAutoencoderViT(**SIZES)
    model.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "pos_embed",
        "decoder_pos_embed",
    ]


def test_saved_loaded_and_saved_again_is_identical():
    def saved(model):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        return file.getvalue()

    first = saved(build())
    other = MaskedAutoencoderViT(**SIZES)
    assert saved(other) != first
    other.load_state_dict(torch.load(io.BytesIO(first), weights_only=True))
    assert saved(other) == first
