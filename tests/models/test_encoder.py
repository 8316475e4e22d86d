"""The encoder by itself: positions, prefix tokens, taps, embeddings of other inputs, and training without a decoder."""

import copy

import pytest
import torch
import torch.distributed as dist
from mae_from_paper import assert_exact, gradients
from plain_autoencoder import BATCH, build, draw, masks, plain_encoder, plain_latent, rows
from torch import Tensor, nn

from fastmim import Encoder, MaskedAutoencoder, masking
from fastmim.models.positions import sincos


def encoder(axes: int = 2, **changes) -> Encoder:
    return build(axes, Encoder, **changes)


@pytest.mark.parametrize("axes, position", [(1, "sincos"), (1, "rope"), (2, "learned"), (3, "none"), (3, "rope")])
@pytest.mark.parametrize("prefix", [0, 1, 4, 16])
def test_equals_the_plain_form(axes, position, prefix):
    model = encoder(axes, pos_embed=position, num_prefix_tokens=prefix, qkv_bias=prefix != 4)
    images = draw(model)
    latent = model.encode(images)
    assert latent.shape == (BATCH, prefix + model.num_patches, 24)
    assert_exact(latent, torch.stack([plain_latent(model, image) for image in images]))
    mask = masks(model)["some"]
    latent, expected = (
        model(images, mask),
        torch.stack([plain_latent(model, image, keep) for image, (keep, _) in zip(images, rows(mask))]),
    )
    assert_exact(latent, expected)
    weight = torch.randn_like(latent)
    assert_exact(gradients((latent * weight).sum(), model), gradients((expected * weight).sum(), model))
    assert (model.cls_token is None) == (prefix == 0)


def test_names_of_parameters_are_those_of_mae():
    state = encoder().state_dict()
    expected = [name for name in build().state_dict() if not name.startswith(("decoder", "mask_token"))]
    assert list(state) == expected == [*dict.fromkeys(expected)]
    assert "mask_token" not in state and tuple(state["pos_embed"].shape) == (1, 9, 24)
    assert next(iter(encoder(pos_embed="rope", num_prefix_tokens=0).state_dict())) == "patch_embed.proj.weight"


def test_an_encoder_has_the_weights_of_a_model():
    model = build()
    trunk = encoder()
    trunk.load_state_dict({name: value for name, value in model.state_dict().items() if name in trunk.state_dict()})
    images, mask = draw(model), masks(model)["ragged"]
    assert torch.equal(trunk(images, mask), model.encode(images, mask))


def test_initial_values():
    torch.manual_seed(0)
    model = Encoder(32, 4, embed_dim=64, depth=2, num_heads=2, num_prefix_tokens=4, pos_embed="learned")
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1) and model.pos_embed.requires_grad
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.blocks[0].attn.qkv.bias.any() and model.norm.eps == 1e-6
    with torch.device("meta"):
        model = Encoder((8, 4, 4), (2, 2, 2), embed_dim=30, depth=2, num_heads=2)
    model.to_empty(device="cpu").initialize_weights()
    assert torch.equal(model.pos_embed[0], sincos(30, (4, 2, 2), num_prefix_tokens=1))
    assert not model.pos_embed.requires_grad


def test_drop_path_rises_to_the_last_block():
    model = encoder(depth=3, drop_path=0.4)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0, 0.2, 0.4])
    images = draw(model)
    assert torch.equal(model.eval()(images), model(images))
    assert_exact(model(images), torch.stack([plain_latent(model, image) for image in images]))
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(images), model.eval()(images))


def test_checkpointing_is_bit_equal():
    model = encoder(pos_embed="rope", drop_path=0.5)
    images, mask, found = draw(model), masks(model)["ragged"], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        found.append(gradients(model(images, mask).square().sum(), model))
    assert all(map(torch.equal, *(x.values() for x in found)))


