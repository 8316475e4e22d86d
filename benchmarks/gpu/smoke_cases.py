"""Cases of the smoke test: every Triton op at the shapes of ViT-B, L, H and MAE's decoder, and a training step."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmim import MaskedAutoencoder, MaskedAutoencoderViT, _dispatch, reference
from gpu.tensors import as_tuple, dtype_name, in_float64
from pictures.photographs import normalise
from rivals.plain_mae import PlainGatherMAE
from rivals.sizes import Cell
from rivals.sizes import Sizes as ModelSizes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The largest error, by norms and by largest values, for each dtype of a result. A rounding is 2^-9, 2^-12 and 2^-25 of
# a value; bfloat16 and float16 products round their second operand too. TF32, with 2^-12, would show as 3e-4.
BOUNDS = {BF16: 1e-2, FP16: 2e-3, FP32: 5e-6}
# A training step adds up the roundings of all its layers: plain PyTorch's gradients are off by 8e-3 in bfloat16 and by
# 1.3e-6 in float32. Triton's interpreter truncates to bfloat16 and is off by twice as much as it would be rounded.
STEP_BOUNDS = {BF16: 4e-2, FP16: 8e-3, FP32: 2e-5}
# ops whose results are copies
EXACT = ("random_masking", "gather_tokens", "gather_tokens_backward")
# ops with float32 results of products in the dtype of the case
NARROW_PRODUCTS = ("step", "attention_qkvpacked_backward")
MASK_RATIOS = 0.75, 0.95
# at the second mask ratio, the share of the removed patches that is decoded
DECODED = 0.25

Args = tuple[Any, ...]
Results = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Case:
    """A call that is checked against `expected`, both with the arguments that `make` draws on a device."""

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[str], Args]
    call: Callable[[Args], Results]
    expected: Callable[[Args], Results]
    bounds: dict[torch.dtype, float] = field(default_factory=lambda: BOUNDS)

    @property
    def name(self) -> str:
        return f"{self.op}, {self.shape}, {dtype_name(self.dtype)}"

    def bound(self, result: Tensor) -> float:
        if self.op in EXACT or not result.is_floating_point():
            return 0.0
        return self.bounds[self.dtype if self.op in NARROW_PRODUCTS else result.dtype]


def op_case(op: str, shape: str, dtype: torch.dtype, make: Callable[[str], Args]) -> Case:
    return Case(op, shape, dtype, make, partial(launched, op), partial(referred, op))


def launched(op: str, args: Args) -> Results:
    """Return the results of the op's Triton launcher; those of an op that works in place are what it wrote."""
    launch = _dispatch.launcher("triton", op)
    if not op.endswith("_"):
        return as_tuple(launch(*args))
    first = args[0].clone()
    launch(first, *args[1:])
    return (first,)


def referred(op: str, args: Args) -> Results:
    """Return the reference's results for the same arguments in float64."""
    upcast = [in_float64(arg) for arg in args]
    found = getattr(reference, op)(*upcast)
    return (upcast[0],) if op.endswith("_") else as_tuple(found)


def referred_norm_backward(args: Args) -> Results:
    """Return the reference's results in float64, in which dx is dtotal, with a dx where the launcher has one."""
    dtotal, *others, _, dx_bias = referred("add_layer_norm_backward", args)
    _, _, total, *_, dtype, _ = args
    return dtotal, *others, dtotal if dtype != total.dtype else dtotal[:0].reshape(0), dx_bias


@dataclass(frozen=True)
class Encoder:
    """Sizes of a ViT; the patches are square, and so are the images."""

    name: str
    width: int
    heads: int
    patch: int
    image: int = 224

    @property
    def dim(self) -> int:
        return self.width // self.heads

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    def keep(self, mask_ratio: float) -> int:
        return int(self.patches * (1 - mask_ratio))


@dataclass(frozen=True)
class Sizes:
    """Sizes of all cases; `few` images go through attention, `many` through what sums over a batch."""

    encoders: tuple[Encoder, ...]
    decoder: Encoder
    few: int
    many: int
    # images, patch and frames of a clip
    clip: tuple[int, int, int, int]


