"""Gather the visible tokens, assemble the decoder's input."""

import functools
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._autocast import autocast_dtype
from .._checks import check_count, check_floating, check_ids, check_same, check_tensor
from ._define import define


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Gather the tokens at `ids`: out[b, k] = tokens[b, ids[b, k]].

    Args:
        tokens: (B, L, D) floating, any strides; or (L, D), one table for all rows of `ids`.
        ids: (B, K) int64, distinct in a row, in 0..L-1.

    Returns:
        (B, K, D) of the dtype of `tokens`; bit-exact copies. The gradient writes each row once, without atomics, for a
        table the sum over the batch; it can be differentiated again.

    Raises:
        TypeError, ValueError: wrong type, shape or device; ids out of range or repeated (checked on the CPU, and
            elsewhere where FASTMIM_CHECK_IDS=1; otherwise such an id reads NaN).
    """
    check_tensor("tokens", tokens)
    if tokens.dim() not in (2, 3):
        raise ValueError(f"tokens must be (B, L, D), or (L, D) for all rows of ids, got shape {tuple(tokens.shape)}")
    check_floating("tokens", tokens)
    ids = check_ids("ids", ids, tokens.shape[0] if tokens.dim() == 3 else None)
    check_same("device", tokens=tokens, ids=ids)
    out: Tensor = _gather_tokens(tokens, ids)
    return out


def decoder_tokens(
    visible: Tensor,
    ids_keep: Tensor,
    ids_predict: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor | None,
    *,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Assemble the decoder's input under dual masking: visible tokens, and a mask token for each predicted patch.

    [prefix + its position ; visible + its position ; mask token + position of each predicted patch], the assembly
    of VideoMAE V2 (Wang et al., CVPR 2023, section 3.2).

    Args:
        visible: (B, N+K, D) encoder output in decoder width, prefix tokens first.
        ids_keep: (B, K) int64 patches of the visible tokens.
        ids_predict: (B, M) int64 patches to predict; may overlap `ids_keep`.
        mask_token: (D,), or (B, D), one for each sample.
        pos_embed: (N+L, D), prefix rows first; or (B, N+L, D), a table for each sample; or None: nothing is added, and
            the values of ids are not read.
        num_prefix_tokens: N.

    Returns:
        (B, N+K+M, D) of the dtype of `visible`; under autocast, of the widest dtype of visible, mask_token and
        pos_embed, which the residual stream of a decoder keeps. Gradients for visible, mask_token and pos_embed.

    Raises:
        TypeError, ValueError: as `gather_tokens`.
    """
    visible = _check_decoder(visible, mask_token, pos_embed, num_prefix_tokens, by_sample=True)
    ids_keep = check_ids("ids_keep", ids_keep, visible.shape[0])
    ids_predict = check_ids("ids_predict", ids_predict, visible.shape[0])
    if ids_keep.shape[1] + num_prefix_tokens != visible.shape[1]:
        raise ValueError(
            f"ids_keep must name each of the {visible.shape[1] - num_prefix_tokens} visible patches; "
            f"got shape {tuple(ids_keep.shape)}"
        )
    check_same(
        "device",
        visible=visible,
        ids_keep=ids_keep,
        ids_predict=ids_predict,
        mask_token=mask_token,
        pos_embed=pos_embed,
    )
    if pos_embed is None:
        # nothing is to be fused with the copy
        token = mask_token[..., None, :].to(visible.dtype)
        return torch.cat([visible, token.expand(*ids_predict.shape, -1)], dim=1)
    out: Tensor = _decoder_tokens(visible, ids_keep, ids_predict, mask_token, pos_embed, num_prefix_tokens)
    return out


def unshuffle(
    visible: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor, *, num_prefix_tokens: int = 0
) -> Tensor:
    """Assemble the MAE decoder's input in grid order: visible tokens in their places, the mask token in all others.

    He et al., "Masked autoencoders are scalable vision learners", CVPR 2022.

    Args:
        visible: (B, N+K, D) encoder output in decoder width, prefix tokens first, then by rank.
        ids_restore: (B, L) int64 rank of each patch, a permutation; ranks 0..K-1 are visible.
        mask_token: (D,).
        pos_embed: (N+L, D), prefix rows first.
        num_prefix_tokens: N.

    Returns:
        (B, N+L, D), of a dtype as in `decoder_tokens`; gradients for visible, mask_token and pos_embed.

    Raises:
        TypeError, ValueError: as `gather_tokens`.
    """
    visible = _check_decoder(visible, mask_token, pos_embed, num_prefix_tokens)
    ids_restore = check_ids("ids_restore", ids_restore, visible.shape[0])
    if ids_restore.shape[1] + num_prefix_tokens != pos_embed.shape[0]:
        raise ValueError(
            f"ids_restore must rank each of the {pos_embed.shape[0] - num_prefix_tokens} patches of pos_embed; "
            f"got shape {tuple(ids_restore.shape)}"
        )
    if visible.shape[1] > pos_embed.shape[0]:
        raise ValueError(f"visible must have at most {pos_embed.shape[0]} tokens, as pos_embed; got {visible.shape[1]}")
    check_same("device", visible=visible, ids_restore=ids_restore, mask_token=mask_token, pos_embed=pos_embed)
    out: Tensor = _unshuffle(visible, ids_restore, mask_token, pos_embed, num_prefix_tokens)
    return out


