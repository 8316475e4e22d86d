"""Masked autoencoders in the manner of facebookresearch/mae (He et al., CVPR 2022), forks included.

There is no package to compare a class with: each method is taken for what its name says if it can do nothing besides
and gives our results (`recognise.py`). A method that is not recognised stays, and so do those that would go round it.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...nn.fused import linear, untouched
from ...ops._define import transformed
from .layers import embeds, inverse, maskable, rows, visible_tokens
from .recognise import disagrees, idle_but, impure
from .swap import Choice, Fast, replaced
from .timm import Block

_MODULES = "patch_embed blocks norm decoder_embed decoder_blocks decoder_norm decoder_pred".split()
_TABLES = "cls_token pos_embed mask_token decoder_pos_embed".split()
_METHODS = "forward_encoder forward_decoder forward_loss".split()
_PATCH_EMBED = """
    proj norm flatten img_size patch_size strict_img_size dynamic_img_pad output_fmt Format NCHW nchw_to _assert pad
    num_patches grid_size in_chans
""".split()
# what a method calls, and what it may name
_CALLS = {
    "forward_encoder": ("random_masking",),
    "forward_decoder": (),
    "forward_loss": ("patchify",),
    "forward": (*_METHODS,),
}
_PARTS = [*_MODULES, *_TABLES, "norm_pix_loss", "patch_size", "in_chans", "random_masking", "patchify", *_METHODS]


class Encoder(Fast):
    """`forward_encoder`: embeds visible patches only, and finds them without a sort."""

    what = "masking without sorts, visible patches only"

    def forward_encoder(
        self, x: Tensor, mask_ratio: float, *noises: Any, **named: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, C, H, W) -> latent (B, 1+K, D), mask (B, L), 1 = removed, and ids_restore (B, L).

        Forks may take `noise` (B, L) besides.
        """
        noise = next(iter((*noises, *named.values())), None)
        patches, blocks = self.patch_embed, self.blocks
        num_patches = self.pos_embed.shape[1] - 1
        len_keep = int(num_patches * (1 - mask_ratio))
        if not (
            untouched(patches)
            and idle_but(patches, "proj")
            and untouched(blocks)
            and not replaced(self, "random_masking")
            and tuple(x.shape[2:]) == _pair(patches.img_size)
            and embeds(x, patches.proj)
            and maskable(noise, x.shape[0], num_patches, len_keep)
        ):
            out: tuple[Tensor, Tensor, Tensor] = super().forward_encoder(x, mask_ratio, *noises, **named)  # type: ignore[misc]
            return out
        # drawn as facebookresearch/mae draws it: the same seed gives the same mask
        noise = torch.rand(x.shape[0], num_patches, device=x.device) if noise is None else noise.to(x.device)
        ids_keep, _, ids_restore = ops.random_masking(x.shape[0], num_patches, len_keep, noise=noise)
        table = self.pos_embed[0]
        tokens = visible_tokens(x, ids_keep, patches.proj, table[1:], self.cls_token[0] + table[:1])
        for block in blocks:
            tokens = block(tokens)
        return self.norm(tokens), (ids_restore >= len_keep).to(torch.get_default_dtype()), ids_restore


class Decoder(Fast):
    """`forward_decoder`: its input assembled in one pass."""

    what = "decoder assembled in one pass"

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """x (B, 1+K, D), ids_restore (B, L) -> pred (B, L, P)."""
        if not untouched(self.decoder_blocks):
            out: Tensor = super().forward_decoder(x, ids_restore)  # type: ignore[misc]
            return out
        tokens = ops.unshuffle(
            self._embed(x), ids_restore, self.mask_token[0, 0], self.decoder_pos_embed[0], num_prefix_tokens=1
        )
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return linear(self.decoder_norm(tokens), self.decoder_pred)[:, 1:]

    def predict_masked(self, x: Tensor, ids: Tensor) -> Tensor:
        """x (B, 1+K, D), ids (B, L) of the patches by rank -> pred (B, M, P) of the last M, the removed."""
        count = ids.shape[1] - x.shape[1] + 1
        tokens = ops.decoder_tokens(
            self._embed(x),
            ids[:, :-count],
            ids[:, -count:],
            self.mask_token[0, 0],
            self.decoder_pos_embed[0],
            num_prefix_tokens=1,
        )
        *blocks, last = self.decoder_blocks
        for block in blocks:
            tokens = block(tokens)
        tokens = last.forward_last(tokens, count) if isinstance(last, Block) else last(tokens)[:, -count:]
        return linear(self.decoder_norm(tokens), self.decoder_pred)

    def _embed(self, x: Tensor) -> Tensor:
        """In the decoder's width and, under autocast too, in the dtype of its stream."""
        x = linear(x, self.decoder_embed)
        return x.to(torch.promote_types(x.dtype, self.mask_token.dtype))