# ---- taps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "some", "ragged"])
def test_taps(kind):
    model = encoder(depth=3)
    images, mask = draw(model), None if kind is None else masks(model)[kind]
    latent, (last, first) = model.encode(images, mask, taps=(2, 0))
    assert torch.equal(latent, model.encode(images, mask))
    for row, image in enumerate(images):
        keep = None if mask is None else rows(mask)[row][0]
        states = plain_encoder(model, image, keep)
        count = len(states[0])
        assert_exact(first[row, :count], states[1])
        assert_exact(last[row, :count], states[3])


def test_stop_computes_nothing_after_the_last_tap():
    for model in (encoder(depth=3), build(depth=3, decoder=None)):
        called = []
        for name in ("blocks.1", "blocks.2", "norm"):
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
        images, mask = draw(model), masks(model)["all"]
        expected = model.encode(images, mask, taps=[1])[1][0]
        called.clear()
        latent, (tap,) = model.encode(images, mask, taps=[1], stop=True)
        assert latent is None and called == ["blocks.1"]
        assert torch.equal(tap, expected)


# ---- other inputs ----------------------------------------------------------------------------------------------------


class Codes(Encoder):
    """Encoder of token ids (B, L), a row of a table each."""

    def __init__(self, codes: int, **options) -> None:
        super().__init__(**options)
        self.patch_embed = None
        self.table = nn.Embedding(codes, self.embed_dim)

    def embed(self, inputs: Tensor, ids: Tensor) -> Tensor:
        return self.table(inputs.gather(1, ids))


def test_a_subclass_embeds_what_it_likes():
    model = Codes(7, img_size=(6,), patch_size=(1,), embed_dim=24, depth=2, num_heads=2).double()
    codes, mask = torch.randint(0, 7, (BATCH, 6)), masking.random(BATCH, 6, 0.5)
    places = torch.cat([torch.zeros(BATCH, 1, dtype=torch.long), 1 + mask.ids_keep], 1)
    x = torch.cat([model.cls_token.expand(BATCH, -1, -1), model.table(codes.gather(1, mask.ids_keep))], 1)
    x = x + model.pos_embed[0, places]
    for block in model.blocks:
        x = block(x)
    assert_exact(model(codes, mask), model.norm(x))
    assert model(codes).shape == (BATCH, 7, 24)
    model(codes, mask).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.initialize_weights()


def test_what_a_subclass_embeds_is_checked_and_kept_in_float32():
    model = Codes(7, img_size=(6,), patch_size=(1,), embed_dim=24, depth=1, num_heads=2)
    codes, streams = torch.randint(0, 7, (BATCH, 6)), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    model.embed = lambda inputs, ids: model.table(inputs.gather(1, ids)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        model(codes)
    # the sum with the positions is not rounded
    assert streams[0].dtype == torch.float32 and not torch.equal(streams[0], streams[0].bfloat16().float())
    model.embed = lambda inputs, ids: model.table(inputs)
    with pytest.raises(ValueError, match=r"the result of embed must have shape \(3, 3, 24\).*got \(3, 6, 24\)"):
        model(codes, masking.random(BATCH, 6, 0.5))


def test_several_tensors_as_input():
    """Points and their features, say; the first tensor has the batch size."""
    model = Codes(7, img_size=(6,), patch_size=(1,), embed_dim=24, depth=1, num_heads=2)
    model.embed = lambda inputs, ids: model.table(inputs["codes"].gather(1, ids)) + inputs["shift"][:, None]
    inputs = dict(codes=torch.randint(0, 7, (BATCH, 6)), shift=torch.randn(BATCH, 24))
    assert model(inputs).shape == (BATCH, 7, 24)
    assert model(inputs, masking.random(BATCH, 6, 0.5)).shape == (BATCH, 4, 24)
    with pytest.raises(TypeError, match=r"images must be a torch.Tensor or hold tensors, got dict"):
        model(dict(codes=None))


# ---- running ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_it_trains_alone_under_ddp(one_process):
    """Every parameter has a gradient at every step, so that DDP needs no find_unused_parameters."""
    alone = encoder(pos_embed="learned")
    together = nn.parallel.DistributedDataParallel(copy.deepcopy(alone), find_unused_parameters=False)
    for _ in range(2):
        images, mask = draw(alone), masking.random(BATCH, 8, 0.5)
        for model in (alone, together):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(images, mask).square().mean().backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, together.parameters(), alone.parameters()))


