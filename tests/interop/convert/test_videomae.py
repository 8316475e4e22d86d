"""Checkpoints of VideoMAE: names of its code and of Hugging Face, and equal losses and gradients."""

import pytest
import torch
from small_mae import random_, same_bits
from torch import Tensor, nn

import fastmim
from fastmim import VideoMAE, from_huggingface, load, masking, to_huggingface, to_videomae

SIZES = dict(
    img_size=(4, 32, 24), patch_size=(2, 8, 8), embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16,
    decoder_depth=1, decoder_num_heads=4, mlp_ratio=2.0,
)  # fmt: skip
HEADS = dict(img_size=SIZES["img_size"], num_heads=2, decoder_num_heads=4)


def public_state(width: int, depth: int, decoder: int, decoder_depth: int, hidden: int) -> dict[str, Tensor]:
    """Return a state with the names and shapes of VideoMAE's pretraining code, for patches of (2, 8, 8)."""
    shapes = {
        "mask_token": (1, 1, decoder),
        "encoder.patch_embed.proj.weight": (width, 3, 2, 8, 8),
        "encoder.patch_embed.proj.bias": (width,),
        "encoder_to_decoder.weight": (decoder, width),
        "decoder.head.weight": (384, decoder),
        "decoder.head.bias": (384,),
    }
    for side, dim, count in (("encoder", width, depth), ("decoder", decoder, decoder_depth)):
        shapes |= {f"{side}.norm.weight": (dim,), f"{side}.norm.bias": (dim,)}
        wide = dim * hidden // width
        for name, shape in {
            "attn.q_bias": (dim,), "attn.v_bias": (dim,), "attn.qkv.weight": (3 * dim, dim),
            "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,), "mlp.fc1.weight": (wide, dim),
            "mlp.fc1.bias": (wide,), "mlp.fc2.weight": (dim, wide), "mlp.fc2.bias": (dim,),
            **{f"norm{i}.{kind}": (dim,) for i in (1, 2) for kind in ("weight", "bias")},
        }.items():  # fmt: skip
            shapes |= {f"{side}.blocks.{index}.{name}": shape for index in range(count)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_public_names_are_loaded_and_written(tmp_path):
    """Strictly, the keys' bias being zero; what is written has the same names and bits."""
    state = public_state(32, 2, 16, 1, 64)
    torch.save({"model": state}, tmp_path / "public.pth")
    model = load(tmp_path / "public.pth", **HEADS)
    assert isinstance(model, VideoMAE) and model.norm_pix_loss == "channel"
    assert not model.blocks[1].attn.qkv.bias[32:64].any()
    assert same_bits({name: model.state_dict()[name] for name in VideoMAE(**SIZES).state_dict()}, model)
    assert torch.equal(model.pos_embed, VideoMAE(**SIZES).pos_embed)
    written = to_videomae(model, tmp_path / "again.pth")
    assert same_bits(written, state)
    assert same_bits(torch.load(tmp_path / "again.pth")["model"], state)
    state["encoder.blocks.0.attn.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "public.pth")
    with pytest.raises(ValueError, match=r"left over \['blocks.0.attn.extra'\]"):
        load(tmp_path / "public.pth", **HEADS)


def test_own_checkpoints_and_encoders_are_loaded(tmp_path):
    model = random_(VideoMAE(**SIZES))
    torch.save(model.state_dict(), tmp_path / "own.pth")
    assert same_bits(load(tmp_path / "own.pth", **HEADS), model)
    encoder = {name: value for name, value in to_videomae(model).items() if name.startswith("encoder.")}
    encoder = {name.removeprefix("encoder."): value for name, value in encoder.items()}
    torch.save(encoder, tmp_path / "encoder.pth")
    alone = load(tmp_path / "encoder.pth", allow_missing="decoder", **HEADS, decoder_embed_dim=16, decoder_depth=1)
    assert torch.equal(alone.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)


def test_bad_input(tmp_path):
    model = VideoMAE(**SIZES)
    torch.save({"model": to_videomae(model)}, tmp_path / "public.pth")
    with pytest.raises(ValueError, match="does not give num_heads"):
        load(tmp_path / "public.pth")
    with pytest.raises(ValueError, match="grid_size is of images"):
        load(tmp_path / "public.pth", grid_size=(4, 3))
    with pytest.raises(TypeError, match=r"model must be a fastmim.VideoMAE, got Linear"):
        to_videomae(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="patch_size must be"):
        VideoMAE(patch_size=16)


@pytest.mark.parametrize("name, decoder", [("base_patch16", (384, 6)), ("giant_patch14", (512, 8))])
def test_named_models_have_the_public_sizes(name, decoder):
    with torch.device("meta"):
        model = getattr(fastmim, f"videomae_vit_{name}")()
    width, heads = decoder
    assert model.decoder_embed.weight.shape[0] == width and model.decoder_num_heads == heads
    assert model.decoder_embed.bias is None and model.cls_token is None and len(model.decoder_blocks) == 4
    if name == "giant_patch14":
        assert model.num_patches == 2048 and len(model.blocks) == 40
        assert model.blocks[0].attn.head_dim == 88 and model.blocks[0].mlp.fc1.out_features == 6144
        # the published code gives both sides one ratio: int(512 * 48 / 11)
        assert model.decoder_blocks[0].mlp.fc1.out_features == 2234
        return
    # the published file has 94.21 million values, none of them the keys' bias
    trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    assert sum(count * 2 // 3 if name.endswith("qkv.bias") else count for name, count in trained) == 94_210_944


# ---- Hugging Face ----------------------------------------------------------------------------------------------------

CONFIG = dict(
    image_size=32, patch_size=8, num_frames=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
    decoder_intermediate_size=48, use_mean_pooling=False,
)  # fmt: skip


def theirs(**changes) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return random_(transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**{**CONFIG, **changes})))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-7)])
@pytest.mark.parametrize("changes", [dict(), dict(norm_pix_loss=False), dict(qv_bias=False)], ids=str)
def test_loss_predictions_and_every_gradient_agree(changes, dtype, bound):
    """In float64 up to the mean and std, which Hugging Face rounds to float32."""
    other = theirs(**changes).to(dtype)
    model = from_huggingface(other)
    videos = torch.randn(2, 3, 4, 32, 32, dtype=dtype)
    mask = masking.tube(2, model.grid_size, 0.75)
    expected = other(videos.transpose(1, 2), bool_masked_pos=mask.mask)
    out = model(videos, mask=mask)

    def close(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).norm() <= bound * b.norm())

    assert close(out.loss, expected.loss) and close(out.pred, expected.logits)
    expected.loss.backward()
    out.loss.backward()
    # gradients of their parameters, under our names
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.grad)
    gradients = from_huggingface(other).state_dict()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        ours, wanted = parameter.grad, gradients[name]
        if name.endswith("qkv.bias"):
            assert ours.chunk(3)[1].norm() <= bound * ours.norm()
            ours, wanted = (torch.cat(x.chunk(3)[::2]) for x in (ours, wanted))
        assert close(ours, wanted), name


