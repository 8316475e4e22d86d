"""Chains of blocks, in which each residual sum is computed by the norm that follows it."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, overload

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._checks import check_count
from .block import Block, Options, check_takes
from .fused import linear, norm_linear
from .narrow import NarrowWeights, narrow_operands
from .stock import is_stock, stock_norm, unaltered, watched
from .stream import Stream, add_norm, chosen_tokens


def takes_stream(block: nn.Module) -> bool:
    """Return whether `block` may be given a stream: a `Block` without hooks but those of fully_shard.

    Other modules and other hooks expect a tensor. The hooks of fully_shard only gather and free weights.
    """
    hooks = chain(
        block._forward_hooks.values(),
        block._forward_pre_hooks.values(),
        block._backward_hooks.values(),
        block._backward_pre_hooks.values(),
    )
    return (
        type(block).forward is Block.forward
        and "forward" not in block.__dict__
        and not watched()
        # some callables that are not functions have no module
        and all(str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.") for hook in hooks)
    )


def narrow_weights(blocks: Iterable[nn.Module], head: nn.Module | None, x: Tensor) -> NarrowWeights | None:
    """Return copies of the weights of `blocks` and `head` in the dtype that autocast multiplies in, if it does.

    A block with hooks is left out: fully_shard gathers its weights when it is called and frees them when it ends. So is
    one that is compiled in place.
    """
    dtype = narrow_operands(x)
    if dtype is None:
        return None
    layers: list[nn.Linear] = []
    for block in blocks:
        eager = takes_stream(block) and unaltered(block) and block._compiled_call_impl is None
        layers += block._layers() if eager and isinstance(block, Block) else ()
    if head is not None and is_stock(head, nn.Linear):
        layers.append(head)
    return NarrowWeights((p for layer in layers for p in (layer.weight, layer.bias)), dtype)


@overload
def run_blocks(  # type: ignore[overload-overlap]
    blocks: Iterable[nn.Module],
    norm: nn.Module,
    x: Tensor,
    *,
    num_queries: int | None = None,
    checkpointing: bool = False,
    head: nn.Module | None = None,
    memory: Tensor | Sequence[Tensor | None] | None = None,
    taps: tuple[()] = (),
    key_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    bias: Tensor | None = None,
    memory_bias: Tensor | None = None,
    rope: Tensor | None = None,
    memory_rope: Tensor | None = None,
    query_ids: Tensor | None = None,
) -> Tensor: ...


@overload
def run_blocks(
    blocks: Iterable[nn.Module],
    norm: nn.Module,
    x: Tensor,
    *,
    num_queries: int | None = None,
    checkpointing: bool = False,
    head: nn.Module | None = None,
    memory: Tensor | Sequence[Tensor | None] | None = None,
    taps: Sequence[int],
    key_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    bias: Tensor | None = None,
    memory_bias: Tensor | None = None,
    rope: Tensor | None = None,
    memory_rope: Tensor | None = None,
    query_ids: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]: ...


@overload
def run_blocks(
    blocks: Iterable[nn.Module],
    norm: None,
    x: Tensor,
    *,
    num_queries: int | None = None,
    checkpointing: bool = False,
    head: None = None,
    memory: Tensor | Sequence[Tensor | None] | None = None,
    taps: Sequence[int],
    key_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    bias: Tensor | None = None,
    memory_bias: Tensor | None = None,
    rope: Tensor | None = None,
    memory_rope: Tensor | None = None,
    query_ids: Tensor | None = None,
) -> tuple[None, list[Tensor]]: ...


def run_blocks(
    blocks: Iterable[nn.Module],
    norm: nn.Module | None,
    x: Tensor,
    *,
    num_queries: int | None = None,
    checkpointing: bool = False,
    head: nn.Module | None = None,
    memory: Tensor | Sequence[Tensor | None] | None = None,
    taps: Sequence[int] = (),
    key_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    bias: Tensor | None = None,
    memory_bias: Tensor | None = None,
    rope: Tensor | None = None,
    memory_rope: Tensor | None = None,
    query_ids: Tensor | None = None,
) -> Tensor | tuple[Tensor | None, list[Tensor]]:
    """Compute head(norm(blocks(x))), and the tokens after some of the blocks.

    Args:
        blocks: each maps (B, S, D) to (B, S, D): a `Block`, or another module, which takes the options that are given.
        norm: of the last tokens. None: stop after the last of `taps`.
        x: (B, S, D).
        num_queries: compute what follows the last block's keys and values for the last `num_queries` tokens only. The
            MLP of that block, and the norms after its attention, must not mix tokens.
        checkpointing: recompute the activations of each block in the backward pass.
        head: applied to the normed tokens. None: they are the result.
        memory: (B, Sm, kv_dim) for all blocks, or a list with one per block: None where a block has no `kv_dim`.
        taps: indices of blocks, from 0.
        key_mask, memory_mask, bias, memory_bias, rope, memory_rope: as `Block.forward` takes them, for all blocks;
            those of a memory for the blocks that have one.
        query_ids: (B, Q), as `Block.forward` takes it: the tokens of which the last block computes what follows
            attention, in place of `num_queries`.

    Returns:
        The result, (B, S, D), (B, num_queries, D) or (B, Q, D) without `head`. With `taps`, also the list of the tokens
        after those blocks, in the order of `taps`, before any norm; after the last block they are as many. Without
        `norm`, None and that list.

    Raises:
        TypeError, ValueError: taps out of range; `norm` None without taps or with a head; a list of memories of
            another length than blocks; an option that a block does not take, see `Block.forward`.
    """
    blocks = list(blocks)
    depth = len(blocks)
    if not isinstance(taps, Iterable):
        raise TypeError(f"taps must be a sequence of ints, got {type(taps).__name__}")
    taps = list(taps)
    if taps and not depth:
        raise ValueError(f"taps must be empty without blocks, got {taps}")
    taps = [check_count("taps", tap, 0, depth - 1) for tap in taps]
    if num_queries is not None:
        check_count("num_queries", num_queries, 0, x.shape[1])
        if query_ids is not None:
            raise ValueError("pass num_queries or query_ids, not both")
    if norm is None:
        if not taps or head is not None:
            raise ValueError("norm must be given without taps, and with a head; got None")
        blocks = blocks[: max(taps) + 1]
    memories = [memory] * depth if memory is None or isinstance(memory, Tensor) else list(memory)
    if len(memories) != depth:
        raise ValueError(
            f"memory must be a tensor or a list with one entry for each of {depth} blocks, got {len(memories)}"
        )
    if not blocks:
        x = chosen_tokens(x, num_queries, query_ids)
    narrow = narrow_weights(blocks, head, x)
    stream, states = Stream(x), dict.fromkeys(taps, x)
    for index, (block, of_block) in enumerate(zip(blocks, memories)):
        queries, ids = (num_queries, query_ids) if index == depth - 1 else (None, None)
        options = Options(of_block, key_mask, memory_mask, bias, memory_bias, rope, memory_rope)
        if of_block is None and memory is not None:
            options = options._replace(memory_mask=None, memory_bias=None, memory_rope=None)
        given = options.given()
        run: Callable[..., Any] = partial(checkpoint, block, use_reentrant=False) if checkpointing else block
        if takes_stream(block):
            if ids is not None:
                given["query_ids"] = ids
            stream = run(stream, queries, narrow=narrow, **given)
        else:
            check_takes(f"block {index}", block, given)
            stream = Stream(chosen_tokens(run(stream.sum(), **given), queries, ids))
        if index in states:
            states[index] = stream.sum()
    found = [states[tap] for tap in taps]
    if norm is None:
        return None, found
    if head is None:
        out = add_norm(norm, stream)[0]
    elif stream.branch is not None and stock_norm(norm) and is_stock(head, nn.Linear):
        out = norm_linear(*stream.parts(), norm, head.weight, head.bias, narrow)[0]
    else:
        out = linear(add_norm(norm, stream)[0], head, narrow)
    return (out, found) if taps else out
