"""CropMAE against PyTorch's own attention and plain formulas, and the names and shapes of its checkpoints."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from mae_from_paper import assert_exact, gradients
from plain_autoencoder import plain_latent, plain_norm, plain_targets, ragged, rows
from torch import Tensor, nn

import fastmim
from fastmim import CropMAE, Mask, Patches, masking, ops

# what fullgraph asks for is found out before anything is compiled, which takes a minute
COMPILER = "inductor" if os.environ.get("FASTMIM_TEST_ALL") else "aot_eager"


def build(**changes) -> CropMAE:
    torch.manual_seed(0)
    sizes = dict(img_size=(12, 8), patch_size=2, embed_dim=24, depth=2, num_heads=2)
    decoder = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2, decoder_mlp_ratio=3, dropout=0)
    model = CropMAE(**sizes | decoder | changes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def crops(dtype=torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 3, 12, 8, dtype=dtype).unbind(0)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, proj: nn.Linear, seen: Tensor | None = None) -> Tensor:
    """Attend in two heads; q (S, D), k and v (Sm, D)."""
    q, k, v = (x.unflatten(1, (2, -1)).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.mT / q.shape[2] ** 0.5
    scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
    return proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


def plain_predict(model: CropMAE, image: Tensor, other: Tensor, keep: Tensor, predict: Tensor) -> Tensor:
    """Predict all patches of a crop (C, H, W): (L, P), decoding them in grid order."""
    visible, memory = (
        model.decoder_embed(plain_latent(model, image, keep)),
        model.decoder_embed(plain_latent(model, other)),
    )
    x = model.mask_token[0].expand(24, -1).index_copy(0, keep, visible[1:])
    x = torch.cat([visible[:1], x]) + model.decoder_pos_embed[0]
    seen = torch.zeros(25, dtype=torch.bool).index_fill(0, torch.cat([keep, predict]) + 1, True)
    seen[0] = True
    for block in model.decoder_blocks:
        cross = block.cross_attn
        mixed = plain_attention(cross.q(x), *cross.kv(memory).chunk(2, 1), cross.proj)
        x = plain_norm(block.norm_cross, x + mixed)
        x = plain_norm(block.norm2, x + block.mlp.fc2(F.gelu(block.mlp.fc1(x))))
        x = plain_norm(block.norm1, x + plain_attention(*block.attn.qkv(x).chunk(3, 1), block.attn.proj, seen))
    return model.decoder_pred(plain_norm(model.decoder_norm, x)[1:])


def plain_loss(model: CropMAE, images: Tensor, others: Tensor, mask: Mask) -> Tensor:
    errors = []
    for image, other, (keep, predict) in zip(images, others, rows(mask)):
        pred = plain_predict(model, image, other, keep, predict)[predict]
        errors.append((pred - plain_targets(model, image, True)[predict]).square().mean(1))
    return torch.cat(errors).mean()


@pytest.mark.parametrize("kind", ["two", "some", "ragged"])
def test_equals_the_plain_form(kind):
    model, (images, others) = build(), crops()
    mask = {"two": None, "some": masking.random(3, 24, 0.8, decode_ratio=0.5), "ragged": ragged(model)}[kind]
    out = model(images, 0.9, mask=mask, context=model.encode(others))
    if mask is None:
        assert out.ids_keep.shape == (3, 2)
        mask = Mask(out.ids_keep, out.ids_predict, out.ids_restore, 24)
    expected = plain_loss(model, images, others, mask)
    assert_exact(out.loss, expected)
    assert_exact(gradients(out.loss, model), gradients(expected, model))
    model.set_grad_checkpointing()
    assert_exact(model(images, mask=mask, context=model.encode(others)).loss, expected)


def test_float32_agrees_with_the_plain_form():
    model, (images, others) = build(), crops()
    mask = masking.random(3, 24, 0.9)
    expected = plain_loss(model, images, others, mask)
    single = copy.deepcopy(model).float()
    out = single(images.float(), mask=mask, context=single.encode(others.float()))
    assert (out.loss - expected).abs() <= 1e-5 * expected
    wanted = gradients(expected, model)
    for name, found in gradients(out.loss, single).items():
        assert (found - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_two_patches_of_196_are_visible():
    """1.5% in the published runs, counted as in facebookresearch/mae."""
    model = CropMAE(embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    with torch.no_grad():
        images = torch.zeros(1, 3, 224, 224)
        out = model(images, context=model.encode(images))
    assert out.ids_keep.shape == (1, 2) and out.pred.shape == (1, 194, 768)


def test_each_parameter_has_a_gradient():
    """DDP needs no search for unused parameters."""
    model, (images, others) = build(), crops()
    model(images, 0.9, context=model.encode(others)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_patches_without_their_images():
    model, (images, others) = build(), crops()
    mask = masking.random(3, 24, 0.9)
    visible, predicted = (ops.gather_patches(images, ids, (2, 2)) for ids in (mask.ids_keep, mask.ids_predict))
    context = model.encode(others)
    cut = model(Patches(visible, predicted), mask=mask, context=context)
    assert torch.equal(cut.loss, model(images, mask=mask, context=context).loss)


def test_dropout_in_training_alone():
    """Branches, inner values of the MLP and weights of attention are dropped as in PyTorch's modules."""
    model, (images, others) = build(dropout=0.5), crops()
    mask = masking.random(3, 24, 0.9)
    expected = model.eval()(images, mask=mask, context=model.encode(others)).loss
    assert_exact(expected, plain_loss(model, images, others, mask))
    losses = [model.train()(images, mask=mask, context=model.encode(others)).loss for _ in range(2)]
    assert losses[0] != losses[1] and all(loss.isfinite() for loss in losses)
    assert all(gradient.isfinite().all() for gradient in gradients(losses[0], model).values())
    # one block, with PyTorch's attention in its place, from the same seed
    block, x, memory = model.decoder_blocks[0], torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    theirs = []
    for attn in (block.cross_attn, block.attn):
        other = nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True).double()
        layers = [attn.q, attn.kv] if attn is block.cross_attn else [attn.qkv]
        with torch.no_grad():
            other.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
            other.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        other.out_proj.load_state_dict(attn.proj.state_dict())
        theirs.append(other)

    def drop(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)

    torch.manual_seed(3)
    found = block(x, memory=memory)
    torch.manual_seed(3)
    x = block.norm_cross(x + drop(theirs[0](x, memory, memory, need_weights=False)[0].contiguous()))
    x = block.norm2(x + drop(block.mlp.fc2(drop(F.gelu(block.mlp.fc1(x))))))
    assert_exact(found, block.norm1(x + drop(theirs[1](x, x, x, need_weights=False)[0].contiguous())))