class Loss(Fast):
    """`forward_loss`: its target is read from the image."""

    what = "loss without a target tensor"

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """imgs (B, C, H, W), pred (B, L, P), mask (B, L), 1 = removed -> scalar."""
        if (
            replaced(self, "patchify")
            or not _scorable(imgs, self.patch_embed)
            or mask.shape != pred.shape[:2]
            or not mask.is_floating_point()
        ):
            out: Tensor = super().forward_loss(imgs, pred, mask)  # type: ignore[misc]
            return out
        ids = torch.arange(pred.shape[1], device=pred.device).expand(pred.shape[0], -1)
        loss = _loss(self, imgs, pred, ids, mask)
        # where nothing is removed, the mean over nothing is not a number
        return torch.where(mask.any(), loss, math.nan)


class OnlyMasked(Fast):
    """`forward` that predicts what is scored: the removed patches."""

    what = "predicts removed patches only: pred is (B, M, P)"
    only_masked = True

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.75, *noises: Any, **named: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """imgs (B, C, H, W) -> loss, pred (B, M, P) of the removed patches by rank of noise, mask (B, L)."""
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, *noises, **named)
        ids = inverse(ids_restore)
        ids_predict = ids[:, latent.shape[1] - 1 :]
        if untouched(self.decoder_blocks) and not replaced(self, "forward_decoder") and ids_predict.shape[1]:
            pred = self.predict_masked(latent, ids)
        else:
            pred = rows(self.forward_decoder(latent, ids_restore), ids_predict)
        known = not replaced(self, "patchify", "forward_loss") and _scorable(imgs, self.patch_embed)
        if ids_predict.shape[1] and known:
            return _loss(self, imgs, pred, ids_predict, None), pred, mask
        everywhere = rows(torch.nn.functional.pad(pred, (0, 0, latent.shape[1] - 1, 0)), ids_restore)
        return self.forward_loss(imgs, everywhere, mask), pred, mask


def choose(module: Any, predict: str) -> Choice | None:
    """What to accelerate `module` as, why it stays as it is, or None: it is no such autoencoder."""
    methods = vars(type(module)).keys() | {name for cls in type(module).__mro__ for name in vars(cls)}
    parts = {*module._modules, *module._parameters, *module._buffers}
    if not {*_MODULES, *_TABLES} <= parts or not methods.issuperset(_METHODS):
        return None
    kept = _misshapen(module)
    if kept:
        return Choice(kept=(kept,))
    found: dict[type[Fast], str | None] = {
        Encoder: _not_known(module, "forward_encoder") or _encodes_otherwise(module),
        Decoder: _not_known(module, "forward_decoder") or _decodes_otherwise(module),
        Loss: _not_known(module, "forward_loss") or _scores_otherwise(module),
    }
    if predict == "masked":
        others = [reason for reason in found.values() if reason]
        found[OnlyMasked] = others[0] if others else _not_known(module, "forward") or _runs_otherwise(module)
    mixins = tuple(mixin for mixin, reason in found.items() if reason is None)
    return Choice(mixins[::-1], tuple(dict.fromkeys(reason for reason in found.values() if reason)))


def _misshapen(module: Any) -> str | None:
    """Why nothing of `module` can be told, or None."""
    patches, blocks = module.patch_embed, (module.blocks, module.decoder_blocks)
    size = getattr(patches, "img_size", None)
    if not isinstance(getattr(patches, "proj", None), nn.Conv2d) or not isinstance(size, (int, tuple, list)):
        return "its patch_embed is not a convolution of images of one size"
    if not all(isinstance(stack, (nn.ModuleList, nn.Sequential)) for stack in blocks):
        return "its blocks are not a list"
    if getattr(module, "norm_pix_loss", None) not in (True, False):
        return "its norm_pix_loss can't be told"
    return impure(patches, "forward", _PATCH_EMBED)


def _not_known(module: Any, method: str) -> str | None:
    """Why `method`, or one that it calls, might do more than its name says."""
    reasons = (impure(module, name, _PARTS) for name in (method, *_CALLS[method]))
    return next(filter(None, reasons), None)


