"""CrossMAE against plain formulas, and the names and shapes of its checkpoints."""

import copy

import pytest
import torch
from mae_from_paper import assert_exact, gradients
from plain_autoencoder import plain_block, plain_encoder, plain_norm, plain_targets, rows
from torch import Tensor

import fastmim
from fastmim import CrossMAE, Mask, masking


def build(**changes) -> CrossMAE:
    torch.manual_seed(0)
    sizes = dict(img_size=(12, 8), patch_size=2, embed_dim=24, depth=3, num_heads=2)
    decoder = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
    model = CrossMAE(**sizes | decoder | changes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def plain_loss(model: CrossMAE, images: Tensor, mask: Mask) -> Tensor:
    errors = []
    for image, (keep, predict) in zip(images, rows(mask)):
        states = plain_encoder(model, image, keep)[0 if model.use_input else 1 :]
        x = model.mask_token[0] + model.decoder_pos_embed[0, 1:][predict]
        for block, weights in zip(model.decoder_blocks, model.mixture.weight):
            memory = sum(weight * state for weight, state in zip(weights, states, strict=True))
            x = plain_block(block, x, memory, None, None, None)
        pred = model.decoder_pred(plain_norm(model.decoder_norm, x))
        errors.append((pred - plain_targets(model, image, True)[predict]).square().mean(1))
    return torch.cat(errors).mean()


@pytest.mark.parametrize("use_input", [False, True])
def test_equals_the_plain_form(use_input):
    model, images = build(use_input=use_input), torch.randn(3, 3, 12, 8, dtype=torch.float64)
    mask = masking.random(3, 24, 0.75, decode_ratio=1 / 3)
    out = model(images, mask=mask)
    assert out.pred.shape == (3, 6, 12)
    expected = plain_loss(model, images, mask)
    assert_exact(out.loss, expected)
    assert_exact(gradients(out.loss, model), gradients(expected, model))
    model.set_grad_checkpointing()
    assert_exact(model(images, mask=mask).loss, expected)


def public_shapes(width: int, depth: int, decoder: int, hidden: int = 4) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a checkpoint for 196 patches of 16 by 16, with 12 decoder blocks."""
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, 197, width), "mask_token": (1, 1, decoder),
        "decoder_pos_embed": (1, 197, decoder), "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,), "wfm.linear.weight": (12, depth + 1),
        "decoder_pred.weight": (768, decoder), "decoder_pred.bias": (768,),
    }  # fmt: skip
    linears = {"mlp.fc1": (1, hidden), "mlp.fc2": (hidden, 1)}
    stacks = [
        ("blocks", width, depth, {"attn.qkv": (1, 3), "attn.proj": (1, 1), **linears}),
        ("decoder_blocks", decoder, 12, {"cross_attn.q": (1, 1), "cross_attn.proj": (1, 1), **linears}),
    ]
    for stack, dim, count, layers in stacks:
        for index in range(count):
            for name, (inside, outside) in layers.items():
                shapes[f"{stack}.{index}.{name}.weight"] = outside * dim, inside * dim
                shapes[f"{stack}.{index}.{name}.bias"] = (outside * dim,)
            shapes |= {f"{stack}.{index}.norm{i}.{kind}": (dim,) for i in (1, 2) for kind in ("weight", "bias")}
    for index in range(12):
        shapes[f"decoder_blocks.{index}.cross_attn.kv.weight"] = 2 * decoder, width
        shapes[f"decoder_blocks.{index}.cross_attn.kv.bias"] = (2 * decoder,)
        shapes |= {f"dec_norms.{index}.{kind}": (width,) for kind in ("weight", "bias")}
    return shapes | {f"decoder_norm.{kind}": (decoder,) for kind in ("weight", "bias")}


@pytest.mark.parametrize("name, sizes", [("small", (384, 12, 256)), ("large", (1024, 24, 512))])
def test_names_and_shapes_are_those_of_public_checkpoints(name, sizes):
    with torch.device("meta"):
        model = getattr(fastmim, f"crossmae_vit_{name}_patch16")()
    state = {name: torch.empty(shape, device="meta") for name, shape in public_shapes(*sizes).items()}
    model.load_state_dict(state, strict=True)
    assert "wfm.linear.weight" in state


def test_public_values_go_where_they_belong():
    model = build()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for block in range(2):
        for kind in ("weight", "bias"):
            state[f"dec_norms.{block}.{kind}"] = state.pop(f"decoder_blocks.{block}.norm_memory.{kind}")
            state[f"decoder_blocks.{block}.norm1.{kind}"] = state.pop(f"decoder_blocks.{block}.norm_cross.{kind}")
    state["wfm.linear.weight"] = state.pop("mixture.weight")
    other = copy.deepcopy(model)
    other.initialize_weights()
    holder = torch.nn.ModuleDict(dict(model=other))
    holder.load_state_dict({f"model.{name}": value for name, value in state.items()}, strict=True)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_bad_input():
    with pytest.raises(ValueError, match=r"states must be 4 tensors.*got 1"):
        build().mix([torch.zeros(1, 2, 24)])
    with pytest.raises(ValueError, match="depth and decoder_depth must be positive, got 0 and 2"):
        build(depth=0)
