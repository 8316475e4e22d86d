"""Masked autoencoders with the methods of facebookresearch/mae (He et al., CVPR 2022), forks included.

Their classes are copied into user code, so they can't be identified by name. A method is replaced where it has no side
effects and gives the same results as its replacement (`recognise.py`). Others are kept, and so is a method if its
replacement would bypass one that is kept.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...nn.fused import linear
from ...nn.stock import untouched
from ...ops._define import transformed
from .layers import decoder_embed, embeds, inverse, maskable, rows, visible_tokens
from .recognise import differs, replaced, side_effects
from .stock import only_runs
from .swap import Choice, Fast
from .timm import Block

# the children, parameters and methods that such a model has
_MODULES = "patch_embed blocks norm decoder_embed decoder_blocks decoder_norm decoder_pred".split()
_TABLES = "cls_token pos_embed mask_token decoder_pos_embed".split()
_METHODS = "forward_encoder forward_decoder forward_loss".split()
# names that `forward` of a patch embedding may use, facebookresearch/mae's or timm's
_PATCH_EMBED = """
    proj norm flatten img_size patch_size strict_img_size dynamic_img_pad output_fmt Format NCHW nchw_to _assert pad
    num_patches grid_size in_chans
""".split()
# the methods that a method calls
_CALLS = {
    "forward_encoder": ("random_masking",),
    "forward_decoder": (),
    "forward_loss": ("patchify",),
    "forward": (*_METHODS,),
}
# names that the methods may use
_PARTS = [*_MODULES, *_TABLES, "norm_pix_loss", "patch_size", "in_chans", "random_masking", "patchify", *_METHODS]


class Encoder(Fast):
    """`forward_encoder` that embeds visible patches only and masks without a sort."""

    description = "masking without sorts, visible patches only"

    def forward_encoder(
        self, x: Tensor, mask_ratio: float, *noises: Any, **named: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return latent (B, 1+K, D), mask (B, L), 1 = removed, and ids_restore (B, L) for x (B, C, H, W).

        A fork may have one more argument, `noise` (B, L).
        """
        noise = next(iter((*noises, *named.values())), None)
        patches, blocks = self.patch_embed, self.blocks
        num_patches = self.pos_embed.shape[1] - 1
        len_keep = int(num_patches * (1 - mask_ratio))
        if not (
            untouched(patches)
            and only_runs(patches, "proj")
            and untouched(blocks)
            and not replaced(self, "random_masking")
            and tuple(x.shape[2:]) == _pair(patches.img_size)
            and embeds(x, patches.proj)
            and maskable(noise, x.shape[0], num_patches, len_keep)
        ):
            out: tuple[Tensor, Tensor, Tensor] = super().forward_encoder(x, mask_ratio, *noises, **named)  # type: ignore[misc]
            return out
        # drawn as in facebookresearch/mae, so that the same seed gives the same mask
        noise = torch.rand(x.shape[0], num_patches, device=x.device) if noise is None else noise.to(x.device)
        ids_keep, _, ids_restore = ops.random_masking(x.shape[0], num_patches, len_keep, noise=noise)
        table = self.pos_embed[0]
        tokens = visible_tokens(x, ids_keep, patches.proj, table[1:], self.cls_token[0] + table[:1])
        for block in blocks:
            tokens = block(tokens)
        return self.norm(tokens), (ids_restore >= len_keep).to(torch.get_default_dtype()), ids_restore


class Decoder(Fast):
    """`forward_decoder` whose input is assembled in one pass."""

    description = "decoder assembled in one pass"

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Return predictions (B, L, P) for x (B, 1+K, D) and ids_restore (B, L)."""
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
        """Return predictions (B, M, P) of the removed patches, for x (B, 1+K, D) and all ids (B, L) by rank."""
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
        return decoder_embed(x, self.decoder_embed, self.mask_token)


class Loss(Fast):
    """`forward_loss` that reads its target from the image."""

    description = "loss without a target tensor"

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Return the scalar loss of pred (B, L, P) for imgs (B, C, H, W) and mask (B, L), 1 = removed."""
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
        # NaN where no patch is removed, as the mean of no values
        return torch.where(mask.any(), loss, math.nan)


