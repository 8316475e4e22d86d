"""Weights of Hugging Face's ViTMAE give the same loss, predictions and gradients here."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fastmim
from fastmim import from_huggingface

transformers = pytest.importorskip("transformers")

SIZES = dict(
    image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=48,
)  # fmt: skip
CONFIGS = {
    "plain": dict(),
    "norm_pix, eps 1e-6": dict(norm_pix_loss=True, layer_norm_eps=1e-6),
    "odd widths": dict(intermediate_size=37, decoder_hidden_size=24, decoder_intermediate_size=5),
    "unequal depths": dict(num_hidden_layers=3, decoder_num_hidden_layers=1, num_attention_heads=8),
    "no qkv bias": dict(qkv_bias=False, mask_ratio=0.9),
    "1 channel, 25 patches": dict(num_channels=1, image_size=20, patch_size=4, norm_pix_loss=True),
    "4 channels, 4 patches": dict(num_channels=4, patch_size=16, mask_ratio=0.5),
}
# where transformers 5, transformers 4 and published files keep what
STACKS = {
    "5": ("vit.layers", "decoder.decoder_layers"),
    "4": ("vit.encoder.layer", "decoder.decoder_layers"),
    "file": ("vit.encoder.layer", "decoder.decoder_encoder.layer"),
}
OLD = {
    "attn.qkv": [f"attention.attention.{name}" for name in ("query", "key", "value")],
    "attn.proj": ["attention.output.dense"],
    "mlp.fc1": ["intermediate.dense"],
    "mlp.fc2": ["output.dense"],
}
NEW = {"attn.qkv": [f"attention.{name}_proj" for name in "qkv"], "attn.proj": ["attention.o_proj"]}
NORMS = {"norm1": ["layernorm_before"], "norm2": ["layernorm_after"]}
OUTSIDE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
    "norm.weight": "vit.layernorm.weight",
    "norm.bias": "vit.layernorm.bias",
}


def build(**changes) -> nn.Module:
    """A small float32 model with every parameter away from its initial value: a new one's mask token is zero."""
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def their_names(ours: str, generation: str) -> list[str]:
    """The tensors that, joined, are the one of our name."""
    stack, _, rest = ours.partition(".")
    if not stack.endswith("blocks"):
        return [OUTSIDE.get(ours, f"decoder.{ours}")]
    index, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    names = NORMS | (NEW if generation == "5" else OLD)
    return [f"{STACKS[generation][stack != 'blocks']}.{index}.{name}.{kind}" for name in names.get(part, [part])]


def generation_of(model: nn.Module) -> str:
    return "5" if any("q_proj" in key for key in model.state_dict()) else "4"


def renamed(model: nn.Module, generation: str) -> SimpleNamespace:
    """What `from_huggingface` reads of a model, under the key names of a generation."""
    state, current = model.state_dict(), generation_of(model)
    renamed = {
        new: state[old]
        for name in from_huggingface(model).state_dict()
        for new, old in zip(their_names(name, generation), their_names(name, current))
    }
    assert len(renamed) == len(state)
    return SimpleNamespace(config=model.config, decoder=model.decoder, training=True, state_dict=lambda: renamed)


