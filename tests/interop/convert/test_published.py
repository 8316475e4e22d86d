"""fastmim.load on checkpoints of systems by name, published ones and fastmim's own: class, settings and results."""

import re
from argparse import Namespace

import pytest
import torch
from small_mae import random_, same_bits
from torch import Tensor

import fastmim
from fastmim import load, to_videomae

SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
DECODER = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=4)
HEADS = dict(num_heads=2, decoder_num_heads=4)


# ---- published names, from fastmim's ---------------------------------------------------------------------------------


def croco(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        name = re.sub(r"^(blocks|norm)\.", r"enc_\1.", name)
        name = re.sub(r"^decoder_(blocks|norm)\.", r"dec_\1.", name).replace("decoder_pred", "prediction_head")
        name = name.replace("norm2", "norm3") if name.startswith("dec_") else name
        name = name.replace("norm_cross", "norm2").replace("norm_memory", "norm_y").replace(".q.", ".projq.")
        if name.endswith("pos_embed"):
            name, value = {"pos_embed": "enc_pos_embed"}.get(name, "dec_pos_embed"), value[0]
        if ".kv." in name:
            found |= {name.replace("kv", f"proj{letter}"): half.clone() for letter, half in zip("kv", value.chunk(2))}
        else:
            found[name] = value
    return found


def crossmae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        name = re.sub(r"decoder_blocks\.(\d+)\.norm_memory", r"dec_norms.\1", name).replace("mixture", "wfm.linear")
        found[name.replace("norm_cross", "norm1")] = value
    return found


def cropmae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        if name.startswith("decoder_blocks."):
            name = name.replace("norm2", "norm3").replace("norm_cross", "norm2")
            name = re.sub(r"mlp\.fc(.)", r"linear\1", name).replace("attn.proj", "attn.out_proj")
            name = name.replace(".attn.qkv.", ".attn.in_proj_").replace(".attn.", ".self_attn.")
            name = name.replace("cross_attn.", "multihead_attn.")
            if ".q." in name:
                other = state[
                    re.sub(r"\.(norm.|linear.).*", "", name).replace("multihead", "cross").replace(".q.", ".kv.")
                ]
                name, value = name.replace(".q.", ".in_proj_"), torch.cat([value, other])
            if ".kv." in name:
                continue
        found[name] = value
    return found


def simmim(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {"encoder.rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long)}
    for name, value in state.items():
        name = re.sub(r"ls([12])\.gamma", r"gamma_\1", name)
        if name.startswith("decoder_pred."):
            # from the order (*patch, c) to (c, *patch)
            order = torch.arange(192).view(8, 8, 3).permute(2, 0, 1).flatten()
            value = value[order][..., None, None] if name.endswith("weight") else value[order]
            found[f"decoder.0.{name.rpartition('.')[2]}"] = value
        elif name.endswith("qkv.bias"):
            q, _, v = value.chunk(3)
            found |= {"encoder." + name.replace("qkv.bias", f"{k}_bias"): x.clone() for k, x in (("q", q), ("v", v))}
        else:
            found[f"encoder.{name}"] = value
    return found


SYSTEMS = {
    "mae": (lambda: fastmim.MaskedAutoencoderViT(**SIZES, **DECODER), dict),
    "pixio": (lambda: fastmim.Pixio(cell=2, **SIZES, **DECODER), dict),
    "crossmae": (lambda: fastmim.CrossMAE(**SIZES, **DECODER), crossmae),
    "crossmae without input": (lambda: fastmim.CrossMAE(use_input=False, **SIZES, **DECODER), crossmae),
    "croco": (lambda: fastmim.CroCo(**SIZES, **DECODER), croco),
    "croco2": (lambda: fastmim.CroCo(pos_embed="rope", **SIZES, **DECODER), croco),
    "cropmae": (lambda: fastmim.CropMAE(**SIZES, **DECODER), cropmae),
    "simmim": (lambda: fastmim.SimMIM(**SIZES), simmim),
    "videomae": (
        lambda: fastmim.VideoMAE(**SIZES | dict(img_size=(4, 32, 32), patch_size=(2, 8, 8)), **DECODER),
        None,
    ),
}


def build(system: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = SYSTEMS[system][0]()
    tables = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("pos_embed")}
    model = random_(model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                parameter.copy_(tables[name])
            if name.endswith("attn.qkv.bias") and system in ("simmim", "videomae"):
                parameter.chunk(3)[1].zero_()
    return model


def arguments(system: str) -> dict:
    """Return what no tensor says."""
    heads = {} if system == "simmim" else dict(HEADS)
    heads |= dict(cell=2) if system == "pixio" else {}
    sizes = {"croco2": dict(img_size=32), "videomae": dict(img_size=(4, 32, 32))}
    return heads | sizes.get(system, {})


def step(model: torch.nn.Module, images: Tensor) -> Tensor:
    torch.manual_seed(1)
    context = {"context": model.encode(images.flip(0))} if model.decoder == "both" else {}
    noise = torch.rand(len(images), model.num_patches)
    mask = fastmim.masking.random(len(images), model.num_patches, 0.75, noise=noise)
    return model(images, mask=mask, **context).loss


@pytest.mark.parametrize("form", ["published", "own"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_class_settings_and_results(system, form, tmp_path):
    model = build(system)
    rename = SYSTEMS[system][1]
    public = to_videomae(model) if rename is None else rename(model.state_dict())
    assert form == "own" or system in ("mae", "pixio") or public.keys() != model.state_dict().keys()
    torch.save({"model": public if form == "published" else model.state_dict()}, tmp_path / "file.pth")
    found = load(tmp_path / "file.pth", **arguments(system)).eval()
    assert type(found) is type(model) and same_bits(found, model)
    images = torch.randn(2, 3, *model.img_size)
    assert torch.equal(step(found, images), step(model, images))
    assert (found.norm_pix_loss, found.error) == (model.norm_pix_loss, model.error)


@pytest.mark.parametrize("system", ["pixio", "simmim"])
def test_encoders_alone(system, tmp_path):
    model = build(system)
    weights = model.state_dict() if system == "pixio" else simmim(model.state_dict())
    weights = {name: value for name, value in weights.items() if not name.startswith("decoder")}
    torch.save(weights, tmp_path / "file.pth")
    heads = dict(HEADS, decoder_embed_dim=16, decoder_depth=1, cell=2) if system == "pixio" else {}
    found = load(tmp_path / "file.pth", allow_missing="decoder", **heads)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(found.encode(images), model.encode(images))


def test_settings_beside_the_weights(tmp_path):
    """Training arguments of CrossMAE, and CroCo's own description of its models."""
    torch.save({"model": build("crossmae").state_dict(), "args": Namespace(norm_pix_loss=False)}, tmp_path / "a.pth")
    assert load(tmp_path / "a.pth", **HEADS).norm_pix_loss is False
    kwargs = dict(enc_num_heads=2, dec_num_heads=4, img_size=(32, 32), pos_embed="RoPE100")
    state = croco(build("croco2").state_dict())
    torch.save({"model": state, "croco_kwargs": kwargs}, tmp_path / "b.pth")
    found = load(tmp_path / "b.pth")
    assert (found.num_heads, found.decoder_num_heads, found.img_size) == (2, 4, (32, 32))
    torch.save({"model": state, "croco_kwargs": kwargs | dict(pos_embed="RoPE10")}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"rotary positions of base 100.* got RoPE10$"):
        load(tmp_path / "c.pth")


def test_other_grids(tmp_path):
    """Tables with no row for class tokens, or with eight, are interpolated behind those rows."""
    for system, prefix in (("croco", 0), ("pixio", 8)):
        model = build(system)
        torch.save(model.state_dict(), tmp_path / "file.pth")
        found = load(tmp_path / "file.pth", img_size=(32, 64), **arguments(system))
        assert found.grid_size == (4, 8) and torch.equal(found.pos_embed[:, :prefix], model.pos_embed[:, :prefix])
    torch.save(build("simmim").state_dict(), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"relative_position_bias_table must have shape \(108, 2\), got \(52, 2\)"):
        load(tmp_path / "file.pth", img_size=(32, 64))


TITLES = {"crossmae without input": "CrossMAE", "croco2": "CroCo v2"}


@pytest.mark.parametrize("system", SYSTEMS)
def test_another_system_is_named(system):
    """In one line, for each pair of systems, by published names and fastmim's."""
    own = build(system)
    title = TITLES.get(system, type(own).__name__)
    for other, (_, rename) in SYSTEMS.items():
        model = build(other)
        theirs = TITLES.get(other, type(model).__name__)
        if theirs == title:
            continue
        public = to_videomae(model) if rename is None else rename(model.state_dict())
        for state in (public, model.state_dict()):
            with pytest.raises(ValueError) as caught:
                own.load_state_dict(state, strict=True)
            assert str(caught.value) == f"the weights must be of a {title}, got those of a {theirs}"


def test_swin_transformers_are_refused(tmp_path):
    state = {"encoder.patch_embed.proj.weight": torch.zeros(8, 3, 4, 4), "decoder.0.weight": torch.zeros(3072, 8, 1, 1)}
    state["encoder.layers.0.blocks.0.norm1.weight"] = torch.zeros(8)
    torch.save({"model": state}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"is of a Swin transformer, which fastmim does not have$"):
        load(tmp_path / "file.pth")
