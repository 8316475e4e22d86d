"""Pack what was compiled in this flight: the entries of the Triton cache that are newer than its start."""

import os
import sys
import tarfile
import time
from pathlib import Path

from harness import rows

STAGE = "cache"
# bytes of an archive, and archives; each can be unpacked without the others
LARGEST, MOST = 15 << 20, 3


def pack(cache: Path, out: Path, since: float, deadline: float) -> dict[str, object]:
    """Write triton-new-1.tar.gz and on into `out`; return how many entries are in them, and how many are left."""
    entries = [entry for entry in sorted(cache.iterdir()) if newest(entry) >= since] if cache.is_dir() else []
    files: list[str] = []
    packed = 0
    while packed < len(entries) and len(files) < MOST and time.time() < deadline:
        path = out / f"triton-new-{len(files) + 1}.tar.gz"
        files.append(path.name)
        with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=4) as archive:
            while packed < len(entries) and time.time() < deadline:
                largest = sum(part.stat().st_size for part in entries[packed].rglob("*") if part.is_file())
                # compressed it is a quarter of that or less, plus a little in the compressor's buffers
                if file.tell() and file.tell() + largest / 2 + (1 << 18) > LARGEST:
                    break
                archive.add(entries[packed], entries[packed].name)
                packed += 1
    return {"files": files, "entries": packed, "left": len(entries) - packed}


def newest(entry: Path) -> float:
    """Return the time at which the newest file of an entry was written."""
    return max((part.stat().st_mtime for part in (entry, *entry.rglob("*"))), default=0.0)


def main() -> int:
    cache, out = Path(sys.argv[1]), Path(sys.argv[2])
    since, deadline = (
        float(os.environ.get(name, default)) for name, default in ((rows.SINCE, 0), (rows.DEADLINE, "inf"))
    )
    rows.run(STAGE, [("triton", lambda: pack(cache, out, since, deadline))], limit=120.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