def inputs(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images and noise for `model`."""
    config = model.config
    images = torch.randn(2, config.num_channels, config.image_size, config.image_size, dtype=dtype)
    return images, torch.rand(2, (config.image_size // config.patch_size) ** 2, dtype=dtype)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("config", CONFIGS)
def test_loss_predictions_and_every_gradient_agree(config, dtype, bound):
    theirs = build(**CONFIGS[config]).to(dtype)
    ours = from_huggingface(theirs)
    images, noise = inputs(theirs, dtype)
    expected = theirs(images, noise=noise)
    out = ours(images, theirs.config.mask_ratio, noise=noise, predict="all")
    only_masked = ours(images, theirs.config.mask_ratio, noise=noise)

    def close(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).norm() <= bound * b.norm())

    assert torch.equal(out.mask, expected.mask.float()) and torch.equal(out.ids_restore, expected.ids_restore)
    assert close(out.loss, expected.loss) and close(only_masked.loss, expected.loss)
    assert close(out.pred, expected.logits)
    removed = out.ids_predict[..., None].expand_as(only_masked.pred)
    assert close(only_masked.pred, expected.logits.gather(1, removed))

    expected.loss.backward()
    only_masked.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        parts = [gradients.pop(part) for part in their_names(name, generation_of(theirs))]
        if parameter.requires_grad:
            assert close(parameter.grad, torch.cat(parts)), name
        else:
            assert parts == [None] and parameter.grad is None
    assert not gradients


@pytest.mark.parametrize("generation", STACKS)
@pytest.mark.parametrize("config", ["plain", "no qkv bias"])
def test_every_generation_of_names_is_read(generation, config):
    theirs = build(**CONFIGS[config])
    expected = from_huggingface(theirs).state_dict()
    found = from_huggingface(renamed(theirs, generation)).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_saved_and_loaded_model_converts(tmp_path):
    theirs = build()
    theirs.save_pretrained(tmp_path)
    again = from_huggingface(transformers.ViTMAEForPreTraining.from_pretrained(tmp_path))
    assert all(map(torch.equal, again.state_dict().values(), from_huggingface(theirs).state_dict().values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_dtype_and_mode_are_kept(dtype, training):
    ours = from_huggingface(build().to(dtype).train(training))
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    assert {module.training for module in ours.modules()} == {training}


def test_settings_are_kept():
    ours = from_huggingface(build(norm_pix_loss=True, layer_norm_eps=1e-9, image_size=48))
    assert isinstance(ours, fastmim.MaskedAutoencoderViT)
    assert ours.norm_pix_loss and ours.patch_embed.img_size == (48, 48)
    assert {module.eps for module in ours.modules() if isinstance(module, nn.LayerNorm)} == {1e-9}
    assert [name for name, p in ours.named_parameters() if not p.requires_grad] == ["pos_embed", "decoder_pos_embed"]


def test_the_original_stays_as_it_was():
    theirs = build().eval()
    before = copy.deepcopy(theirs.state_dict())
    ours = from_huggingface(theirs)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert not theirs.training
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, name",
    [
        (nn.Linear(2, 2), "Linear"),
        (None, "NoneType"),
        ("facebook/vit-mae-base", "str"),
        (transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZES)), "ViTMAEModel"),
        (transformers.ViTModel(transformers.ViTConfig(hidden_size=8, num_hidden_layers=0)), "ViTModel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_only_a_vit_mae_with_its_decoder(model, name):
    with pytest.raises(TypeError, match=rf"ViTMAEForPreTraining, got {name}$"):
        from_huggingface(model)


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_another_activation_is_refused(activation):
    with pytest.raises(ValueError, match=rf'hidden_act must be "gelu", got \'{activation}\''):
        from_huggingface(build(hidden_act=activation))


@pytest.mark.parametrize("setting", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_refused(setting):
    """There is none here: training would silently be another."""
    with pytest.raises(ValueError, match=rf"{setting} .*0\.1"):
        from_huggingface(build(**{setting: 0.1}))


@pytest.mark.parametrize("generation", STACKS)
@pytest.mark.parametrize("part", ["blocks.1.attn.qkv.bias", "decoder_blocks.0.mlp.fc2.weight", "mask_token"])
def test_a_missing_tensor_is_named(part, generation):
    model = renamed(build(), generation)
    del model.state_dict()[their_names(part, generation)[0]]
    with pytest.raises(ValueError, match=rf"missing \['{part}'\]"):
        from_huggingface(model)


@pytest.mark.parametrize("key", ["decoder.extra.weight", "vit.pooler.bias", "vit.layers.7.mlp.fc1.bias"])
def test_a_leftover_tensor_is_named(key):
    model = renamed(build(), "5")
    model.state_dict()[key] = torch.zeros(1)
    with pytest.raises(ValueError, match=rf"missing \[\], left over \['.*{key.split('.')[-2]}.{key.split('.')[-1]}'\]"):
        from_huggingface(model)


def test_a_tensor_of_another_shape_is_named():
    model = renamed(build(), "5")
    model.state_dict()["vit.layernorm.weight"] = torch.zeros(5)
    with pytest.raises((ValueError, RuntimeError), match=r"norm\.weight"):
        from_huggingface(model)