def _check_decoder(
    visible: Tensor, mask_token: Tensor, pos_embed: Tensor | None, num_prefix_tokens: int, *, by_sample: bool = False
) -> Tensor:
    """Check the arguments that both assemblies share; return `visible` in the dtype of the result.

    With `by_sample`, the mask token and the positions may have an axis of the batch, or there may be no positions.
    """
    check_tensor("visible", visible, (None, None, None), letters="(batch, tokens, width)")
    check_floating("visible", visible)
    batch, most, width = visible.shape
    own = batch if by_sample else None
    _check_shared("mask_token", mask_token, (width,), "width", own)
    given = [visible, mask_token]
    if pos_embed is not None or not by_sample:
        _check_shared("pos_embed", pos_embed, (None, width), "prefix + patches, width", own)
        assert pos_embed is not None
        given.append(pos_embed)
        most = min(most, pos_embed.shape[-2])
    check_count("num_prefix_tokens", num_prefix_tokens, 0, most)
    if autocast_dtype(*given) is None:
        return visible
    return visible.to(functools.reduce(torch.promote_types, [tensor.dtype for tensor in given]))


def _check_shared(name: str, value: object, shape: tuple[int | None, ...], letters: str, batch: int | None) -> None:
    """Check a floating tensor of `shape` or, where `batch` is given, of (batch, *shape)."""
    if batch is not None and isinstance(value, Tensor) and value.dim() == len(shape) + 1:
        shape, letters = (batch, *shape), f"batch, {letters}"
    check_tensor(name, value, shape, letters=f"({letters})")
    assert isinstance(value, Tensor)
    check_floating(name, value)


# ---- gather_tokens and its transpose ---------------------------------------------------------------------------------


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, ids = inputs
    ctx.is_table, ctx.num_tokens = tokens.dim() == 2, tokens.shape[-2]
    ctx.save_for_backward(ids)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (ids,) = ctx.saved_tensors
    if ctx.is_table:
        return sum_by_position(grad, ids, ctx.num_tokens).to(grad.dtype), None
    return _gather_tokens_backward(grad, ids, ctx.num_tokens), None


_gather_tokens = define(
    "gather_tokens",
    "(Tensor tokens, Tensor ids) -> Tensor",
    reference.gather_tokens,
    lambda tokens, ids: tokens.new_empty(*ids.shape, tokens.shape[-1]),
    backward=_gather_backward,
    setup_context=_gather_setup,
    twice=True,
)


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (ids,) = ctx.saved_tensors
    return _gather_tokens(grad, ids), None, None


_gather_tokens_backward = define(
    "gather_tokens_backward",
    "(Tensor grad, Tensor ids, SymInt num_tokens) -> Tensor",
    reference.gather_tokens_backward,
    lambda grad, ids, num_tokens: grad.new_empty(grad.shape[0], num_tokens, grad.shape[2]),
    backward=_scatter_backward,
    setup_context=_scatter_setup,
    twice=True,
    internal=True,
)


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, ids, _ = inputs
    ctx.dtype = rows.dtype
    ctx.save_for_backward(ids)


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (ids,) = ctx.saved_tensors
    return _gather_tokens(grad, ids).to(ctx.dtype), None, None


sum_by_position = define(
    "sum_by_position",
    "(Tensor rows, Tensor ids, SymInt num_positions) -> Tensor",
    reference.sum_by_position,
    lambda rows, ids, num_positions: reference.upcast(rows.new_empty(num_positions, rows.shape[2])),
    backward=_sum_backward,
    setup_context=_sum_setup,
    twice=True,
    internal=True,
)


_sum_rows = define(
    "sum_rows",
    "(Tensor x) -> Tensor",
    reference.sum_rows,
    lambda x: reference.upcast(x.new_empty(x.shape[2])),
    internal=True,
)


