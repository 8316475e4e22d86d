"""Weights of Hugging Face's ViTMAE in our names."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.mae import MaskedAutoencoderViT

# one pattern serves transformers 4 (encoder.layer.N, attention.attention.query) and 5 (layers.N, attention.q_proj)
_BLOCK = re.compile(
    r"(?:vit\.(?:encoder\.layer|layers)|(decoder)\.(?:decoder_layers|decoder_encoder\.layer))\.(\d+)\.(.+)"
)
_QKV = re.compile(r"attention\.(?:attention\.)?(?:(q)uery|(k)ey|(v)alue|(q)_proj|(k)_proj|(v)_proj)\.(weight|bias)")
_BLOCK_NAMES = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc1": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc2": "mlp.fc2",
}
_NAMES = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "vit.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "vit.layernorm.weight": "norm.weight",
    "vit.layernorm.bias": "norm.bias",
}


def from_huggingface(model: nn.Module) -> MaskedAutoencoderViT:
    """A `MaskedAutoencoderViT` with the weights and settings of a Hugging Face `ViTMAEForPreTraining`.

    The same images and noise give the same loss and predictions. Weights are copied, with their dtype and device;
    the key names of transformers 4 and 5 are both read. The published checkpoints (facebook/vit-mae-*) are
    CC-BY-NC-4.0: the conversion does not change their licence.

    Raises:
        TypeError: not a ViTMAEForPreTraining.
        ValueError: a setting without a counterpart here (another activation); keys left over or missing.
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "vit_mae" or not hasattr(model, "decoder"):
        raise TypeError(f"model must be a transformers ViTMAEForPreTraining, got {type(model).__name__}")
    assert config is not None
    if config.hidden_act != "gelu":
        raise ValueError(f'model.config.hidden_act must be "gelu", got {config.hidden_act!r}')
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if getattr(config, name, 0.0) != 0:
            raise ValueError(f"model.config.{name} must be 0: there is no dropout here; got {getattr(config, name)}")
    ours = MaskedAutoencoderViT(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.num_channels,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        decoder_embed_dim=config.decoder_hidden_size,
        decoder_depth=config.decoder_num_hidden_layers,
        decoder_num_heads=config.decoder_num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        decoder_mlp_ratio=config.decoder_intermediate_size / config.decoder_hidden_size,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        norm_pix_loss=config.norm_pix_loss,
        qkv_bias=config.qkv_bias,
    )
    weights = _rename(model.state_dict())
    first = next(iter(weights.values()))
    ours.to(device=first.device, dtype=first.dtype)
    expected = ours.state_dict().keys()
    if weights.keys() != expected:
        raise ValueError(
            f"model has other weights than its config says: missing {sorted(expected - weights.keys())}, "
            f"left over {sorted(weights.keys() - expected)}"
        )
    ours.load_state_dict(weights)
    ours.train(model.training)
    return ours


def _rename(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our names for Hugging Face's; query, key and value joined."""
    weights: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        block = _BLOCK.fullmatch(key)
        if block is None:
            weights[_NAMES.get(key) or key.removeprefix("decoder.")] = value
            continue
        prefix = f"{'decoder_' if block[1] else ''}blocks.{block[2]}"
        qkv = _QKV.fullmatch(block[3])
        if qkv is not None:
            letter = next(filter(None, qkv.groups()[:6]))
            joined.setdefault(f"{prefix}.attn.qkv.{qkv[7]}", {})[letter] = value
        else:
            name, _, kind = block[3].rpartition(".")
            weights[f"{prefix}.{_BLOCK_NAMES.get(name, name)}.{kind}"] = value
    for key, parts in joined.items():
        if parts.keys() == set("qkv"):
            weights[key] = torch.cat([parts[letter] for letter in "qkv"])
        else:
            weights.update({f"{key}.{letter}": value for letter, value in parts.items()})
    return weights
