"""Checks on arguments. Each error names the argument, what it was and what is allowed."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IMAGE_DTYPES = (torch.uint8, torch.uint16, *FLOATING)


def can_be_read(*tensors: Tensor) -> bool:
    """Return whether the host can read values of all tensors: on the CPU, and outside of traced and mapped functions.

    Reading values of another device would wait for it.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or get_proxy_mode() is not None:
        return False
    functorch = torch._C._functorch
    return all(
        type(x) is Tensor and x.device.type == "cpu" and not functorch.is_functorch_wrapped_tensor(x) for x in tensors
    )


def check_tensor(name: str, value: object, shape: Sequence[int | None] | None = None, *, letters: str = "") -> None:
    """Check that `value` is a tensor and has `shape`, if one is given (None: any size)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if shape is None or _has_shape(value, shape):
        return
    allowed = ", ".join("any" if size is None else str(size) for size in shape)
    meaning = f", which is {letters}" if letters else ""
    raise ValueError(f"{name} must have shape ({allowed}){meaning}; got {tuple(value.shape)}")


def _has_shape(value: Tensor, shape: Sequence[int | None]) -> bool:
    sizes = value.shape
    if len(sizes) != len(shape):
        return False
    for size, expected in zip(sizes, shape):  # noqa: SIM110, a generator takes twice as long
        if expected is not None and expected != size:
            return False
    return True


def check_floating(name: str, value: Tensor, *, also_uint8: bool = False) -> None:
    """Check that `value` is of a floating dtype that the ops support."""
    if value.dtype not in FLOATING and not (also_uint8 and value.dtype == torch.uint8):
        allowed = "uint8, " * also_uint8 + "float64, float32, bfloat16 or float16"
        raise TypeError(f"{name} must be of dtype {allowed}; got {value.dtype}")


def check_same(attribute: str, **tensors: Tensor | None) -> None:
    """Check that all given tensors agree in `attribute`, "dtype" or "device"."""
    first = None
    for value in tensors.values():
        if value is not None:
            found = getattr(value, attribute)
            if first is None:
                first = found
            elif found != first:
                break
    else:
        return
    given = {name: getattr(value, attribute) for name, value in tensors.items() if value is not None}
    got = ", ".join(f"{name} on {v}" if attribute == "device" else f"{name} of {v}" for name, v in given.items())
    error = TypeError if attribute == "dtype" else ValueError
    raise error(f"{', '.join(given)} must have the same {attribute}; got {got}")


def check_ids(name: str, ids: object, batch: int | None = None) -> Tensor:
    """Check that `ids` is an integer tensor (B, K), and return it as int64."""
    check_tensor(name, ids, (batch, None), letters="(batch, ids per row)")
    assert isinstance(ids, Tensor)
    if ids.dtype == torch.int64:
        return ids
    if ids.dtype != torch.int32:
        raise TypeError(f"{name} must be of dtype int64 (or int32); got {ids.dtype}")
    return ids.long()


def check_count(name: str, value: object, low: int, high: int | None = None) -> int:
    """Check that `value` is an integer, NumPy's included, in low..high, and return it as an int."""
    # SymInt, the compiler's integer, is not registered as an Integral
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    count: Any = value if isinstance(value, (int, torch.SymInt)) else int(value)
    if count < low or (high is not None and count > high):
        allowed = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {allowed}, got {count}")
    checked: int = count
    return checked


def check_number(name: str, value: object) -> float:
    """Check that `value` is a number, NumPy's included, and return it as Python's."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    number: Any = value if isinstance(value, (int, float, torch.SymFloat)) else float(value)
    checked: float = number
    return checked


def check_ratio(name: str, value: object, *, one: bool = False) -> float:
    """Check that `value` is a finite number in (0, 1), or in (0, 1] where `one`, and return it."""
    ratio = check_number(name, value)
    if math.isnan(ratio) or not (0 < ratio < 1 or (one and ratio == 1)):
        raise ValueError(f"{name} must be in (0, 1{']' if one else ')'}, got {ratio}")
    return float(ratio)


def axes(name: str, value: object, count: int) -> list[int]:
    """Return an int, or one positive int per axis, as a list of `count` ints."""
    values = value
    # asked first, because an abstract class such as Integral takes long to answer
    if not isinstance(value, (tuple, list)) and isinstance(value, (int, numbers.Integral)):
        values = [value] * count
    if not isinstance(values, (tuple, list)) or len(values) != count:
        raise ValueError(f"{name} must be an int or one int per axis ({count} of them), got {value!r}")
    return [check_count(name, size, 1) for size in values]


def check_images(images: object) -> None:
    """Check that `images` is (B, C, T), (B, C, H, W) or (B, C, T, H, W), uint8, uint16 or floating."""
    check_tensor("images", images)
    assert isinstance(images, Tensor)
    if images.dim() not in (3, 4, 5):
        raise ValueError(f"images must be (B, C, T), (B, C, H, W) or (B, C, T, H, W), got shape {tuple(images.shape)}")
    if images.dtype not in IMAGE_DTYPES:
        raise TypeError(
            f"images must be of dtype uint8, uint16, float64, float32, bfloat16 or float16; got {images.dtype}"
        )


def patch_grid(images: Tensor, patch_size: object) -> tuple[list[int], list[int]]:
    """Return `patch_size` as a list, and the grid of patches on `images` (B, C, *sizes) of 1 to 3 axes."""
    check_images(images)
    sizes = images.shape[2:]
    patch = axes("patch_size", patch_size, len(sizes))
    grid = []
    for size, p in zip(sizes, patch):
        if size % p:
            raise ValueError(
                f"images of size {tuple(sizes)} can't be cut into patches: "
                f"each side must be a multiple of patch_size {tuple(patch)}"
            )
        grid.append(size // p)
    return patch, grid


def import_error(error: ImportError, package: str, advice: str) -> ImportError:
    """Return an error with `advice` where `package` is absent, else with the reason why its own import fails."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package:
        return ImportError(advice)
    cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
    return ImportError(f"{package} is installed, but importing it fails: {error}{cause}")