def test_compiled_once_for_all_masks():
    torch.compiler.reset()
    model = encoder(pos_embed="rope", depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(draw(model), masks(model)["ragged"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        images, mask = draw(model), masks(model)["ragged"]
        assert_exact(compiled(images, mask), model(images, mask))


def test_positions_are_added_in_the_pass_that_embeds():
    """Compiled too."""
    model, graphs = encoder(), []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module

    torch.compile(model, fullgraph=True, backend=backend)(draw(model), masks(model)["some"])
    (node,) = (n for n in graphs[0].nodes if "embed_patches" in str(n.target))
    assert node.args[4] is not None and node.args[5] is not None


def test_angles_stay_float32_in_a_narrow_model():
    """At bfloat16's 8 bits, far positions would have the same angles."""
    model = encoder(pos_embed="rope").bfloat16()
    assert not list(model.buffers())
    assert model._angles(12, model.cls_token).dtype == torch.float32


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(img_size=(12, 8, 4)), ValueError, r"img_size must be an int or one int per axis \(2 of them\)"),
        (dict(img_size=(12, 9)), ValueError, r"img_size \(12, 9\) must be a multiple of patch_size \(3, 4\)"),
        (dict(patch_size=(1, 1, 1, 1), img_size=4), ValueError, "patch_size must be .* 1 to 3"),
        (dict(pos_embed="fixed"), ValueError, "pos_embed must be one of sincos, learned, rope, none; got 'fixed'"),
        (dict(pos_embed="rope", num_heads=8), ValueError, "embed_dim must be at least 4 times num_heads 8 for rotary"),
        (dict(embed_dim=18), ValueError, "embed_dim must be a multiple of 4 for the sine-cosine .* got 18"),
        (dict(num_prefix_tokens=-1), ValueError, "num_prefix_tokens must be at least 0, got -1"),
        (dict(drop_path=1.0), ValueError, r"drop_path must be in \[0, 1\), got 1.0"),
        (dict(drop_path="x"), TypeError, "drop_path must be a number, got str 'x'"),
        (dict(num_heads=5), ValueError, "embed_dim must be a multiple of num_heads 5, got 24"),
        (dict(mean=[0.5]), ValueError, "mean must have a value for each of the 3 channels"),
    ],
)
def test_bad_arguments_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        encoder(**changes)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(taps=(2,)), ValueError, r"taps must be in 0..1, got 2"),
        (dict(taps=(-1,)), ValueError, r"taps must be in 0..1, got -1"),
        (dict(taps=("0",)), TypeError, "taps must be an int, got str"),
        (dict(stop=True), ValueError, "stop=True needs taps"),
        (dict(mask=masking.random(BATCH, 9, 0.5)), ValueError, "mask must be of 3 images of 8 patches; got 3 of 9"),
        (dict(mask=masking.random(2, 8, 0.5)), ValueError, "mask must be of 3 images of 8 patches; got 2 of 8"),
        (dict(mask=torch.zeros(BATCH, 8)), TypeError, "mask must be a fastmim.Mask .*, got Tensor"),
        (dict(images=torch.zeros(BATCH, 3, 12)), ValueError, r"images must have shape \(any, 3, 12, 8\)"),
        (dict(images=torch.zeros(BATCH, 3, 12, 8).long()), TypeError, "images must be of dtype .*int64"),
    ],
)
def test_bad_calls_are_refused(arguments, error, message):
    model = encoder()
    with pytest.raises(error, match=message):
        model(**dict(images=draw(model)) | arguments)


def test_integers_need_constants():
    model = encoder(1)
    for dtype in (torch.uint8, torch.uint16):
        images = torch.zeros(BATCH, 2, 24, dtype=dtype)
        with pytest.raises(ValueError, match=f"{str(dtype)[6:]} images of 2 channels need a model with mean and std"):
            model(images)
    assert isinstance(MaskedAutoencoder(24, (3,), 3, **dict(embed_dim=24, depth=1, num_heads=2)).mean, tuple)
