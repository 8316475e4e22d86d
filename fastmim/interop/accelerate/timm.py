"""Blocks with timm's structure: those of any version of timm, and copies of them in other code."""

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...nn.fused import linear
from .layers import attention_serves, mlp_of, no_kernel, norm_mlp_of, project
from .recognise import differs, fingerprint, replaced, side_effects
from .stock import fuses_with_gelu, is_exact_gelu, is_idle, is_layer_norm, only_runs
from .swap import Choice, Fast, is_fast

# fingerprints of the forward of Attention, Mlp and Block in timm 1.0.31
KNOWN = frozenset("33c1e99920fa698b 0169cf1b284930a1 285778e185d896e6".split())
# names that the forward of each may use
_ATTENTION = (
    "qkv proj attn_drop proj_drop q_norm k_norm norm num_heads heads head_dim attn_dim scale fused_attn".split()
)
_MLP = "fc1 act fc2 drop drop1 drop2 norm".split()
_BLOCK = "norm1 attn ls1 drop_path1 norm2 mlp ls2 drop_path2 drop_path".split()


class Attention(Fast):
    """Self-attention with a fused qkv projection."""

    description = "attention of short sequences"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (B, S, D) to (B, S, D)."""
        if _has_options(args, kwargs) or not self.serves(x):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        return self.attend(x, x)

    def serves(self, x: Tensor) -> bool:
        """Return whether a kernel serves x, and only attention runs between the projections."""
        return only_runs(self, "qkv", "proj") and attention_serves(self._head_dim(), x)

    def attend(self, queries: Tensor, x: Tensor) -> Tensor:
        """Return (B, Q, D): the attention of `queries`, the last Q rows of x, to x (B, S, D)."""
        heads, scale = (-1, self._head_dim()), self._scale()
        if queries is x:
            (qkv,) = project(x, self.qkv)
            out = ops.attention_qkvpacked(qkv.unflatten(-1, (3, *heads)), scale=scale)
        else:
            q, k, v = self.qkv(x).unflatten(-1, (3, *heads)).unbind(2)
            out = ops.attention(q[:, x.shape[1] - queries.shape[1] :], k, v, scale=scale)
        return linear(out.flatten(2), self.proj)

    def _head_dim(self) -> int:
        # 0, which no kernel serves, where a replaced projection has no out_features
        dim: int = getattr(self.qkv, "out_features", 0) // 3 // _heads(self)
        return dim

    def _scale(self) -> float | None:
        # timm passes no scale to PyTorch's attention
        scale: float | None = None if getattr(self, "fused_attn", False) else getattr(self, "scale", None)
        return scale


class Mlp(Fast):
    """Linear layer, exact GELU, linear layer."""

    description = "GELU without its result kept"

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D)."""
        if self.fuses():
            return mlp_of(x, self.fc1, self.fc2)
        out: Tensor = super().forward(x)
        return out

    def fuses(self) -> bool:
        """Return whether the linear layers may be fused with an exact GELU between them, and nothing else runs."""
        activation = self._modules.get("act")
        exact = activation is None or is_exact_gelu(activation)
        return exact and only_runs(self, "fc1", "act", "fc2") and fuses_with_gelu(self.fc1, self.fc2)


class Block(Fast):
    """Pre-norm block with residual sum, norm and MLP fused."""

    description = "residual sum, norm and MLP fused"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (B, S, D) to (B, S, D)."""
        if _has_options(args, kwargs):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        return self.finish(self.attn(self.norm1(x)), x)

    def forward_last(self, x: Tensor, count: int) -> Tensor:
        """Return the output of `forward` for the last `count` tokens, (B, count, D)."""
        attention = self.attn
        if not is_fast(self, Block) or not is_fast(attention, Attention):
            out: Tensor = self(x)
            return out[:, -count:]
        normed = self.norm1(x)
        attended = attention.attend(normed[:, -count:], normed) if attention.serves(normed) else attention(normed)
        return self.finish(attended[:, -count:], x[:, -count:])

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Add `attended` to the residual stream, then the MLP's output."""
        attended, mlp, norm = self._after("1", attended), self.mlp, self.norm2
        if is_fast(mlp, Mlp) and mlp.fuses() and is_layer_norm(norm):
            out, residual = norm_mlp_of(attended, residual, norm, mlp.fc1, mlp.fc2)
        else:
            residual = residual + attended
            out = mlp(norm(residual))
        return residual + self._after("2", out)

    def _after(self, half: str, branch: Tensor) -> Tensor:
        """Apply the layer scale and drop path that the block has."""
        for name in (f"ls{half}", f"drop_path{half}", "drop_path"):
            part = self._modules.get(name)
            branch = branch if part is None else part(branch)
        return branch


