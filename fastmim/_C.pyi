from collections.abc import Sequence
from typing import Any

torch_version: str
compiler: str

def isa() -> str: ...

# arguments that are Any are buffers
def resample(
    sources: Sequence[Any],
    boxes: Any,
    ids: Any,
    out: Any,
    height: int,
    width: int,
    patch_height: int,
    patch_width: int,
    threads: int,
) -> int: ...
