"""Cases and the rule of comparison that the op tests share: dtypes, sizes, layouts, tolerances."""

import itertools
import math
import os
import random
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

TEST_ALL = os.environ.get("FASTMIM_TEST_ALL") == "1"
# where op tests put their tensors: cpu, cuda or meta; given, only tests that concern a device run (see conftest.py)
DEVICE = os.environ.get("FASTMIM_TEST_DEVICE", "cpu")
ON_DEVICE = "FASTMIM_TEST_DEVICE" in os.environ
TEST_TRITON = os.environ.get("FASTMIM_TEST_KERNELS", "triton" if ON_DEVICE else "") == "triton"
TEST_CUDA = os.environ.get("FASTMIM_TEST_KERNELS") == "cuda"

# float64 is always the reference's
DTYPES = (torch.float32, torch.bfloat16, torch.float16) + (() if TEST_TRITON or TEST_CUDA else (torch.float64,))
if DEVICE == "meta":
    DTYPES = DTYPES[1:2]
NARROW = (torch.bfloat16, torch.float16)
WIDTHS = (1, 7, 32, 48, 63, 64, 65, 72, 80, 88, 127, 192, 384, 768, 1023, 1280)
# of an attention head; on a device those that its kernels serve
HEAD_WIDTHS = (8, 32, 48, 64, 72, 80, 88, 96, 128) if ON_DEVICE else WIDTHS
HEAD_WIDTH = 8 if ON_DEVICE else 7
LENGTHS = (1, 2, 3, 5, 17, 49, 50, 65, 196, 197, 257)
KEEPS = (1, 2, "all")
BATCHES = (1, 5)  # and 0, which has a test of its own: it would waste the case's dtype and layout
# channels, patch size and grid of pictures, clips and signals
PICTURES = (
    (1, (1, 1), (1, 1)),
    (3, (16, 16), (2, 3)),
    (3, (14, 14), (2, 2)),
    (1, (7, 5), (5, 2)),
    (14, (2, 2), (7, 7)),
    (4, (8, 4), (3, 1)),
    (3, (1, 1), (17, 1)),
    (5, (3, 3), (14, 14)),
    (3, (2, 16, 16), (1, 1, 2)),
    (2, (1, 3, 2), (3, 1, 2)),
    (3, (2, 4, 4), (2, 2, 3)),
    (1, (16,), (9,)),
    (12, (5,), (7,)),
)
# the last two are layouts of the gradient that arrives; the inputs are contiguous then
LAYOUTS = (
    "contiguous",
    "strided",
    "expanded",
    "offset",
    "misaligned",
    "transposed",
    "transposed gradient",
    "expanded gradient",
)


# ---- which cases -----------------------------------------------------------------------------------------------------


