"""Check the arrays of a source before a training run: find those that can't be served."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .array_crops import ArrayCrops, Layout, reason
from .array_files import Arrays
from .array_loader import first_layout
from .images import Unreadable
from .threads import map_ahead


class ArrayFinding(NamedTuple):
    """Result for one array: its name, the reason why it can't be served (empty for a good one), its layout if it could
    be opened, and how many of its values are missing.
    """

    name: str
    reason: str = ""
    layout: Layout | None = None
    missing: int = 0


def check_arrays(source: Arrays, crops: ArrayCrops, *, num_threads: int = 1) -> Iterator[ArrayFinding]:
    """Read every array of a source in full, and yield the findings in order.

    An array can't be served if it can't be read, if its channels or dtype are others than those of the first, or if it
    holds infinity, or NaN that isn't missing data. The checksums of packed arrays are compared.

    Args:
        source: the arrays.
        crops: axes, channels and missing data of the arrays.
        num_threads: number of threads that read.

    Raises:
        ValueError: none of the first arrays can be read.
    """
    like = first_layout(source, crops)

    def check(sample: int) -> ArrayFinding:
        name, layout, missing = source.names[sample], None, 0
        try:
            with source.opened(sample) as array:
                layout = crops.layout(array)
                if (layout.channels, layout.dtype) != (like.channels, like.dtype):
                    raise Unreadable(
                        f"{layout.channels} channels for batches of {layout.dtype}, where others have {like.channels} "
                        f"for {like.dtype}"
                    )
                for part in crops.blocks(array, layout.sizes):
                    lacking = crops.missing(part)
                    missing += 0 if lacking is None else int(lacking.sum())
                    # float64 values become float32
                    with np.errstate(over="ignore"):
                        served = part if part.dtype.kind != "f" else part.astype(like.dtype, copy=False)
                    finite = np.isfinite(served) if lacking is None else np.isfinite(served) | lacking
                    if not finite.all():
                        raise Unreadable(reason(part, crops.nodata))
        except Unreadable as error:
            return ArrayFinding(name, str(error), layout, missing)
        return ArrayFinding(name, "", layout, missing)

    yield from map_ahead(num_threads, check, range(len(source.names)))


def summary(findings: list[ArrayFinding]) -> str:
    """Return the channels, dtypes and sizes of arrays that can be served, and the share of missing values."""
    good = [found for found in findings if not found.reason]
    layouts = [found.layout for found in good if found.layout is not None]
    if not layouts:
        return "none can be served"
    sizes = sorted({layout.sizes for layout in layouts}, key=lambda size: (np.prod(size), size))
    shown = " to ".join("x".join(map(str, size)) for size in (sizes[:1] if len(sizes) == 1 else (sizes[0], sizes[-1])))
    stored = ", ".join(sorted({layout.stored for layout in layouts}))
    values = sum(layout.channels * float(np.prod(layout.sizes)) for layout in layouts)
    share = sum(found.missing for found in good) / values
    different = f"{len(sizes)} different sizes, {shown}" if len(sizes) > 1 else f"sizes {shown}"
    return f"{layouts[0].channels} channels of {stored}, {different}; {share:.1%} of the values are missing data"