class OnlyMasked(Fast):
    """`forward` that predicts the removed patches only, which are those scored."""

    description = "predicts removed patches only: pred is (B, M, P)"
    only_masked = True

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.75, *noises: Any, **named: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, pred (B, M, P) of the removed patches by rank of noise, and mask (B, L)."""
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, *noises, **named)
        ids = inverse(ids_restore)
        ids_predict = ids[:, latent.shape[1] - 1 :]
        if untouched(self.decoder_blocks) and not replaced(self, "forward_decoder") and ids_predict.shape[1]:
            pred = self.predict_masked(latent, ids)
        else:
            pred = rows(self.forward_decoder(latent, ids_restore), ids_predict)
        scorable = not replaced(self, "patchify", "forward_loss") and _scorable(imgs, self.patch_embed)
        if ids_predict.shape[1] and scorable:
            return _loss(self, imgs, pred, ids_predict, None), pred, mask
        padded = rows(torch.nn.functional.pad(pred, (0, 0, latent.shape[1] - 1, 0)), ids_restore)
        return self.forward_loss(imgs, padded, mask), pred, mask


def choose(module: Any, predict: str) -> Choice | None:
    """Decide how to accelerate `module`; None if it is no such autoencoder."""
    parts = {*module._modules, *module._parameters, *module._buffers}
    if not {*_MODULES, *_TABLES} <= parts or not all(hasattr(type(module), method) for method in _METHODS):
        return None
    unknown = _unknown_parts(module)
    if unknown:
        return Choice(kept=(unknown,))
    reasons: dict[type[Fast], str | None] = {
        Encoder: _side_effects(module, "forward_encoder") or _encoder_differs(module),
        Decoder: _side_effects(module, "forward_decoder") or _decoder_differs(module),
        Loss: _side_effects(module, "forward_loss") or _loss_differs(module),
    }
    if predict == "masked":
        first = next(filter(None, reasons.values()), None)
        reasons[OnlyMasked] = first or _side_effects(module, "forward") or _forward_differs(module)
    mixins = tuple(mixin for mixin, reason in reasons.items() if reason is None)
    return Choice(mixins[::-1], tuple(dict.fromkeys(reason for reason in reasons.values() if reason)))


# ---- reasons to keep a method ----------------------------------------------------------------------------------------


def _unknown_parts(module: Any) -> str | None:
    """Reason why nothing in `module` can be accelerated, or None."""
    patches, blocks = module.patch_embed, (module.blocks, module.decoder_blocks)
    size = getattr(patches, "img_size", None)
    if not isinstance(getattr(patches, "proj", None), nn.Conv2d) or not isinstance(size, (int, tuple, list)):
        return "its patch_embed is not a convolution of images of one size"
    if not all(isinstance(stack, (nn.ModuleList, nn.Sequential)) for stack in blocks):
        return "its blocks are not a list"
    if getattr(module, "norm_pix_loss", None) not in (True, False):
        return "its norm_pix_loss is neither True nor False"
    return side_effects(patches, "forward", _PATCH_EMBED)


def _side_effects(module: Any, method: str) -> str | None:
    """Reason why `method`, or one that it calls, might do more than return its result, or None."""
    reasons = (side_effects(module, name, _PARTS) for name in (method, *_CALLS[method]))
    return next(filter(None, reasons), None)


def _encoder_differs(module: Any) -> str | None:
    def run(twin: Any) -> Any:
        images = _images(twin)
        outputs = [twin.forward_encoder(images, ratio) for ratio in (0.75, 0.4)]
        if takes_noise:
            noise = torch.rand(2, twin.pos_embed.shape[1] - 1)
            outputs += [twin.forward_encoder(images, 0.6, noise), twin.forward_encoder(images, 0.6, noise=noise)]
        return outputs

    others = _parameters(module, "forward_encoder")[2:]
    takes_noise = others == ["noise"]
    if others and not takes_noise:
        return f"forward_encoder also takes {others[0]}"
    return _differs(module, (Encoder,), run, "forward_encoder")


def _decoder_differs(module: Any) -> str | None:
    def run(twin: Any) -> Any:
        num_patches = twin.pos_embed.shape[1] - 1
        latent = torch.randn(2, 1 + max(1, num_patches // 3), twin.decoder_embed.in_features, dtype=torch.float64)
        return twin.forward_decoder(latent, torch.rand(2, num_patches).argsort(1))

    return _differs(module, (Decoder,), run, "forward_decoder")


def _loss_differs(module: Any) -> str | None:
    def run(twin: Any) -> Any:
        images, num_patches = _images(twin), twin.pos_embed.shape[1] - 1
        pred = torch.randn(2, num_patches, twin.decoder_pred.out_features, dtype=torch.float64)
        mask = (torch.rand(2, num_patches) < 0.6).float()
        twin.norm_pix_loss = True
        normed = twin.forward_loss(images, pred, mask)
        twin.norm_pix_loss = False
        return normed, twin.forward_loss(images, pred, mask)

    return _differs(module, (Loss,), run, "forward_loss")


def _forward_differs(module: Any) -> str | None:
    def run(twin: Any) -> Any:
        images = _images(twin)
        outputs = []
        for loss, pred, mask in (twin(images), twin(images, mask_ratio=0.5)):
            if pred.shape[1] == mask.shape[1]:
                pred = pred[mask.bool()].view(len(mask), -1, pred.shape[2])
            # sorted, so that the order of the predicted patches does not count
            outputs.append((loss, pred.sort(1).values, mask))
        return outputs

    others = [name for name in _parameters(module, "forward")[2:] if name != "noise"]
    if others:
        return f"forward also takes {others[0]}"
    return _differs(module, (OnlyMasked, Loss, Decoder, Encoder), run, "forward")


def _parameters(module: Any, method: str) -> list[str]:
    return list(inspect.signature(getattr(module, method)).parameters)


def _differs(module: Any, mixins: tuple[type[Fast], ...], run: Callable[[nn.Module], Any], method: str) -> str | None:
    """Compare results by `recognise.differs`, with `_Mark` in place of the blocks."""
    stacks = {name: _marks(getattr(module, name)) for name in ("blocks", "decoder_blocks")}
    reason = differs(module, mixins, run, **stacks)
    return reason and f"{method}: {reason}"


def _marks(stack: nn.Module) -> nn.Module:
    marks = [_Mark(index) for index in range(2)]
    return nn.Sequential(*marks) if isinstance(stack, nn.Sequential) else nn.ModuleList(marks)


class _Mark(nn.Module):
    """Small stand-in for a block that mixes tokens; two of them don't commute, so that their order shows."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, S, D) to (B, S, D)."""
        return x + (self.index + 1.5) * x.square().mean(1, keepdim=True) + self.index * x.sin()


def _images(twin: Any) -> Tensor:
    return torch.randn(2, twin.patch_embed.proj.in_channels, *_pair(twin.patch_embed.img_size), dtype=torch.float64)


# ---- loss ------------------------------------------------------------------------------------------------------------


def _scorable(images: Tensor, patches: Any) -> bool:
    """Return whether `ops.pixel_loss` computes the model's loss for these images."""
    return (
        not transformed()
        # a wrapper of the convolution, such as LoRA's, may lack its attributes
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
