"""Blocks in the manner of timm, by structure: timm's own, of any version, and the copies that forks carry."""

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...nn.fused import linear
from .layers import attention_serves, mlp_of, no_kernel, norm_mlp_of, project, stock_mlp, stock_norm
from .recognise import disagrees, exact_gelu, fingerprint, idle, idle_but, impure
from .swap import Choice, Fast, callable_parts

# of forward in timm 1.0.31's Attention, Mlp and Block
KNOWN = frozenset("33c1e99920fa698b 0169cf1b284930a1 285778e185d896e6".split())
_ATTENTION = (
    "qkv proj attn_drop proj_drop q_norm k_norm norm num_heads heads head_dim attn_dim scale fused_attn".split()
)
_MLP = "fc1 act fc2 drop drop1 drop2 norm".split()
_BLOCK = "norm1 attn ls1 drop_path1 norm2 mlp ls2 drop_path2 drop_path".split()


class Attention(Fast):
    """Self-attention with a fused qkv projection."""

    what = "attention of short sequences"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, S, D) -> (B, S, D)."""
        if _asks_for_more(args, kwargs) or not self.serves(x):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        return self.attend(x, x)

    def serves(self, x: Tensor) -> bool:
        """Whether a kernel does, and nothing between the projections does more."""
        return idle_but(self, "qkv", "proj") and attention_serves(self._head_dim(), x)

    def attend(self, queries: Tensor, x: Tensor) -> Tensor:
        """queries, the last Q of x (B, S, D) -> (B, Q, D)."""
        heads, scale = (-1, self._head_dim()), self._scale()
        if queries is x:
            (qkv,) = project(x, self.qkv)
            out = ops.attention_qkvpacked(qkv.unflatten(-1, (3, *heads)), scale=scale)
        else:
            q, k, v = self.qkv(x).unflatten(-1, (3, *heads)).unbind(2)
            out = ops.attention(q[:, x.shape[1] - queries.shape[1] :], k, v, scale=scale)
        return linear(out.flatten(2), self.proj)

    def _head_dim(self) -> int:
        # what has been put in place of the projection may not tell its width: no kernel serves heads of 0
        dim: int = getattr(self.qkv, "out_features", 0) // 3 // _heads(self)
        return dim

    def _scale(self) -> float | None:
        # PyTorch's attention, where it is used, takes no scale from timm
        scale: float | None = None if getattr(self, "fused_attn", False) else getattr(self, "scale", None)
        return scale


class Mlp(Fast):
    """Linear, exact GELU, linear."""

    what = "GELU without its result kept"

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.fuses():
            return mlp_of(x, self.fc1, self.fc2)
        out: Tensor = super().forward(x)
        return out

    def fuses(self) -> bool:
        """Whether nothing but an exact GELU is between or after two linear layers that may be fused."""
        activation = self._modules.get("act")
        exact = activation is None or exact_gelu(activation)
        return exact and idle_but(self, "fc1", "act", "fc2") and stock_mlp(self.fc1, self.fc2)


class Block(Fast):
    """A pre-norm block: residual sum, norm and MLP in few passes."""

    what = "residual sum, norm and MLP fused"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, S, D) -> (B, S, D)."""
        if _asks_for_more(args, kwargs):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        return self.finish(self.attn(self.norm1(x)), x)

    def forward_last(self, x: Tensor, count: int) -> Tensor:
        """What `forward` gives for the last `count` tokens: (B, count, D)."""
        attention = self.attn
        if not callable_parts(self, Block) or not callable_parts(attention, Attention):
            out: Tensor = self(x)
            return out[:, -count:]
        normed = self.norm1(x)
        attended = attention.attend(normed[:, -count:], normed) if attention.serves(normed) else attention(normed)
        return self.finish(attended[:, -count:], x[:, -count:])

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """The second half of the block."""
        attended, mlp, norm = self._after("1", attended), self.mlp, self.norm2
        if callable_parts(mlp, Mlp) and mlp.fuses() and stock_norm(norm):
            out, residual = norm_mlp_of(attended, residual, norm, mlp.fc1, mlp.fc2)
        else:
            residual = residual + attended
            out = mlp(norm(residual))
        return residual + self._after("2", out)

    def _after(self, half: str, branch: Tensor) -> Tensor:
        """Layer scale and drop path, where there are."""
        for name in (f"ls{half}", f"drop_path{half}", "drop_path"):
            part = self._modules.get(name)
            branch = branch if part is None else part(branch)
        return branch