def choose(module: Any) -> Choice | None:
    """Decide how to accelerate `module`; None if it is no part of a block."""
    children = module._modules
    if _all_are(module, nn.Linear, "qkv", "proj"):
        return _settle(module, Attention, _ATTENTION, children["qkv"].in_features, _no_attention(module))
    if _all_are(module, nn.Linear, "fc1", "fc2"):
        return _settle(module, Mlp, _MLP, children["fc1"].in_features, _no_mlp(module))
    if _all_are(module, nn.Module, "norm1", "attn", "norm2", "mlp"):
        return _settle(module, Block, _BLOCK, _width(module), _no_block(module))
    return None


def _settle(module: Any, mixin: type[Fast], parts: list[str], width: int | None, reason: str | None) -> Choice:
    """Choose `mixin` unless there is a `reason` against it, a side effect, or a difference in results."""
    if reason is None and not _is_known(module):
        reason = side_effects(module, "forward", parts) or differs(
            module, (mixin,), lambda twin: twin(torch.randn(2, 5, width or 1, dtype=torch.float64))
        )
    return Choice((mixin,)) if reason is None else Choice(kept=(reason,))


def _is_known(module: Any) -> bool:
    """Return whether `module` and its parts are classes of timm and torch, with a `forward` of a known fingerprint."""
    packages = {type(part).__module__.partition(".")[0] for part in module.modules()}
    stock = not replaced(module, "forward") and fingerprint(type(module).forward) in KNOWN
    return stock and packages <= {"timm", "torch", "fastmim"}


def _no_attention(module: Any) -> str | None:
    """Reason why `Attention` does not fit `module`, or None."""
    dropout = [name for name in ("attn_drop", "proj_drop") if _dropout(module, name)]
    if dropout:
        return f"{dropout[0]} of {_dropout(module, dropout[0]):g} is active: it keeps its own attention"
    heads = _heads(module)
    if not isinstance(heads, int) or heads < 1 or module.qkv.out_features % (3 * heads):
        return f"its num_heads is {heads!r}"
    if module.qkv.out_features // 3 != module.proj.in_features:
        return "its projections don't fit each other"
    return no_kernel(module.qkv.out_features // 3 // heads) or _others(module, "qkv", "proj")


def _no_mlp(module: Any) -> str | None:
    """Reason why `Mlp` does not fit `module`, or None."""
    activation = module._modules.get("act")
    # an activation that is no module shows in the results, which are compared
    if activation is not None and not is_exact_gelu(activation):
        return f"its activation is {activation}, not the exact GELU"
    return _others(module, "fc1", "act", "fc2")


def _no_block(module: Any) -> str | None:
    """Reason why `Block` does not fit `module`, or None."""
    mlp = choose(module.mlp)
    if mlp is None or Mlp not in mlp.mixins:
        return "its MLP is kept, so that there is nothing to fuse"
    if not is_layer_norm(module.norm2):
        return f"its norm2 is {module.norm2}"
    others = [name for name, part in module.named_children() if name not in _BLOCK and not is_idle(part)]
    return f"it also has {others[0]}" if others else None


def _others(module: Any, *parts: str) -> str | None:
    """Reason that names a child, parameter or buffer of `module` that is not in `parts` and not idle, or None."""
    others = [name for name, part in module._modules.items() if name not in parts and not is_idle(part)]
    others += [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    return f"it also has {others[0]}" if others else None


def _dropout(module: Any, name: str) -> float:
    part = getattr(module, name, 0.0)
    rate = part.p if isinstance(part, nn.Dropout) else part
    return float(rate) if isinstance(rate, (int, float)) else 0.0


def _heads(module: Any) -> Any:
    return getattr(module, "num_heads", getattr(module, "heads", None))


def _width(module: Any) -> int | None:
    shape = getattr(module.norm1, "normalized_shape", None)
    return shape[0] if shape and len(shape) == 1 else None


def _all_are(module: Any, kind: type[nn.Module], *names: str) -> bool:
    return all(isinstance(module._modules.get(name), kind) for name in names)


def _has_options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call has arguments beside its input, such as a mask."""
    return any(value is not None and value is not False for value in (*args, *kwargs.values()))
