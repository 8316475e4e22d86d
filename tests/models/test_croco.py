"""CroCo and CroCo v2 against plain formulas, and the names and shapes of their checkpoints."""

import pytest
import torch
from mae_from_paper import assert_exact, gradients
from plain_autoencoder import plain_forward, plain_latent

import fastmim
from fastmim import CroCo, Mask


def build(**changes) -> CroCo:
    torch.manual_seed(0)
    sizes = dict(img_size=(12, 8), patch_size=2, embed_dim=24, depth=2, num_heads=2)
    decoder = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
    model = CroCo(**sizes | decoder | changes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("position", ["sincos", "rope"])
def test_equals_the_plain_form(position):
    """The encoder is shared by both views."""
    model = build(pos_embed=position)
    images, others = torch.randn(2, 2, 3, 12, 8, dtype=torch.float64)
    out = model(images, context=model.encode(others))
    # int(0.9 · 24) = 21 are removed; facebookresearch/mae would keep int(24 · 0.1) = 2
    assert out.ids_keep.shape == (2, 3) and out.pred.shape == (2, 21, 12)
    mask = Mask(out.ids_keep, out.ids_predict, out.ids_restore, 24)
    context = torch.stack([plain_latent(model, other) for other in others])
    loss, predictions = plain_forward(model, images, mask, context)
    assert_exact(out.loss, loss)
    assert_exact(out.pred, torch.stack(predictions))
    assert_exact(gradients(out.loss, model), gradients(loss, model))


def public_shapes(width: int, depth: int, decoder: int, decoder_depth: int, tables: bool) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a checkpoint for 196 patches of 16 by 16."""
    shapes = {
        "mask_token": (1, 1, decoder), "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,),
        "decoder_embed.weight": (decoder, width), "decoder_embed.bias": (decoder,),
        "prediction_head.weight": (768, decoder), "prediction_head.bias": (768,),
    }  # fmt: skip
    if tables:
        shapes |= {"enc_pos_embed": (196, width), "dec_pos_embed": (196, decoder)}
    linears = {"attn.qkv": (1, 3), "attn.proj": (1, 1), "mlp.fc1": (1, 4), "mlp.fc2": (4, 1)}
    cross = {f"cross_attn.{name}": (1, 1) for name in ("projq", "projk", "projv", "proj")}
    stacks = [
        ("enc", width, depth, linears, ["norm1", "norm2"]),
        ("dec", decoder, decoder_depth, linears | cross, ["norm1", "norm2", "norm3", "norm_y"]),
    ]
    for side, dim, count, layers, norms in stacks:
        shapes |= {f"{side}_norm.{kind}": (dim,) for kind in ("weight", "bias")}
        for index in range(count):
            for name, (inside, outside) in layers.items():
                shapes[f"{side}_blocks.{index}.{name}.weight"] = outside * dim, inside * dim
                shapes[f"{side}_blocks.{index}.{name}.bias"] = (outside * dim,)
            for norm in norms:
                shapes |= {f"{side}_blocks.{index}.{norm}.{kind}": (dim,) for kind in ("weight", "bias")}
    return shapes


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("croco_vit_base_patch16", (768, 12, 512, 8, True)),
        ("croco2_vit_base_patch16", (768, 12, 768, 12, False)),
        ("croco2_vit_large_patch16", (1024, 24, 768, 12, False)),
    ],
)
def test_names_and_shapes_are_those_of_public_checkpoints(name, sizes):
    with torch.device("meta"):
        model = getattr(fastmim, name)()
    state = {name: torch.empty(shape, device="meta") for name, shape in public_shapes(*sizes).items()}
    model.load_state_dict(state, strict=True)
    state.pop("dec_blocks.0.cross_attn.projv.bias")
    with pytest.raises(RuntimeError, match=r"cross_attn\.projk\.bias"):
        model.load_state_dict(state, strict=True)


def test_public_values_go_where_they_belong():
    model = build()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("pos_embed", "decoder_pos_embed"):
        state[name.replace("decoder_", "dec_") if "decoder" in name else "enc_pos_embed"] = state.pop(name)[0]
    public = {}
    for name, value in state.items():
        parts = {name: value}
        if name.startswith("decoder_blocks."):
            if ".cross_attn.kv." in name:
                parts = {name.replace("kv", f"proj{part}"): half for part, half in zip("kv", value.chunk(2))}
            renames = ("norm2", "norm3"), ("norm_cross", "norm2"), ("norm_memory", "norm_y"), (".q.", ".projq.")
            for old, new in renames:
                parts = {key.replace(old, new): half for key, half in parts.items()} if old in name else parts
            parts = {key.replace("decoder_blocks", "dec_blocks"): half for key, half in parts.items()}
        public |= parts
    public = {
        key.replace("decoder_norm", "dec_norm").replace("decoder_pred", "prediction_head"): value
        for key, value in public.items()
    }
    public = {f"enc_{key}" if key.startswith(("blocks", "norm")) else key: value for key, value in public.items()}
    other = build()
    other.initialize_weights()
    other.load_state_dict(public, strict=True)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
