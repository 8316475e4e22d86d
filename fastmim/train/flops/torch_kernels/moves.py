"""Kernels that copy, join, gather, scatter and sort."""

from collections.abc import Iterator

import torch

from ..kernel import COPIES, FILLS, GATHERS, HOST_COPIES, Kernel, stored
from .elementwise import elementwise_kernels
from .op import Op, Rules, UnknownOpError

# tensors of a launch of a concatenation
JOINED = 128
# passes of a radix sort of int64 and their histograms, roughly
SORTED = 9
RULES = Rules()


@RULES.of("_to_copy clone copy_")
def _copy(op: Op) -> Iterator[Kernel]:
    source = op.args[1] if op.name == "copy_" else op.args[0]
    target = op.args[0] if op.name == "copy_" else op.out
    if source.is_meta and target.is_meta:
        return elementwise_kernels(op, COPIES, [source], [target])
    return iter([Kernel(op.name, HOST_COPIES, stored(source) * source.is_meta, stored(target) * target.is_meta)])


@RULES.of("_local_scalar_dense")
def _read_on_host(op: Op) -> Iterator[Kernel]:
    yield Kernel(op.name, HOST_COPIES, stored(*op.inputs()), 0)


@RULES.of("slice_backward select_backward")
def _put_into_zeros(op: Op) -> Iterator[Kernel]:
    grad = op.args[0]
    yield Kernel(op.name, FILLS, 0, stored(op.out))
    yield Kernel(op.name, COPIES, stored(grad), grad.numel() * op.out.element_size())


@RULES.of("cat stack")
def _join(op: Op) -> Iterator[Kernel]:
    tensors = op.args[0]
    for start in range(0, len(tensors), JOINED):
        part = tensors[start : start + JOINED]
        yield Kernel(op.name, COPIES, stored(*part), sum(x.numel() for x in part) * op.out.element_size())


@RULES.of("gather index index_select")
def _gather(op: Op) -> Iterator[Kernel]:
    source, *ids = op.inputs()
    yield Kernel(op.name, GATHERS, min(stored(op.out), stored(source)) + stored(*ids), stored(op.out))


@RULES.of("sort")
def _sort(op: Op) -> Iterator[Kernel]:
    values, ids = op.out
    length = values.shape[op.argument("dim")]
    if length > (1024 if values.dtype in (torch.int64, torch.float64) else 2048):
        raise UnknownOpError(f"{op.func} of {length} values a row")
    yield Kernel("arange", GATHERS, 0, length * ids.element_size())
    yield Kernel("copy_", GATHERS, length * ids.element_size(), stored(ids))
    yield Kernel("copy_", GATHERS, stored(op.args[0]), stored(values))
    yield Kernel(op.name, GATHERS, stored(values, ids), stored(values, ids))


@RULES.of("scatter scatter_ scatter_add scatter_add_ index_add index_add_ index_put index_put_")
def _scatter(op: Op) -> Iterator[Kernel]:
    target, *ids, values = op.inputs()
    if not op.name.endswith("_"):
        yield Kernel("copy_", COPIES, stored(target), stored(op.out))
    # written in place; sums read what they add to
    added = "add" in op.name or (op.name.startswith("index_put") and bool(op.argument("accumulate")))
    moved = values.numel() * target.element_size() if values.numel() > 1 else min(map(stored, ids))
    yield Kernel(op.name, GATHERS, stored(values, *ids) + moved * added, moved)


@RULES.of("embedding")
def _embedding(op: Op) -> Iterator[Kernel]:
    table, ids = op.inputs()
    yield Kernel(op.name, GATHERS, min(stored(op.out), stored(table)) + stored(ids), stored(op.out))


@RULES.of("embedding_dense_backward")
def _embedding_backward(op: Op) -> Iterator[Kernel]:
    grad, ids = op.inputs()
    yield Kernel("zeros", FILLS, 0, stored(op.out))
    if ids.numel() > 3072:
        # the ids are sorted with their positions, and counted
        for _ in range(SORTED):
            yield Kernel("sort", GATHERS, 2 * stored(ids), 2 * stored(ids))
    yield Kernel(op.name, GATHERS, stored(grad, ids), min(stored(grad), stored(op.out)))


@RULES.of("repeat constant_pad_nd flip roll")
def _rearranged(op: Op) -> Iterator[Kernel]:
    if op.name == "constant_pad_nd":
        yield Kernel("fill_", FILLS, 0, stored(op.out))
    yield from elementwise_kernels(op, COPIES, op.inputs(), op.outputs())