def test_compiled_and_narrow():
    model, (images, others) = build(depth=1, decoder_depth=1).float(), crops(torch.float32)
    mask = masking.random(3, 24, 0.9)

    def step() -> Tensor:
        return model(images, mask=mask, context=model.encode(others)).loss

    expected = step()
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend=COMPILER)(), expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = step()
    assert narrow.dtype == torch.float32 and (narrow - expected).abs() < 0.03 * expected
    assert all(gradient.isfinite().all() for gradient in gradients(narrow, model).values())


# ---- published checkpoints -------------------------------------------------------------------------------------------


def published(width: int, depth: int, decoder: int, decoder_depth: int, patches: int, patch: int) -> dict[str, Tensor]:
    """Return a state with the names and shapes of a checkpoint of CropMAE."""
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, 1 + patches, width), "mask_token": (1, 1, decoder),
        "decoder_pos_embed": (1, 1 + patches, decoder), "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,), "decoder_embed.weight": (decoder, width), "decoder_embed.bias": (decoder,),
        "decoder_pred.weight": (3 * patch**2, decoder), "decoder_pred.bias": (3 * patch**2,),
        "norm.weight": (width,), "norm.bias": (width,),
        "decoder_norm.weight": (decoder,), "decoder_norm.bias": (decoder,),
    }  # fmt: skip
    for name, (wide, inside) in {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}.items():
        for index in range(depth):
            shapes[f"blocks.{index}.{name}.weight"] = wide * width, inside * width
            shapes[f"blocks.{index}.{name}.bias"] = (wide * width,)
    for index in range(depth):
        shapes |= {f"blocks.{index}.norm{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
    block = nn.ModuleDict(
        dict(
            self_attn=nn.MultiheadAttention(decoder, 2), multihead_attn=nn.MultiheadAttention(decoder, 2),
            linear1=nn.Linear(decoder, 2048), linear2=nn.Linear(2048, decoder),
            norm1=nn.LayerNorm(decoder), norm2=nn.LayerNorm(decoder), norm3=nn.LayerNorm(decoder),
        )
    )  # fmt: skip
    for index in range(decoder_depth):
        shapes |= {f"decoder_blocks.{index}.{name}": value.shape for name, value in block.state_dict().items()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name, sizes", [("small", (384, 12, 256, 4)), ("base", (768, 12, 512, 8))])
def test_names_and_shapes_are_those_of_public_checkpoints(name, sizes):
    with torch.device("meta"):
        model = getattr(fastmim, f"cropmae_vit_{name}_patch16")()
        model.load_state_dict(published(*sizes, 196, 16), strict=True)
    assert model.norm_pix_loss and model.decoder_blocks[0].mlp.fc1.out_features == 2048


def test_public_values_go_where_they_belong():
    state = published(24, 2, 16, 2, 24, 2)
    model = build(decoder_mlp_ratio=None).float()
    model.load_state_dict(state, strict=True)
    block, theirs = model.decoder_blocks[1], "decoder_blocks.1."
    pairs = {
        "self_attn.in_proj_weight": block.attn.qkv.weight, "self_attn.out_proj.bias": block.attn.proj.bias,
        "multihead_attn.out_proj.weight": block.cross_attn.proj.weight, "norm1.weight": block.norm1.weight,
        "norm2.weight": block.norm_cross.weight, "norm3.weight": block.norm2.weight, "linear2.bias": block.mlp.fc2.bias,
    }  # fmt: skip
    assert all(torch.equal(state[theirs + name], value) for name, value in pairs.items())
    cross = torch.cat([block.cross_attn.q.bias, block.cross_attn.kv.bias])
    assert torch.equal(cross, state[theirs + "multihead_attn.in_proj_bias"])
    again = copy.deepcopy(model)
    again.initialize_weights()
    again.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_initial_weights():
    """Queries, keys and values of one attention are of one matrix, whose fan is that of the whole."""
    block = CropMAE(embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=64, decoder_depth=1).decoder_blocks[0]
    bound = (6 / (4 * 64)) ** 0.5
    for layer in (block.cross_attn.q, block.cross_attn.kv, block.attn.qkv):
        assert 0.98 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()


def test_bad_input():
    with pytest.raises(ValueError, match='pos_embed must be "sincos", "learned" or "none"'):
        build(pos_embed="rope")
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        build(dropout=1)
    with pytest.raises(ValueError, match="context must be given"):
        build()(crops()[0], 0.9)
