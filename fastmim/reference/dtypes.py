"""Dtypes of arithmetic and of gradients."""

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Return x in the dtype of arithmetic: float64 as it is, all others as float32."""
    return x if x.dtype == torch.float64 else x.float()


def upcast_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of arithmetic on tensors of these dtypes: float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a gradient computed in the forward pass: a mean's gradient underflows in float16."""
    return torch.float32 if dtype == torch.float16 else dtype