def _encodes_otherwise(module: Any) -> str | None:
    def ask(twin: Any) -> Any:
        images = _images(twin)
        found = [twin.forward_encoder(images, ratio) for ratio in (0.75, 0.4)]
        if noisy:
            noise = torch.rand(2, twin.pos_embed.shape[1] - 1)
            found += [twin.forward_encoder(images, 0.6, noise), twin.forward_encoder(images, 0.6, noise=noise)]
        return found

    others = _parameters(module, "forward_encoder")[2:]
    noisy = others == ["noise"]
    if others and not noisy:
        return f"forward_encoder also takes {others[0]}"
    return _disagrees(module, (Encoder,), ask, "forward_encoder")


def _decodes_otherwise(module: Any) -> str | None:
    def ask(twin: Any) -> Any:
        num_patches = twin.pos_embed.shape[1] - 1
        latent = torch.randn(2, 1 + max(1, num_patches // 3), twin.decoder_embed.in_features, dtype=torch.float64)
        return twin.forward_decoder(latent, torch.rand(2, num_patches).argsort(1))

    return _disagrees(module, (Decoder,), ask, "forward_decoder")


def _scores_otherwise(module: Any) -> str | None:
    def ask(twin: Any) -> Any:
        images, num_patches = _images(twin), twin.pos_embed.shape[1] - 1
        pred = torch.randn(2, num_patches, twin.decoder_pred.out_features, dtype=torch.float64)
        mask = (torch.rand(2, num_patches) < 0.6).float()
        twin.norm_pix_loss = True
        normed = twin.forward_loss(images, pred, mask)
        twin.norm_pix_loss = False
        return normed, twin.forward_loss(images, pred, mask)

    return _disagrees(module, (Loss,), ask, "forward_loss")


def _runs_otherwise(module: Any) -> str | None:
    def ask(twin: Any) -> Any:
        images = _images(twin)
        found = []
        for loss, pred, mask in (twin(images), twin(images, mask_ratio=0.5)):
            if pred.shape[1] == mask.shape[1]:
                pred = pred[mask.bool()].view(len(mask), -1, pred.shape[2])
            # values in order say whether the same patches are predicted, in whatever order
            found.append((loss, pred.sort(1).values, mask))
        return found

    others = [name for name in _parameters(module, "forward")[2:] if name != "noise"]
    if others:
        return f"forward also takes {others[0]}"
    return _disagrees(module, (OnlyMasked, Loss, Decoder, Encoder), ask, "forward")


def _parameters(module: Any, method: str) -> list[str]:
    return list(inspect.signature(getattr(module, method)).parameters)


def _disagrees(module: Any, mixins: tuple[type[Fast], ...], ask: Callable[[nn.Module], Any], method: str) -> str | None:
    """Blocks are replaced by something small that tells their order and that of tokens."""
    stacks = {name: _marks(getattr(module, name)) for name in ("blocks", "decoder_blocks")}
    reason = disagrees(module, mixins, ask, **stacks)
    return reason and f"{method}: {reason}"


def _marks(stack: nn.Module) -> nn.Module:
    marks = [_Mark(index) for index in range(2)]
    return nn.Sequential(*marks) if isinstance(stack, nn.Sequential) else nn.ModuleList(marks)


class _Mark(nn.Module):
    """Stands in for a block: mixes tokens, and doesn't commute with its like."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return x + (self.index + 1.5) * x.square().mean(1, keepdim=True) + self.index * x.sin()


def _images(twin: Any) -> Tensor:
    return torch.randn(2, twin.patch_embed.proj.in_channels, *_pair(twin.patch_embed.img_size), dtype=torch.float64)


def _scorable(images: Tensor, patches: Any) -> bool:
    return (
        not transformed()
        # what wraps the convolution, for LoRA say, may not tell its sizes
        and isinstance(patches.proj, nn.Conv2d)
        and images.dim() == 4
        and images.shape[0] > 0
        and images.shape[1] == patches.proj.in_channels
        and images.is_floating_point()
        and not images.requires_grad
        and tuple(images.shape[2:]) == _pair(patches.img_size)
    )


def _loss(model: Any, images: Tensor, pred: Tensor, ids: Tensor, weight: Tensor | None) -> Tensor:
    loss = ops.pixel_loss(
        pred,
        images,
        ids,
        list(model.patch_embed.proj.kernel_size),
        norm_pix=bool(model.norm_pix_loss),
        weight=weight,
    )
    return loss.to(torch.promote_types(pred.dtype, images.dtype))


def _pair(size: Any) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)
