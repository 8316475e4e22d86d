"""A simulated CUDA device, whose tensors have shapes, strides and dtypes but no values.

To PyTorch they are meta tensors, on which every build can compute and differentiate; Python code sees them on "cuda:0".
Autocast, foreach kernels of optimisers and the choice of an attention kernel, which in PyTorch depend on a real device,
are done here as CUDA does them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ... import _backends, _dispatch
from ...models import positions, simmim
from ...ops import _channels
from .cards import Card

DEVICE = torch.device("cuda", 0)

# Ops that CUDA's autocast runs in its narrow dtype (NARROW), in float32 (WIDE), and with a float32 result
# (WIDE_RESULT), by the names by which Python code calls them. Calls from other ops in C++ are not seen.
NARROW = frozenset(
    """conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution
    cudnn_convolution cudnn_convolution_transpose prelu addmm addmv addr matmul __matmul__ __rmatmul__ einsum mm mv
    linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell
    lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell _scaled_dot_product_flash_attention
    scaled_dot_product_attention""".split()
)
WIDE = frozenset(
    """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__ __rpow__ softplus
    layer_norm native_layer_norm rms_norm group_norm frobenius_norm nuclear_norm cosine_similarity poisson_nll_loss
    cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss
    margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss
    binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d _upsample_nearest_exact1d
    upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa
    norm""".split()
)
WIDE_RESULT = frozenset("prod softmax log_softmax cumprod cumsum linalg_vector_norm linalg_matrix_norm sum".split())


# an op, its positional and keyword arguments, and its result
See = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]


class _Ops(TorchDispatchMode):
    """Mode that computes shapes and passes every op to `see`; fastmim's ops call the kernels that CUDA tensors get."""

    def __init__(self, see: See, place: "_Place") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.see, self.place = see, place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self.place.within_an_op():
            if func.namespace == "fastmim" and any(isinstance(arg, Tensor) and arg.is_meta for arg in args):
                with self:
                    return _cuda_kernel(func)(*args, **kwargs)
            if func._can_decompose():
                with self:
                    return func.decompose(*args, **kwargs)
            out = func(*args, **kwargs)
        self.see(func, args, kwargs, out)
        return out


def _cuda_kernel(func: Any) -> Callable[..., Any]:
    """Return the kernel that serves an op on a CUDA device; the one in Python, of which plans are made."""
    keys = torch._C.DispatchKey
    if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA"):
        return functools.partial(func._op_dk, keys.CompositeExplicitAutograd)
    if _backends.plans is None:
        return functools.partial(func._op_dk, keys.CUDA)
    recorded = getattr(torch.ops.fastmim_python, func._schema.name.partition("::")[2]).default
    return functools.partial(recorded._op_dk, keys.CompositeExplicitAutograd)


class _Place:
    """Value of `Tensor.device` for meta tensors: the simulated device, but inside an op the meta device."""

    def __init__(self) -> None:
        self.device = DEVICE

    def property(self) -> property:
        real = torch._C.TensorBase.device

        def device(tensor: Tensor) -> torch.device:
            return self.device if tensor.is_meta else real.__get__(tensor)

        return property(device)

    @contextlib.contextmanager
    def within_an_op(self) -> Iterator[None]:
        outside, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = outside