def covering(lists: dict[str, Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Return few rows that hold every pair of dtype and layout, and every value of each list about equally often."""
    paired = [name for name in ("dtype", "layout") if name in lists]
    pairs = list(itertools.product(*(lists[name] for name in paired)))
    count = max(len(pairs), *map(len, lists.values()))
    columns = dict(zip(paired, zip(*(pairs[i % len(pairs)] for i in range(count)))))
    for name in lists.keys() - paired:
        # shuffled by its own name, so that no list walks in step with another
        shuffle, column = random.Random(name), []
        while len(column) < count:
            column += shuffle.sample(lists[name], len(lists[name]))
        columns[name] = tuple(column[:count])
    return list(zip(*(columns[name] for name in lists)))


def cases(options: dict[str, Sequence[Any]] | None = None, **lists: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a covering selection of lists and options; with FASTMIM_TEST_ALL=1 the full product of the lists.

    `options` are further arguments whose product with everything else would say nothing new: they are spread over
    the rows in either case.
    """
    options = options or {}
    if not TEST_ALL:
        return [dict(zip((*lists, *options), row)) for row in covering({**lists, **options})]
    rows = [dict(zip(lists, row)) for row in itertools.product(*lists.values())]
    draw = random.Random(0)
    return [row | {name: draw.choice(values) for name, values in options.items()} for row in rows]


def grouped(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group rows by dtype and layout: two hundred thousand tests would take longer than their rows."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["layout"]), []).append(row)
    return list(groups.values())


def group_label(rows: list[dict[str, Any]]) -> str:
    """Return a test's id: its case, or what its cases share."""
    return label(rows[0] if len(rows) == 1 else {name: rows[0][name] for name in ("dtype", "layout")})


def label(case: dict[str, Any]) -> str:
    """Return a case as a test id."""
    return "-".join(f"{value}".removeprefix("torch.").replace(" ", "_") for value in case.values())


# ---- values ----------------------------------------------------------------------------------------------------------


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Return rows `ids` of x (B, L, D) by PyTorch alone: with an index per value."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def cut(images: Tensor, patch: Sequence[int]) -> Tensor:
    """Return all patches (B, L, C, values of a channel) of images (B, C, *sizes)."""
    for axis, size in enumerate(patch):
        images = images.unfold(2 + axis, size, size)
    return images.flatten(2 + len(patch)).flatten(2, 1 + len(patch)).transpose(1, 2)


def normalized(images: Tensor, mean: Any, std: Any, dtype: torch.dtype) -> Tensor:
    """Return whole images as a data loader normalises them, computed in `dtype`."""
    pixels = images.to(dtype)
    if images.dtype == torch.uint8:
        pixels = pixels / 255
    elif images.dtype == torch.uint16:
        pixels = (images.to(torch.promote_types(dtype, torch.float32)) / 65535).to(dtype)  # float16 ends at 65504
    channels = (-1, *[1] * (images.dim() - 2))
    mean, std = (None if stat is None else torch.as_tensor(stat, device=images.device) for stat in (mean, std))
    pixels = pixels if mean is None else pixels - mean.to(dtype).reshape(channels)
    return pixels if std is None else pixels / std.to(dtype).reshape(channels)


def draw_images(batch: int, channels: int, sizes: Sequence[int], pixels: str) -> Tensor:
    """Draw images of uint8, uint16 or floating pixels."""
    if pixels == "uint8":
        return torch.randint(0, 256, (batch, channels, *sizes), dtype=torch.uint8)
    if pixels == "uint16":
        return torch.randint(0, 65536, (batch, channels, *sizes)).to(torch.uint16)
    return randn(batch, channels, *sizes)


def draw_stats(kind: str | None, channels: int) -> dict[str, Any]:
    """Draw mean and std: not given, as lists, as tensors, or only one of them."""
    mean, std = torch.linspace(-0.3, 0.5, channels), torch.linspace(0.2, 1.5, channels)
    return {
        "none": {},
        "list": dict(mean=mean.tolist(), std=std.tolist()),
        "tensor": dict(mean=mean, std=std),
        "only mean": dict(mean=mean.tolist()),
        "only std": dict(std=std.tolist()),
    }[kind or "none"]


def randn(*shape: Any) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    """Return a generator on the device of the op tests."""
    return torch.Generator("cpu" if DEVICE == "meta" else DEVICE).manual_seed(seed)


def draw_ids(batch: int, limit: int, keep: int | str) -> Tensor:
    """Draw (batch, keep) ids, distinct in each row; "all" keeps all."""
    return torch.rand(batch, limit).argsort(1)[:, : limit if keep == "all" else min(keep, limit)].contiguous()


def lazy_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return zeros that take no memory of a CPU until they are touched."""
    if DEVICE != "cpu":
        return torch.zeros(shape, dtype=dtype, device=DEVICE)
    stored = {1: np.uint8, 2: np.int16}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, stored)).view(dtype)


def lay(x: Tensor, layout: str) -> Tensor:
    """Return `x` in another layout; memory around and between its values holds NaN (integers: the largest)."""
    if x.dim() == 0:
        return x.clone()
    if layout == "expanded" and (x.dim() > 1 or x.is_floating_point()):
        return x[:1].clone().expand_as(x)
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "channels last" and x.dim() > 3:
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "strided":
        return x.new_empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    if layout == "offset":
        return x.new_empty([size + 2 for size in x.shape])[(slice(1, -1),) * x.dim()].copy_(x)
    if layout == "misaligned":
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    return x.clone(memory_format=torch.contiguous_format)


def prepare(arguments: dict[str, Any], dtype: torch.dtype, layout: str, leaves: Sequence[str]) -> dict[str, Any]:
    """Return the arguments with floating tensors in `dtype`, all tensors in `layout`; `leaves` require gradients."""
    made = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value = value.detach().to(DEVICE)
            value = lay(value.to(dtype) if value.is_floating_point() else value, layout)
            value.requires_grad_(name in leaves and value.is_floating_point())
        made[name] = dtype if isinstance(value, torch.dtype) else value
    return made


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the same values, float64 and contiguous."""
    return prepare(arguments, torch.float64, "contiguous", leaves_of(arguments))


def leaves_of(arguments: dict[str, Any]) -> list[str]:
    return [name for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad]


def bits(x: Tensor) -> Tensor:
    """Return the stored bits, by which NaN equals NaN, and -0 does not equal 0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}.get(x.element_size(), torch.uint8))


# ---- running and comparing -------------------------------------------------------------------------------------------


def upstream(output: Tensor, layout: str) -> Tensor:
    """Draw a gradient that is exact in every dtype."""
    draw = torch.Generator().manual_seed(output.dim())
    grad = (torch.randint(-256, 257, output.shape, generator=draw) / 64).to(output)
    if layout == "expanded gradient":
        return grad.new_tensor(1.25).expand_as(grad)
    return lay(grad, "transposed") if layout == "transposed gradient" else grad


def run(op: Callable[..., Any], arguments: dict[str, Any], layout: str = "contiguous") -> dict[str, Tensor]:
    """Return outputs, and the gradient of each argument that requires one."""
    outputs = op(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    leaves = leaves_of(arguments)
    if leaves:
        outputs = [output for output in outputs if output.requires_grad]
        grads = torch.autograd.grad(
            outputs, [arguments[name] for name in leaves], [upstream(output, layout) for output in outputs]
        )
        results |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}
    return results


def check_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(bits(ours[name]), bits(theirs[name])), name


def ulp(value: float, dtype: torch.dtype) -> float:
    """Return the distance from |value| to the next larger number of `dtype`."""
    info = torch.finfo(dtype)
    return info.eps * max(2.0 ** math.floor(math.log2(value)) if value else 0, info.smallest_normal)


class Errors(NamedTuple):
    """The largest errors of a result, and the distance between numbers at its largest value."""

    ours: float
    eager: float
    step: float

    @property
    def allowed(self) -> float:
        return 2 * self.eager + 2 * self.step


def largest_error(found: Tensor, exact: Tensor) -> float:
    """Return the largest finite error: an overflow raises no tolerance."""
    error = (found.double() - exact).abs()
    error = error[error.isfinite()]
    return float(error.max()) if error.numel() else 0.0


def errors(ours: Tensor, eager: Tensor, exact: Tensor, name: str = "result") -> Errors:
    """Return the errors against `exact` in float64; 0 for integers, which must be equal."""
    assert ours.shape == exact.shape, name
    if not ours.is_floating_point():
        assert torch.equal(ours, exact), name
        return Errors(0, 0, 0)
    if ours.numel() == 0:
        return Errors(0, 0, 0)
    error = float((ours.double() - exact).abs().max())
    return Errors(error, largest_error(eager, exact), ulp(float(exact.abs().max()), ours.dtype))


def check_errors(found: Errors, name: str = "result") -> None:
    """Check that ours is at most twice eager's plus 2 ulp of the largest exact value."""
    assert found.ours <= found.allowed, (
        f"{name}: error {found.ours:.3g} > {found.allowed:.3g}, eager's is {found.eager:.3g}"
    )


def check_draws(draws: Sequence[Errors], name: str = "result") -> None:
    """Check the median over draws of one case by `check_errors`, and that no draw stands out.

    The largest of few errors is a matter of chance: of kernels as accurate as eager some draw in a hundred is over
    twice eager's. One that is less than half as accurate is over it in the median, one that is wrong now and then in
    its worst draw.
    """
    for found in draws:
        most = 2 * max(other.allowed for other in draws)
        assert found.ours <= most, f"{name}, one of {len(draws)} draws: error {found.ours:.3g} > {most:.3g}"
    check_errors(Errors(*map(statistics.median, zip(*draws))), f"{name}, median of {len(draws)} draws")


# operators that move values and round none
MOVING = re.compile(
    "alias|arange|cat|clone|constant_pad|_?copy|_to_copy|detach|empty|expand|fill|full|gather|index|lift|masked_fill|neg|"
    "new_|one|scatter|select|slice|stack|where|zero"
)


class RandomRounding(TorchDispatchMode):
    """Monte Carlo arithmetic: each operator's exact result, times 1 + u xi, is rounded to the operator's dtype.

    u is the unit roundoff of that dtype, xi uniform in [-1, 1]. A result that eager rounds to without an error, such as
    a softmax over one key, is perturbed as any other, by no BLAS and no instruction set.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        native = func(*args, **kwargs)
        if func.is_view or func._schema.is_mutable or MOVING.match(func._schema.name.split("::")[1]):
            return native
        exact = func(*tree_map(self.widen, args), **tree_map(self.widen, kwargs))
        for rounded, value in zip(tree_leaves(native), tree_leaves(exact)):
            if isinstance(rounded, Tensor) and rounded.is_floating_point():
                xi = torch.rand(value.shape, generator=self.generator, dtype=torch.float64).to(value.device) * 2 - 1
                rounded.copy_(value.double() * (1 + torch.finfo(rounded.dtype).eps / 2 * xi))
        return native

    @staticmethod
    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.double()
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def rounding_noise(
    eager: Callable[..., Any], arguments: dict[str, Any], layout: str, exact: dict[str, Tensor]
) -> dict[str, float]:
    """Return the error of each result of `eager` under random rounding, a third of the mean of five runs.

    A third, because random rounding errs two to three times as much as rounding to nearest does: this is no more than
    eager's error where that is no accident.
    """
    runs = []
    for seed in range(5):
        with RandomRounding(seed):
            runs.append(run(eager, arguments, layout))
    return {name: statistics.fmean(largest_error(found[name], exact[name]) for found in runs) / 3 for name in exact}


def op_errors(
    op: Callable[..., Any],
    eager: Callable[..., Any],
    arguments: dict[str, Any],
    layout: str = "contiguous",
    noise: bool = False,
) -> dict[str, Errors]:
    """Measure the errors of each result and gradient of `op` against itself in float64; `op` must write no argument.

    With `noise`, eager's error counts as no less than its rounding noise: it may be 0 by accident.
    """
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    ours, exact = run(op, arguments, layout), run(op, widened(arguments), layout)
    check_same_bits({name: arguments[name].detach() for name in before}, before)
    theirs = run(eager, arguments, layout)
    assert ours.keys() == exact.keys() == theirs.keys()
    for name in ours:
        if theirs[name].dtype == torch.float64 and theirs[name].isfinite().all():
            # a wrong formula would grant any error
            torch.testing.assert_close(theirs[name], exact[name], rtol=1e-9, atol=1e-9)
    found = {name: errors(ours[name], theirs[name], exact[name], name) for name in ours}
    if noise:
        least = rounding_noise(eager, arguments, layout, exact)
        found = {name: error._replace(eager=max(error.eager, least[name])) for name, error in found.items()}
    return found


def rescaled(arguments: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Draw the same case again: each floating tensor times a factor in [3/4, 1), in the layout that it has."""
    made = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            whole = value.detach().new_empty(0).set_(value.untyped_storage()) * draw.uniform(0.75, 1)
            whole = whole.as_strided(value.size(), value.stride(), value.storage_offset())
            value = whole.requires_grad_(value.requires_grad)
        made[name] = value
    return made


def check_redrawn(measure: Callable[[dict[str, Any], bool], dict[str, Errors]], arguments: dict[str, Any]) -> None:
    """Check each of `measure(arguments, False)`, the errors of some results, by `check_errors`.

    Where one is over its bound, `check_draws` judges fifteen draws of the case, `measure(..., True)`, in which eager's
    error counts as no less than its rounding noise.
    """
    if all(found.ours <= found.allowed for found in measure(arguments, False).values()):
        return
    draw = random.Random(0)
    draws = [measure(case, True) for case in (arguments, *(rescaled(arguments, draw) for _ in range(14)))]
    for name in draws[0]:
        check_draws([found[name] for found in draws], name)


def check_op(
    op: Callable[..., Any], eager: Callable[..., Any], arguments: dict[str, Any], layout: str = "contiguous"
) -> None:
    """Check that `op` is as close to itself in float64 as `check_redrawn` asks, forward and backward."""
    check_redrawn(lambda arguments, noise: op_errors(op, eager, arguments, layout, noise), arguments)
