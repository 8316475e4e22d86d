"""FLOPs of attention and `embed_patches` for `torch.utils.flop_counter`, which sees the products of other ops itself.

Attention is counted as torch counts its own: two products forward; five backward, which computes the scores again.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Shape = Sequence[int]
_COUNTER = "torch.utils.flop_counter"


def _attention(products: int, q: Shape, k: Shape) -> int:
    batch, queries, heads, dim = q
    return 2 * products * batch * heads * queries * k[1] * dim


def _ragged(products: int, q: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int) -> int:
    """Count by the lengths of the sequences; for tensors without values as if all were the longest."""
    if cu_q.device.type == "meta" or type(cu_q) is not Tensor:
        pairs = (cu_q.shape[0] - 1) * longest_q * longest_k
    else:
        pairs = int((cu_q.diff().long() * cu_k.diff().long()).sum())
    return 2 * products * pairs * q.shape[1] * q.shape[2]


def _embed(images: Shape, ids: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    width, *patch = weight
    return 2 * torch.Size(ids).numel() * width * torch.Size(patch).numel()


# formulas of shapes; the gradients that are not listed consist of products that torch counts
FORMULAS = {
    "attention": lambda q, k, *args, **kwargs: _attention(2, q, k),
    "attention_backward": lambda grad, q, k, *args, **kwargs: _attention(5, q, k),
    "attention_qkvpacked": lambda qkv, *args, **kwargs: _attention(2, (*qkv[:2], *qkv[3:]), qkv),
    "attention_qkvpacked_backward": lambda grad, qkv, *args, **kwargs: _attention(5, grad, qkv),
    "embed_patches": _embed,
}
# formulas of tensors
RAGGED_FORMULAS = {
    "attention_varlen": lambda q, k, v, *args, **kwargs: _ragged(2, q, *args[:4]),
    "attention_varlen_backward": lambda grad, q, k, v, *args, **kwargs: _ragged(5, q, *args[:4]),
}


def _register(counter: ModuleType) -> None:
    for formulas, raw in ((FORMULAS, False), (RAGGED_FORMULAS, True)):
        for name, formula in formulas.items():
            counter.register_flop_formula(getattr(torch.ops.fastmim, name), get_raw=raw)(formula)


class _Waiting:
    """Import hook that finds nothing itself; it registers the formulas when the counter is imported."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(_Waiting)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register the formulas now, or as soon as the counter is imported.

    `import fastmim` does not import the counter, because it imports Triton.
    """
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Waiting)
