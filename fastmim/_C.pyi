from collections.abc import Buffer, Sequence

torch_version: str
compiler: str

def isa() -> str: ...
def resample(
    sources: Sequence[Buffer],
    boxes: Buffer,
    ids: Buffer | None,
    out: Buffer,
    height: int,
    width: int,
    patch_height: int,
    patch_width: int,
    threads: int,
) -> int: ...