def test_folders_of_hugging_face(tmp_path):
    other = theirs()
    other.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert same_bits(model, from_huggingface(other))
    assert (model.img_size, model.norm.eps, model.decoder_norm.eps) == ((4, 32, 32), 1e-12, 1e-5)
    with pytest.raises(ValueError, match="use_mean_pooling must be false"):
        from_huggingface(theirs(use_mean_pooling=True))


@pytest.mark.parametrize("changes", [dict(), dict(norm_pix_loss=False, qkv_bias=False, decoder_mlp_ratio=3.0)], ids=str)
def test_to_hugging_face_and_back(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = SIZES | dict(img_size=(4, 32, 32))
    model = VideoMAE(**{**sizes, **changes})
    tables = model.pos_embed.clone(), model.decoder_pos_embed.clone()
    random_(model)
    with torch.no_grad():
        model.pos_embed.copy_(tables[0])
        model.decoder_pos_embed.copy_(tables[1])
        for name, parameter in model.named_parameters():
            if name.endswith("attn.qkv.bias"):
                parameter.chunk(3)[1].zero_()
    state = torch.get_rng_state()
    other = to_huggingface(model)
    assert torch.equal(state, torch.get_rng_state())
    videos, mask = torch.randn(2, 3, 4, 32, 32), masking.tube(2, model.grid_size, 0.75)
    theirs, ours = other(videos.transpose(1, 2), bool_masked_pos=mask.mask), model(videos, mask=mask)
    torch.testing.assert_close(theirs.loss, ours.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs.logits, ours.pred, rtol=1e-4, atol=1e-5)
    assert same_bits(from_huggingface(other), model)
    other.save_pretrained(tmp_path)
    assert same_bits(load(tmp_path), model)
    encoder = transformers.VideoMAEModel.from_pretrained(tmp_path).eval()
    found = encoder(videos.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(found, model.eval().encode(videos), rtol=1e-4, atol=1e-5)
    options = dict(use_mean_pooling=True, num_labels=5)
    classifier = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path, **options)
    assert torch.equal(classifier.videomae.encoder.layer[1].output.dense.weight, model.blocks[1].mlp.fc2.weight)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(), r"square, as Hugging Face's VideoMAE are; got \(4, 32, 24\)"),
        (dict(img_size=(4, 32, 32), loss="huber"), "loss \"squared\".*got 'huber'"),
        (dict(img_size=(4, 32, 32), norm_pix_loss=True), "norm_pix_loss \"channel\" or False.*got 'squared' and True"),
        (dict(img_size=(4, 32, 32), mean=[0.5] * 3), "must have ImageNet's mean and std"),
    ],
)
def test_what_hugging_face_has_not_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        to_huggingface(VideoMAE(**{**SIZES, **changes}))