REAL = Sizes(
    (
        Encoder("ViT-B", 768, 12, 16),
        Encoder("ViT-L", 1024, 16, 16),
        Encoder("ViT-H", 1280, 16, 14),
    ),
    Encoder("decoder", 512, 16, 16),
    few=7,
    many=24,
    clip=(2, 224, 16, 4),
)
TINY = Sizes(
    (Encoder("ViT-B", 24, 3, 8, 40), Encoder("ViT-H", 40, 2, 7, 42)),
    Encoder("decoder", 16, 2, 8, 40),
    few=3,
    many=3,
    clip=(1, 16, 8, 4),
)


def cases(rehearse: bool = False) -> list[Case]:
    """Return every case; those of one op are apart, so that processes that take them in turns compile in parallel."""
    sizes = TINY if rehearse else REAL
    found = list(masking_cases(sizes))
    for dtype in (BF16, FP32):
        for encoder in sizes.encoders:
            found += patches_cases(sizes, encoder, dtype)
            found += tokens_cases(sizes, encoder, dtype)
            found += attention_cases(sizes, encoder, dtype)
            found += loss_cases(sizes, encoder, dtype)
            found += norm_cases(sizes, encoder, dtype)
        found += decoder_cases(sizes, dtype)
        found += other_cases(sizes, dtype)
    first = sizes.encoders[0]
    found += attention_cases(sizes, first, FP16)
    found += loss_cases(sizes, first, FP16)
    found += norm_cases(sizes, first, FP16)
    found += (step_case(sizes, dtype) for dtype in (FP32, BF16, FP16))
    # at tiny sizes bfloat16's roundings come near the bound
    found += model_cases(sizes, BF16 if sizes is REAL else FP32)
    return found


# random values of cases