class _Calls(TorchFunctionMode):
    """Mode that moves torch functions called from Python to the meta device and casts as CUDA's autocast does."""

    def __init__(self) -> None:
        super().__init__()
        self.cast: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        on_device = _is_ours(kwargs.get("device"))
        if on_device and func in (torch.tensor, torch.as_tensor, torch.asarray):
            # made on the host and copied to the device
            return func(*args, **kwargs | {"device": "cpu"}).to("meta")
        if on_device:
            kwargs["device"] = "meta"
        args = tuple("meta" if isinstance(arg, torch.device) and _is_ours(arg) else arg for arg in args)
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cuda"):
            if name in NARROW:
                args, kwargs = tree_map_only(Tensor, self._narrow, (args, kwargs))
            elif name in WIDE:
                args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
            elif name in WIDE_RESULT and kwargs.get("dtype") is None and _is_narrow(args[0]):
                kwargs["dtype"] = torch.float32
        if name == "scaled_dot_product_attention":
            return _attention(*args, **kwargs)
        if name == "dropout":
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def during(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a backward pass in which this mode is on too, as blocks that are recomputed need it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return backward(*args, **kwargs)

        return run

    def _narrow(self, tensor: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cuda")
        if not tensor.is_meta or tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return tensor
        if not (tensor.dtype == torch.float32 and tensor.requires_grad and tensor.is_leaf):
            return tensor.to(dtype)
        if id(tensor) not in self.cast:
            self.cast[id(tensor)] = tensor, tensor.to(dtype)
        return self.cast[id(tensor)][1]


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Call the kernel that draws and applies dropout in one pass, which tensors of other devices don't get."""
    if not training or not 0 < p < 1 or inplace or not x.is_meta:
        return torch.dropout(x, p, training)
    return torch.native_dropout(x, p, training)[0]


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if _is_narrow(tensor) else tensor


def _is_narrow(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_meta and tensor.dtype in (torch.float16, torch.bfloat16)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Call the attention that PyTorch chooses: flash for 16 bits without a mask, the formula for float64, else its own.

    Without a GPU cuDNN's is not chosen, nor padding of heads and masks for alignment.
    """
    aten = torch.ops.aten
    out: Tensor
    if q.dtype == torch.float64 or kwargs.get("enable_gqa"):
        out = aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **kwargs)[
            0
        ]
    elif attn_mask is None and q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0:
        out = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    else:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=q.dtype)
            attn_mask = bias.masked_fill_(attn_mask.logical_not(), -torch.inf)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        out = aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask, learns, dropout_p, is_causal, scale=scale
        )[0]
    return out


@contextlib.contextmanager
def own_constants() -> Iterator[None]:
    """Clear constants that are cached by device: none of a real one is found inside, nor a simulated one outside."""
    caches = _channels._constant, simmim._kept, positions._rope_table
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()


@contextlib.contextmanager
def simulated(card: Card, see: See, launched: Callable[[str, dict[str, Any]], None]) -> Iterator[None]:
    """Simulate `card` as device "cuda:0" inside the context.

    Args:
        card: the GPU that the kernels are chosen for.
        see: called with every op below autograd and autocast, those of CPU tensors included.
        launched: called with name and arguments of every launch of fastmim's Triton kernels.
    """
    facts = SimpleNamespace(
        major=card.capability[0], minor=card.capability[1], multi_processor_count=card.multiprocessors
    )
    calls, place = _Calls(), _Place()
    with contextlib.ExitStack() as stack:
        for name, value in {
            "torch.cuda.device": lambda device: contextlib.nullcontext(),
            "torch.cuda.get_device_capability": lambda device=None: card.capability,
            "torch.cuda.get_device_properties": lambda device=None: facts,
            "torch.cuda.is_bf16_supported": lambda *args: True,
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.clear_autocast_cache": calls.cast.clear,
            "torch.autograd._engine_run_backward": calls.during(torch.autograd.graph._engine_run_backward),
            "torch.utils._foreach_utils._get_foreach_kernels_supported_devices": lambda: ["cuda", "meta"],
        }.items():
            stack.enter_context(mock.patch(name, value))
        # which a process keeps
        stack.enter_context(mock.patch.object(_dispatch, "_capability", lambda device: list(card.capability)))
        stack.enter_context(mock.patch.object(Tensor, "device", place.property()))
        stack.enter_context(own_constants())
        stack.enter_context(_dispatch.recorded_launches(launched))
        stack.enter_context(calls)
        stack.enter_context(_Ops(see, place))
        yield
