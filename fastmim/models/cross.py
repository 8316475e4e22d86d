"""The masked autoencoder of Fu et al., "Rethinking patch dependence for masked autoencoders" (CrossMAE), 2024.

Letters: B batch, K visible, M predicted, D width.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..masking import Mask
from ..nn import run_blocks
from .masked_autoencoder import MaskedAutoencoder
from .published import renamed

# names of parameters in the published checkpoints, and here
_NAMES = (
    (re.compile(r"decoder_blocks\.(\d+)\.norm1\."), r"decoder_blocks.\1.norm_cross."),
    (re.compile(r"dec_norms\.(\d+)\."), r"decoder_blocks.\1.norm_memory."),
    (re.compile(r"wfm\.linear\."), "mixture."),
)


class CrossMAE(MaskedAutoencoder):
    """Masked autoencoder whose predicted patches attend to mixtures of the encoder's states, and not to each other.

    The states are the tokens after each block of the encoder, which has no final norm, and those before the first.
    Block i of the decoder attends to the norm of sum over j of w[i, j] · state j, w being the weight of `mixture`.
    Checkpoints of CrossMAE load with `load_state_dict(state, strict=True)`, which renames their norms and mixture.

    In the published runs, `mask_ratio` is 0.75 and a third of the removed patches or all of them are predicted.

    Args:
        use_input: mix the tokens before the first block in, too; published models do.
        options: arguments of `MaskedAutoencoder`. Defaults: images of 224 by 224, patches of 16 by 16, a decoder of
            width 512 with 12 blocks and 16 heads, and `norm_pix_loss`, as in the published runs.

    Raises:
        TypeError, ValueError: as `MaskedAutoencoder`; an encoder or decoder without blocks.
    """

    def __init__(self, *, use_input: bool = True, **options: Any) -> None:
        if not isinstance(use_input, bool):
            raise TypeError(f"use_input must be True or False, got {use_input!r}")
        defaults: dict[str, Any] = dict(
            img_size=224,
            patch_size=16,
            decoder_embed_dim=512,
            decoder_depth=12,
            decoder_num_heads=16,
            norm_pix_loss=True,
        )
        super().__init__(**{**defaults, **options}, decoder="cross")
        depth, decoder_depth = len(self.blocks), len(self.decoder_blocks)
        if not depth or not decoder_depth:
            raise ValueError(f"depth and decoder_depth must be positive, got {depth} and {decoder_depth}")
        self.use_input = use_input
        self.norm = nn.Identity()
        self.mixture = nn.Linear(depth + use_input, decoder_depth, bias=False)
        nn.init.xavier_uniform_(self.mixture.weight)

    def predict(self, images: Any, mask: Mask, context: Tensor | None = None) -> Tensor:
        """Return `decode` of mixtures of the encoder's states: predictions (B, M, out_dim)."""
        self._check_inputs(images, mask)
        tokens, attention = self._encoder_input(images, mask)
        depth = len(self.blocks)
        checkpointing = self._checkpointing()
        _, states = run_blocks(self.blocks, None, tokens, taps=range(depth), checkpointing=checkpointing, **attention)
        if self.use_input:
            states = [tokens, *states]
        return self.decode(self.mix(states), mask, context)

    def mix(self, states: list[Tensor]) -> list[Tensor]:
        """Return what each block of the decoder attends to.

        Args:
            states: (B, 1+K, D) after each block of the encoder, with `use_input` also those before the first.

        Returns:
            A list of (B, 1+K, D), one for each block, before its norm.

        Raises:
            ValueError: another number of states.
        """
        count = self.mixture.in_features
        if len(states) != count:
            raise ValueError(f"states must be {count} tensors, one for each state of the encoder; got {len(states)}")
        stacked = torch.stack(states)
        return list((self.mixture.weight @ stacked.flatten(1)).unflatten(1, stacked.shape[1:]))

    @staticmethod
    def _published(state: dict[str, Any]) -> dict[str, Any]:
        return renamed(state, _NAMES)


def _crossmae(sizes: dict[str, Any], overrides: dict[str, Any]) -> CrossMAE:
    return CrossMAE(**{**sizes, **overrides})


def crossmae_vit_small_patch16(**kwargs: Any) -> CrossMAE:
    """Build a model of width 384 with 12 blocks and 6 heads; decoder 256, 12 and 8.

    `kwargs`: arguments of `CrossMAE`, also in place of these sizes.
    """
    return _crossmae(dict(embed_dim=384, depth=12, num_heads=6, decoder_embed_dim=256, decoder_num_heads=8), kwargs)


def crossmae_vit_base_patch16(**kwargs: Any) -> CrossMAE:
    """Build a model of width 768 with 12 blocks and 12 heads; decoder 512, 12 and 16.

    `kwargs`: arguments of `CrossMAE`, also in place of these sizes.
    """
    return _crossmae(dict(embed_dim=768, depth=12, num_heads=12), kwargs)


def crossmae_vit_large_patch16(**kwargs: Any) -> CrossMAE:
    """Build a model of width 1024 with 24 blocks and 16 heads; decoder 512, 12 and 16.

    `kwargs`: arguments of `CrossMAE`, also in place of these sizes.
    """
    return _crossmae(dict(embed_dim=1024, depth=24, num_heads=16), kwargs)