def sum_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum x (B, K, D) over its rows to (D,), upcast, and return it in `dtype`."""
    if x.device.type == "cpu":
        out: Tensor = _sum_rows(x)
        return out.to(dtype)
    # without the op, which takes the host longer
    return reference.sum_rows(x).to(dtype)


# ---- decoder_tokens --------------------------------------------------------------------------------------------------


def _decoder_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids_keep, ids_predict, mask_token, pos_embed, ctx.num_prefix_tokens = inputs
    ctx.mask_dtype, ctx.pos_dtype, ctx.num_positions = mask_token.dtype, pos_embed.dtype, pos_embed.shape[-2]
    ctx.own_mask_tokens, ctx.own_positions = mask_token.dim() == 2, pos_embed.dim() == 3
    ctx.save_for_backward(ids_keep, ids_predict)


def _decoder_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids_keep, ids_predict = ctx.saved_tensors
    prefix, kept, predicted = grad.split([ctx.num_prefix_tokens, ids_keep.shape[1], ids_predict.shape[1]], dim=1)
    dvisible = dmask = dpos = None
    if ctx.needs_input_grad[0]:
        dvisible = grad[:, : grad.shape[1] - predicted.shape[1]]
    if ctx.needs_input_grad[3]:
        if ctx.own_mask_tokens:
            dmask = reference.upcast(predicted).sum(1).to(ctx.mask_dtype)
        else:
            dmask = sum_rows(predicted, ctx.mask_dtype)
    if ctx.needs_input_grad[4]:
        num_patches = ctx.num_positions - ctx.num_prefix_tokens
        put = _gather_tokens_backward if ctx.own_positions else sum_by_position
        patches = reference.upcast(put(kept, ids_keep, num_patches)) + put(predicted, ids_predict, num_patches)
        prefix = reference.upcast(prefix) if ctx.own_positions else reference.upcast(prefix).sum(0)
        dpos = torch.cat([prefix, patches], dim=-2).to(ctx.pos_dtype)
    return dvisible, None, None, dmask, dpos, None


_decoder_tokens = define(
    "decoder_tokens",
    "(Tensor visible, Tensor ids_keep, Tensor ids_predict, Tensor mask_token, Tensor pos_embed,"
    " SymInt num_prefix_tokens) -> Tensor",
    reference.decoder_tokens,
    lambda visible, ids_keep, ids_predict, mask_token, pos_embed, num_prefix_tokens: visible.new_empty(
        visible.shape[0], visible.shape[1] + ids_predict.shape[1], visible.shape[2]
    ),
    backward=_decoder_backward,
    setup_context=_decoder_setup,
)


# ---- unshuffle -------------------------------------------------------------------------------------------------------


def _unshuffle_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    visible, ids_restore, mask_token, pos_embed, ctx.num_prefix_tokens = inputs
    ctx.len_keep = visible.shape[1] - ctx.num_prefix_tokens
    ctx.mask_dtype, ctx.pos_dtype = mask_token.dtype, pos_embed.dtype
    ctx.save_for_backward(ids_restore)


def _unshuffle_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids_restore,) = ctx.saved_tensors
    dvisible = dmask = dpos = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
        dvisible, dmask = _unshuffle_backward_op(grad, ids_restore, ctx.len_keep, ctx.num_prefix_tokens)
        dmask = dmask.to(ctx.mask_dtype)
    if ctx.needs_input_grad[3]:
        dpos = reference.upcast(grad).sum(0).to(ctx.pos_dtype)
    return dvisible, None, dmask, dpos, None


_unshuffle = define(
    "unshuffle",
    "(Tensor visible, Tensor ids_restore, Tensor mask_token, Tensor pos_embed, SymInt num_prefix_tokens) -> Tensor",
    reference.unshuffle,
    lambda visible, ids_restore, mask_token, pos_embed, num_prefix_tokens: visible.new_empty(
        visible.shape[0], *pos_embed.shape
    ),
    backward=_unshuffle_backward,
    setup_context=_unshuffle_setup,
)

_unshuffle_backward_op = define(
    "unshuffle_backward",
    "(Tensor grad, Tensor ids_restore, SymInt len_keep, SymInt num_prefix_tokens) -> (Tensor, Tensor)",
    reference.unshuffle_backward,
    lambda grad, ids_restore, len_keep, num_prefix_tokens: (
        grad.new_empty(grad.shape[0], num_prefix_tokens + len_keep, grad.shape[2]),
        reference.upcast(grad.new_empty(grad.shape[2])),
    ),
    internal=True,
)