def randn(*shape: int, dtype: torch.dtype = FP32, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def draw_ids(batch: int, limit: int, count: int, device: str) -> Tensor:
    return torch.rand(batch, limit, device=device).argsort(1)[:, :count].contiguous()


def draw_images(batch: int, size: int, device: str, channels_last: bool = False) -> Tensor:
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    return images.to(memory_format=torch.channels_last) if channels_last else images


def draw_stats(device: str) -> tuple[Tensor, Tensor]:
    """Return a mean and a deviation for each channel."""
    return torch.rand(3, device=device), torch.rand(3, device=device) + 0.2


def masking_cases(sizes: Sizes) -> Iterator[Case]:
    def by_noise(device: str, n: int, k: int, m: int) -> Args:
        return sizes.many, n, k, m, torch.rand(sizes.many, n, device=device), None

    def by_seeds(device: str, n: int, k: int, m: int) -> Args:
        return sizes.many, n, k, m, None, torch.randint(-(2**62), 2**62, (sizes.many,), device=device)

    for encoder in {encoder.patch: encoder for encoder in sizes.encoders}.values():
        for ratio in MASK_RATIOS:
            n, k = encoder.patches, encoder.keep(ratio)
            m = round((n - k) * (1 if ratio == MASK_RATIOS[0] else DECODED))
            for name, make in (("noise", by_noise), ("seeds", by_seeds)):
                shape = f"patch {encoder.patch}, {k} of {n} by {name}"
                yield op_case("random_masking", shape, FP32, partial(make, n=n, k=k, m=m))
    # fewer counters than tokens in a block
    for n in (7, 64):
        make = partial(by_seeds, n=n, k=n // 4, m=n // 2)
        yield op_case("random_masking", f"{n // 4} of {n} by seeds", FP32, make)


def patches_cases(sizes: Sizes, encoder: Encoder, dtype: torch.dtype) -> Iterator[Case]:
    n, k, p, width, batch = encoder.patches, encoder.keep(0.75), encoder.patch, encoder.width, sizes.many

    def gather(device: str, channels_last: bool) -> Args:
        images = draw_images(batch, encoder.image, device, channels_last)
        return images, draw_ids(batch, n, k, device), [p, p], *draw_stats(device), dtype

    def gather_floats(device: str) -> Args:
        images = randn(batch, 3, encoder.image, encoder.image, dtype=dtype, device=device)
        return images, draw_ids(batch, n, k, device), [p, p], None, None, dtype

    def gather_integers(device: str) -> Args:
        images = torch.randint(65536, (batch, 3, encoder.image, encoder.image), device=device).to(torch.uint16)
        return images, draw_ids(batch, n, k, device), [p, p], *draw_stats(device), dtype

    def gather_signals(device: str) -> Args:
        signals = randn(batch, 12, n * p, dtype=dtype, device=device)
        return signals, draw_ids(batch, n, k, device), [p], None, None, dtype

    def scatter(device: str) -> Args:
        grad, shape = randn(batch, k, 3 * p * p, dtype=dtype, device=device), [batch, 3, encoder.image, encoder.image]
        return grad, draw_ids(batch, n, k, device), [p, p], draw_stats(device)[1], shape, dtype

    def embed(device: str, keep: int, prefixed: bool) -> Args:
        images, chosen = draw_images(batch, encoder.image, device), draw_ids(batch, n, keep, device)
        weight = randn(width, 3, p, p, device=device) / (3 * p * p) ** 0.5
        table = randn(1 + n, width, device=device)
        prefix = table[:1] if prefixed else None
        bias = randn(width, device=device)
        return images, chosen, weight, bias, table[1:], prefix, *draw_stats(device), dtype, None

    shape = f"patch {p}"
    if encoder.name != "ViT-L":  # its patches are those of ViT-B
        yield op_case("gather_patches", shape, dtype, partial(gather, channels_last=False))
        yield op_case("gather_patches", f"{shape}, channels last", dtype, partial(gather, channels_last=True))
        yield op_case("gather_patches", f"{shape}, floats", dtype, gather_floats)
        yield op_case("gather_patches", f"{shape}, uint16", dtype, gather_integers)
        yield op_case("gather_patches", f"{shape}, one axis", dtype, gather_signals)
        yield op_case("gather_patches_backward", shape, dtype, scatter)
    for ratio in MASK_RATIOS:
        name = f"{encoder.name}, {encoder.keep(ratio)} of {n}"
        yield op_case("embed_patches", name, dtype, partial(embed, keep=encoder.keep(ratio), prefixed=True))
    yield op_case("embed_patches", f"{encoder.name}, no prefix", dtype, partial(embed, keep=k, prefixed=False))


def tokens_cases(sizes: Sizes, encoder: Encoder, dtype: torch.dtype) -> Iterator[Case]:
    n, width, batch, decoder_width = encoder.patches, encoder.width, sizes.many, sizes.decoder.width
    for ratio in MASK_RATIOS:
        k = encoder.keep(ratio)
        m = round((n - k) * (1 if ratio == MASK_RATIOS[0] else DECODED))

        def gather(device: str, k: int = k) -> Args:
            return randn(batch, n, width, dtype=dtype, device=device), draw_ids(batch, n, k, device)

        def gather_table(device: str, k: int = k) -> Args:
            return randn(n, width, dtype=dtype, device=device), draw_ids(batch, n, k, device)

        def scatter(device: str, k: int = k) -> Args:
            return randn(batch, k, width, dtype=dtype, device=device), draw_ids(batch, n, k, device), n

        def decoder(device: str, k: int = k, m: int = m) -> Args:
            visible = randn(batch, 1 + k, decoder_width, dtype=dtype, device=device)
            chosen = draw_ids(batch, n, k + m, device)
            table = randn(1 + n, decoder_width, device=device)
            token = randn(decoder_width, device=device)
            return visible, chosen[:, :k].contiguous(), chosen[:, k:].contiguous(), token, table, 1

        def decoder_by_sample(device: str, k: int = k, m: int = m) -> Args:
            *shared, _, _, prefix = decoder(device, k, m)
            tables = (randn(batch, *rows, decoder_width, device=device) for rows in ((), (1 + n,)))
            return *shared, *tables, prefix

        def unshuffle(device: str, k: int = k) -> Args:
            visible = randn(batch, 1 + k, decoder_width, dtype=dtype, device=device)
            table, token = randn(1 + n, decoder_width, device=device), randn(decoder_width, device=device)
            return visible, draw_ids(batch, n, n, device), token, table, 1

        def unshuffle_backward(device: str, k: int = k) -> Args:
            grad = randn(batch, 1 + n, decoder_width, dtype=dtype, device=device)
            return grad, draw_ids(batch, n, n, device), k, 1

        shape = f"{encoder.name}, {k} of {n}"
        yield op_case("gather_tokens", shape, dtype, gather)
        if ratio == MASK_RATIOS[0]:
            yield op_case("gather_tokens", f"{shape}, one table", dtype, gather_table)
            if encoder.name == "ViT-B":
                yield op_case("decoder_tokens", f"{shape}, of each sample", dtype, decoder_by_sample)
        yield op_case("gather_tokens_backward", shape, dtype, scatter)
        yield op_case("sum_by_position", shape, dtype, scatter)
        if encoder.name != "ViT-L":  # its decoder is that of ViT-B
            yield op_case("decoder_tokens", shape, dtype, decoder)
            yield op_case("unshuffle", shape, dtype, unshuffle)
            yield op_case("unshuffle_backward", shape, dtype, unshuffle_backward)


def packed_cases(
    name: str, batch: int, length: int, heads: int, dim: int, dtype: torch.dtype, masked: bool = False
) -> Iterator[Case]:
    def forward(device: str) -> Args:
        mask = torch.rand(batch, length, device=device) < 0.7 if masked else None
        return randn(batch, length, 3, heads, dim, dtype=dtype, device=device), mask, dim**-0.5

    def backward(device: str) -> Args:
        return randn(batch, length, heads, dim, dtype=dtype, device=device), *forward(device), True

    shape = f"{name}, S {length}, D {dim}" + ", key mask" * masked
    yield op_case("attention_qkvpacked", shape, dtype, forward)
    yield op_case("attention_qkvpacked_backward", shape, dtype, backward)


def last_cases(
    name: str, batch: int, lengths: tuple[int, int], heads: int, dim: int, dtype: torch.dtype
) -> Iterator[Case]:
    """Yield the attention of the last queries to all keys, as the last block of a decoder has it."""
    queries, keys = lengths

    def backward(device: str) -> Args:
        qkv = randn(batch, keys, 3, heads, dim, dtype=dtype, device=device)
        return randn(batch, queries, heads, dim, dtype=dtype, device=device), qkv, None, dim**-0.5, True

    def forward(device: str) -> Args:
        q, k, v = backward(device)[1].unbind(2)
        return q[:, keys - queries :], k, v, None, None, dim**-0.5

    shape = f"{name}, last {queries} of S {keys}, D {dim}"
    yield op_case("attention", shape, dtype, forward)
    yield op_case("attention_qkvpacked_backward", shape, dtype, backward)


def separate_cases(
    name: str, batch: int, lengths: tuple[int, int], heads: int, dim: int, dtype: torch.dtype, biased: bool = False
) -> Iterator[Case]:
    """Yield the attention of queries to keys that lie beside their values."""
    queries, keys = lengths

    def forward(device: str) -> Args:
        q = randn(batch, queries, heads, dim, dtype=dtype, device=device)
        k, v = randn(batch, keys, 2, heads, dim, dtype=dtype, device=device).unbind(2)
        mask = torch.rand(batch, keys, device=device) < 0.7 if biased else None
        bias = randn(1, heads, queries, keys, dtype=dtype, device=device) if biased else None
        return q, k, v, mask, bias, dim**-0.5

    def backward(device: str) -> Args:
        return randn(batch, queries, heads, dim, dtype=dtype, device=device), *forward(device), biased

    shape = f"{name}, S {queries} to {keys}, D {dim}" + ", bias and key mask" * biased
    yield op_case("attention", shape, dtype, forward)
    yield op_case("attention_backward", shape, dtype, backward)


def varlen_cases(name: str, lengths: tuple[int, ...], heads: int, dim: int, dtype: torch.dtype) -> Iterator[Case]:
    starts = [sum(lengths[:index]) for index in range(len(lengths) + 1)]

    def forward(device: str) -> Args:
        q, k, v = randn(starts[-1], 3, heads, dim, dtype=dtype, device=device).unbind(1)
        cu = torch.tensor(starts, dtype=torch.int32, device=device)
        return q, k, v, cu, cu, max(lengths), max(lengths), dim**-0.5

    def backward(device: str) -> Args:
        return randn(starts[-1], heads, dim, dtype=dtype, device=device), *forward(device)

    shape = f"{name}, up to {max(lengths)}, D {dim}"
    yield op_case("attention_varlen", shape, dtype, forward)
    yield op_case("attention_varlen_backward", shape, dtype, backward)


def attention_cases(sizes: Sizes, encoder: Encoder, dtype: torch.dtype) -> Iterator[Case]:
    name, heads, dim = encoder.name, encoder.heads, encoder.dim
    lengths = [1 + encoder.keep(ratio) for ratio in MASK_RATIOS]
    # the last is so short that several sequences share a tile
    for length in (*lengths, 1 + encoder.keep(0.985)):
        yield from packed_cases(name, sizes.few, length, heads, dim, dtype)
    yield from packed_cases(name, sizes.few, lengths[0], heads, dim, dtype, masked=True)
    yield from varlen_cases(name, (lengths[0], 1, lengths[1], lengths[0] - 1), heads, dim, dtype)
    yield from varlen_cases(name, (1 + encoder.patches, 3, lengths[0]), heads, dim, dtype)
    yield from separate_cases(name, sizes.few, (lengths[1], lengths[1]), heads, dim, dtype, biased=True)
    yield from separate_cases(name, sizes.few, (lengths[0], lengths[0]), heads, dim, dtype, biased=True)


def decoder_cases(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the decoder's attention and norms, for both patch sizes."""
    decoder = sizes.decoder
    for encoder in {encoder.patch: encoder for encoder in sizes.encoders}.values():
        name = f"decoder of {encoder.name}"
        n, k, least = encoder.patches, *(encoder.keep(ratio) for ratio in MASK_RATIOS)
        some = round((n - least) * DECODED)
        for queries, keys in ((n - k, 1 + n), (n - least, 1 + n), (some, 1 + least + some)):
            yield from separate_cases(name, sizes.few, (queries, keys), decoder.heads, decoder.dim, dtype)
            yield from last_cases(name, sizes.few, (queries, keys), decoder.heads, decoder.dim, dtype)
        for length in (1 + n, 1 + least + some):
            yield from packed_cases(name, sizes.few, length, decoder.heads, decoder.dim, dtype)
    yield from norm_cases(sizes, decoder, dtype, length=1 + decoder.patches)


def loss_cases(sizes: Sizes, encoder: Encoder, dtype: torch.dtype) -> Iterator[Case]:
    n, p, batch = encoder.patches, encoder.patch, sizes.many
    m = n - encoder.keep(0.75)

    def pixels(
        device: str,
        norm: int,
        weighted: bool,
        channels_last: bool = False,
        loss: int = reference.LOSS_SQUARED,
        reduction: int = reference.REDUCE_MEAN,
    ) -> Args:
        pred = randn(batch, m, 3 * p * p, dtype=dtype, device=device)
        if loss == reference.LOSS_ABSOLUTE:
            pred += 40 * pred.sign()  # no error near 0, where the gradient jumps
        images = draw_images(batch, encoder.image, device, channels_last)
        weight = torch.rand(batch, m, device=device) if weighted else None
        chosen = draw_ids(batch, n, m, device)
        return pred, images, chosen, [p, p], norm, weight, *draw_stats(device), loss, reduction, True

    def signals(device: str) -> Args:
        pred, chosen = randn(batch, m, 3 * p, dtype=dtype, device=device), draw_ids(batch, n, m, device)
        values = torch.randint(65536, (batch, 3, n * p), device=device).to(torch.uint16)
        plain = reference.LOSS_SQUARED, reference.REDUCE_MEAN, True
        return pred, values, chosen, [p], 2, None, *draw_stats(device), *plain

    def cosine(device: str, weighted: bool) -> Args:
        pred, target = (randn(batch, m, encoder.width, dtype=dtype, device=device) for _ in range(2))
        weight = torch.rand(batch, m, device=device) if weighted else None
        return pred, target, 2.0, weight, reference.REDUCE_MEAN, True, True

    def upstream(device: str) -> Args:
        return randn(batch, m, 3 * p * p, dtype=dtype, device=device), torch.full((), 0.37, device=device)

    if encoder.name != "ViT-L":  # its patches are those of ViT-B
        for norm, weighted, channels_last in ((1, False, False), (1, False, True), (1, True, False), (0, False, False)):
            shape = f"patch {p}, norm {norm}" + ", weights" * weighted + ", channels last" * channels_last
            make = partial(pixels, norm=norm, weighted=weighted, channels_last=channels_last)
            yield op_case("pixel_loss", shape, dtype, make)
        for name, loss, reduction in (
            ("absolute", reference.LOSS_ABSOLUTE, reference.REDUCE_SUM),
            ("huber, of each patch", reference.LOSS_HUBER, reference.REDUCE_NONE),
        ):
            make = partial(pixels, norm=0, weighted=True, loss=loss, reduction=reduction)
            yield op_case("pixel_loss", f"patch {p}, norm 0, weights, {name}", dtype, make)
        yield op_case("pixel_loss", f"patch {p}, norm 2, one axis of uint16", dtype, signals)
        yield op_case("scale_gradient_", f"{m} patches of {3 * p * p}", dtype, upstream)
    for weighted in (False, True):
        shape = f"{encoder.name}, width {encoder.width}" + ", weights" * weighted
        yield op_case("scaled_cosine_loss", shape, dtype, partial(cosine, weighted=weighted))


def norm_cases(sizes: Sizes, encoder: Encoder, dtype: torch.dtype, length: int = 0) -> Iterator[Case]:
    """Yield the elementwise passes as a block under autocast has them: narrow branches, a wide stream."""
    width, batch, length = encoder.width, sizes.many, length or 1 + encoder.keep(0.75)

    def narrow(device: str, columns: int = width) -> Tensor:
        return randn(batch, length, columns, dtype=dtype, device=device)

    def forward(device: str) -> Args:
        weight, bias, x_bias = randn(3, width, device=device).unbind(0)
        return narrow(device), randn(batch, length, width, device=device), weight, bias, 1e-6, dtype, x_bias

    def backward(device: str) -> Args:
        total, grad = randn(2, batch, length, width, device=device).unbind(0)
        mean = total.mean(-1, keepdim=True)
        rstd = ((total - mean).square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        weight, bias = randn(2, width, device=device).unbind(0)
        return narrow(device), grad, total, mean, rstd, weight, bias, dtype, True

    def backward_alone(device: str) -> Args:
        """Return the arguments of a norm whose sum nothing uses and whose result is kept."""
        grad, _, *saved, _, _, _ = backward(device)
        return grad.float(), None, *saved

    def backward_last(device: str) -> Args:
        """Return the arguments of a norm of whose sum only the last rows are used."""
        grad, grad_sum, *others = backward(device)
        return grad, grad_sum[:, length // 4 :], *others

    def gelu(device: str) -> Args:
        return narrow(device, 4 * width), randn(4 * width, device=device)

    def gelu_backward(device: str) -> Args:
        return narrow(device, 4 * width), *gelu(device), True

    shape = f"{encoder.name}, width {width}"
    yield op_case("add_layer_norm", shape, dtype, forward)
    yield op_case("add_layer_norm", f"{shape}, alone", dtype, lambda device: forward(device)[:-2])
    yield op_case("add_layer_norm", f"{shape}, first", dtype, lambda device: (None, *forward(device)[1:-1]))
    op = "add_layer_norm_backward"
    yield Case(op, shape, dtype, backward, partial(launched, op), referred_norm_backward)
    yield op_case(op, f"{shape}, alone", dtype, backward_alone)
    yield op_case(op, f"{shape}, first", dtype, lambda device: backward(device)[:-2])
    yield Case(op, f"{shape}, last", dtype, backward_last, partial(launched, op), referred_norm_backward)
    yield op_case("bias_gelu", f"{encoder.name}, width {4 * width}", dtype, gelu)
    yield op_case("bias_gelu_backward", f"{encoder.name}, width {4 * width}", dtype, gelu_backward)


def other_cases(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    """Yield clips, and attention at the size of a batch that trains."""
    batch, size, p, frames = sizes.clip
    n, patch = (size // p) ** 2 * frames // 2, [2, p, p]
    k, m = n // 4, n // 2

    def clips(device: str) -> Tensor:
        return torch.randint(256, (batch, 3, frames, size, size), dtype=torch.uint8, device=device)

    def gather(device: str) -> Args:
        return clips(device), draw_ids(batch, n, k, device), patch, *draw_stats(device), dtype

    def pixels(device: str) -> Args:
        pred = randn(batch, m, 6 * p * p, dtype=dtype, device=device)
        chosen, weight = draw_ids(batch, n, m, device), torch.rand(batch, m, device=device)
        plain = reference.LOSS_SQUARED, reference.REDUCE_MEAN, True
        return pred, clips(device), chosen, patch, 2, weight, *draw_stats(device), *plain

    yield op_case("gather_patches", f"patch 2x{p}x{p}", dtype, gather)
    yield op_case("pixel_loss", f"patch 2x{p}x{p}, norm 2", dtype, pixels)
    if dtype == BF16 and sizes is REAL:
        large = sizes.encoders[1]
        yield from packed_cases(f"{large.name}, batch 256", 256, 1 + large.keep(0.75), large.heads, large.dim, dtype)


# ---- a training step -------------------------------------------------------------------------------------------------


def step_case(sizes: Sizes, dtype: torch.dtype) -> Case:
    """Return the loss and all gradients of a model of two blocks and two, under autocast to `dtype`."""
    encoder, decoder = sizes.encoders[0], sizes.decoder

    def make(device: str) -> Args:
        model = MaskedAutoencoderViT(
            encoder.image,
            encoder.patch,
            embed_dim=encoder.width,
            depth=2,
            num_heads=encoder.heads,
            decoder_embed_dim=decoder.width,
            decoder_depth=2,
            decoder_num_heads=decoder.heads,
            norm_pix_loss=True,
        )
        # whole numbers: no two are equal
        noise = torch.rand(sizes.many, encoder.patches, device=device).argsort(1).float()
        return model.to(device), draw_images(sizes.many, encoder.image, device), noise

    return Case("step", f"{encoder.name}'s width", dtype, make, partial(stepped, dtype), plain_step, STEP_BOUNDS)


def model_cases(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    """Yield steps of a model with each decoder, and on each number of axes, beside the same model in float64."""
    encoder, decoder = sizes.encoders[0], sizes.decoder
    _, size, p, frames = sizes.clip
    images = (encoder.image,) * 2, (encoder.patch,) * 2
    signals, clips = ((encoder.patches * p,), (p,)), ((frames, size, size), (2, p, p))

    def make(device: str, axes: tuple[tuple[int, ...], ...], pixels: torch.dtype, **options: Any) -> Args:
        model = MaskedAutoencoder(
            *axes,
            embed_dim=encoder.width,
            depth=1,
            num_heads=encoder.heads,
            decoder_embed_dim=decoder.width,
            decoder_depth=1,
            decoder_num_heads=decoder.heads,
            mean=(0.4, 0.5, 0.6),
            std=(0.2, 0.3, 0.25),
            **options,
        )
        shape = sizes.few, 3, *axes[0]
        views = torch.randint(torch.iinfo(pixels).max + 1, (2, *shape), device=device).to(pixels).unbind(0)
        noise = torch.rand(sizes.few, model.num_patches, device=device).argsort(1).float()
        return model.to(device), views[0], noise, *views[1 : 1 + (model.decoder == "both")]

    for name, axes, pixels, options in (
        ("self", images, torch.uint8, dict(decoder="self", norm_pix_loss="channel")),
        ("cross", images, torch.uint8, dict(decoder="cross", norm_pix_loss=True)),
        ("both", images, torch.uint8, dict(decoder="both", loss="huber")),
        ("none", images, torch.uint8, dict(decoder=None, loss="huber")),
        ("cross, one axis of uint16", signals, torch.uint16, dict(decoder="cross", norm_pix_loss=True)),
        ("self, three axes", clips, torch.uint8, dict(decoder="self", norm_pix_loss=True)),
    ):
        made = partial(make, axes=axes, pixels=pixels, **options)
        yield Case("step", f"decoder {name}", dtype, made, partial(stepped, dtype), wide_step, STEP_BOUNDS)


def stepped(dtype: torch.dtype, args: Args) -> Results:
    model, images, noise, *second = args
    model.zero_grad(set_to_none=True)
    # float16 gradients of a mean would underflow
    scale = 2.0**12 if dtype == FP16 else 1.0
    with torch.autocast(images.device.type, dtype, enabled=dtype in (BF16, FP16)):
        context = {"context": model.encode(*second)} if second else {}
        loss = model(images, mask_ratio=0.75, decode_ratio=0.5, noise=noise, **context).loss
    (loss * scale).backward()
    return loss.detach(), *(p.grad / scale for p in model.parameters() if p.grad is not None)


def wide_step(args: Args) -> Results:
    """Return the same of the model in float64, of which the reference computes every op."""
    model, *inputs = args
    with _dispatch.reference_serves():
        return stepped(torch.float64, (deepcopy(model).double(), *inputs))


def plain_step(args: Args) -> Results:
    """Return the same of the algorithm in plain PyTorch, in float64."""
    model, images, noise = args
    peer = PlainGatherMAE(ModelSizes.of(model)).to(images.device).double()
    peer.load_state_dict(model.state_dict())
    loss = peer(normalise(images, torch.float64), noise, Cell(0.75, 0.5))
    loss.backward()
    found = dict(peer.named_parameters())
    return loss.detach(), *(found[name].grad for name, p in model.named_parameters() if p.grad is not None)