def choose(module: Any) -> Choice | None:
    """What to accelerate `module` as, why it stays as it is, or None: it is no part of a block."""
    children = module._modules
    if _all_are(module, nn.Linear, "qkv", "proj"):
        return _settle(module, Attention, _ATTENTION, children["qkv"].in_features, _no_attention(module))
    if _all_are(module, nn.Linear, "fc1", "fc2"):
        return _settle(module, Mlp, _MLP, children["fc1"].in_features, _no_mlp(module))
    if _all_are(module, nn.Module, "norm1", "attn", "norm2", "mlp"):
        return _settle(module, Block, _BLOCK, _width(module), _no_block(module))
    return None


def _settle(module: Any, mixin: type[Fast], parts: list[str], width: int | None, refused: str | None) -> Choice:
    """`mixin`, if `module` is shaped for it, can do nothing else and computes the same."""
    if refused is None and not _known(module):
        refused = impure(module, "forward", parts) or disagrees(
            module, (mixin,), lambda twin: twin(torch.randn(2, 5, width or 1, dtype=torch.float64))
        )
    return Choice((mixin,)) if refused is None else Choice(kept=(refused,))


def _known(module: Any) -> bool:
    """Whether `module` and what it holds are timm's, of a version that has been read."""
    packages = {type(part).__module__.partition(".")[0] for part in module.modules()}
    own = "forward" not in vars(module) and fingerprint(type(module).forward) in KNOWN
    return own and packages <= {"timm", "torch", "fastmim"}


def _no_attention(module: Any) -> str | None:
    """Why `module` is not shaped as `Attention` is, or None."""
    dropout = [name for name in ("attn_drop", "proj_drop") if _dropout(module, name)]
    if dropout:
        return f"{dropout[0]} of {_dropout(module, dropout[0]):g} is active: it keeps its own attention"
    heads = _heads(module)
    if not isinstance(heads, int) or heads < 1 or module.qkv.out_features % (3 * heads):
        return f"its heads can't be told: num_heads is {heads!r}"
    if module.qkv.out_features // 3 != module.proj.in_features:
        return "its projections don't fit each other"
    return no_kernel(module.qkv.out_features // 3 // heads) or _others(module, "qkv", "proj")


def _no_mlp(module: Any) -> str | None:
    """Why `module` is not shaped as `Mlp` is, or None."""
    activation = module._modules.get("act")
    # without an activation among its modules, it is asked what it computes
    if activation is not None and not exact_gelu(activation):
        return f"its activation is {activation}, not the exact GELU"
    return _others(module, "fc1", "act", "fc2")


def _no_block(module: Any) -> str | None:
    """Why `module` is not shaped as `Block` is, or None."""
    mlp = choose(module.mlp)
    if mlp is None or Mlp not in mlp.mixins:
        return "its MLP stays as it is, so that there is nothing to fuse"
    if not stock_norm(module.norm2):
        return f"its norm2 is {module.norm2}"
    others = [name for name, part in module.named_children() if name not in _BLOCK and not idle(part)]
    return f"it has {others[0]} besides" if others else None


def _others(module: Any, *known: str) -> str | None:
    """What else is in `module`, or None: parts that do nothing don't count."""
    others = [name for name, part in module._modules.items() if name not in known and not idle(part)]
    others += [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    return f"it has {others[0]} besides" if others else None


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


def _asks_for_more(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether anything but the input was given: a mask, say."""
    return any(value is not None and value is not False for value in (*args, *kwargs.values()))
