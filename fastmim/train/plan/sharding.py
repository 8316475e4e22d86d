"""Memory of the exchange between processes, taken and given back as DDP and FSDP2 do."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .ledger import Ledger


class Replicas:
    """Whole weights on each process; with several, DDP's buckets, which stay and become the gradients.

    Args:
        objective: the module that is trained.
        world: processes.
        ledger: record of the memory.

    Attributes:
        last: whether gradients are exchanged after the next backward pass.
    """

    def __init__(self, objective: nn.Module, world: int, ledger: Ledger) -> None:
        self.ledger, self.last = ledger, True
        self.buckets: dict[Tensor, Tensor] = {}
        for p in objective.parameters():
            if p.requires_grad:
                if world > 1:
                    self.buckets[p] = torch.empty_like(p, requires_grad=False)
                    ledger.tag([self.buckets[p]], "gradients")
                p.register_post_accumulate_grad_hook(self._made)

    def part(self, value: Tensor) -> int:
        """Return the bytes of a process's part of a parameter or its state."""
        return value.untyped_storage().nbytes()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Do what is done around the forward pass."""
        yield

    def _made(self, p: Tensor) -> None:
        assert p.grad is not None
        if p in self.buckets and self.last:
            p.grad = self.buckets[p].copy_(p.grad)
        else:
            self.ledger.tag([p.grad], "gradients")


class Shards:
    """Weights, gradients and state in equal parts, gathered block by block (FSDP2).

    While a block runs forward, its weights are there twice: as gathered, until the next block gathers, and copied out.
    In the backward pass the next block's are gathered ahead. A block's gradients are copied into one buffer, which is
    kept until the next block's is reduced. What belongs to no block stays gathered between the passes.
    """

    def __init__(self, objective: nn.Module, world: int, ledger: Ledger) -> None:
        self.world, self.ledger, self.last = world, ledger, True
        model: Any = objective.model
        blocks = [*getattr(model, "blocks", ()), *getattr(model, "decoder_blocks", ())]
        self.groups = [_Group(list(block.parameters()), self) for block in blocks]
        own = {p for group in self.groups for p in group.parameters}
        self.root = _Group([p for p in objective.parameters() if p not in own], self)
        # gathered weights of a block, and its gradients, that are kept until the next one's
        self.gathered: Tensor | None = None
        self.reduced: Tensor | None = None
        for before, group, block in zip([None, *self.groups], self.groups, blocks):
            group.before = before
            block.register_forward_pre_hook(group.enter, with_kwargs=True)
            block.register_forward_hook(group.leave)

    def part(self, value: Tensor) -> int:
        """Return the bytes of a process's part of a parameter or its state, split along the first axis and padded."""
        if not value.dim():
            return value.element_size()
        return math.ceil(len(value) / self.world) * math.prod(value.shape[1:]) * value.element_size()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Gather the weights of no block, which stay until their gradients are reduced."""
        self.root.gather()
        yield
        self.gathered = None


class _Group:
    """Parameters that are gathered together."""

    def __init__(self, parameters: list[Tensor], shards: Shards) -> None:
        self.parameters, self.shards = parameters, shards
        self.trained = [p for p in parameters if p.requires_grad]
        self.before: _Group | None = None
        self.whole: Tensor | None = None
        self.ahead: Tensor | None = None
        self.awaited: set[Tensor] = set()
        for p in self.trained:
            p.register_post_accumulate_grad_hook(self._made)

    def _empty(self, parameters: list[Tensor]) -> Tensor:
        size = sum(self.shards.part(p) for p in parameters) * self.shards.world
        with self.shards.ledger.making(kind="gathered", stage=""):
            return parameters[0].new_empty(size, dtype=torch.uint8)

    def gather(self) -> None:
        if self.whole is None and self.parameters:
            shards = self.shards
            gathered = self._empty(self.parameters) if self.ahead is None else self.ahead
            self.ahead, shards.gathered = None, None
            self.whole = self._empty(self.parameters)
            shards.gathered = gathered
        self.awaited = set(self.trained)

    def enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self.gather()

    def leave(self, block: nn.Module, args: Any, out: Any) -> None:
        self.whole = None
        tensors = [value for value in (out if isinstance(out, tuple) else (out,)) if isinstance(value, Tensor)]
        made = next((value for value in tensors if value.requires_grad), None)
        if made is not None:
            made.register_hook(self._enter_backward)

    def _enter_backward(self, grad: Tensor) -> None:
        self.gather()
        self.shards.gathered = None
        if self.before is not None and self.before.parameters:
            self.before.ahead = self._empty(self.before.parameters)

    def _made(self, p: Tensor) -> None:
        self.awaited.discard(p)
        if self.awaited or not self.shards.last:
            return
        shards = self.shards
        self.whole, buffer = None, self._empty(self.trained)
        for p in self.trained:
            grad = p.grad
            p.grad = None
            del grad
        shards.reduced = buffer
        for p in self.trained:
            with shards.ledger.making(kind="gradients", stage=""):
                p.grad = torch.empty_like(p, requires_grad=False)
                shards.ledger.tag([p.grad], "gradients", [shards.part(p)])
