"""Write the commit beside the files that are taken to a machine with a GPU; print their sizes and the commands there.

python benchmarks/gpu/carried.py build/flight fastmim/_C.cpython-312-x86_64-linux-gnu.so ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.commit import ROOT, WRITTEN, commit

# most bytes of everything that is taken along, the repository's files included
MOST = 64 << 20
COMMAND = 'PYTHONPATH=$PWD PYTHONSAFEPATH=1 python3 benchmarks/flight.py {visit} --seconds {seconds} --out "$OUT"'


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def main() -> int:
    carried = [Path(name) for name in sys.argv[1:]]
    missing = [str(path) for path in carried if not path.exists()]
    if missing:
        print(f"not built: {', '.join(missing)}")
        return 1
    of = commit() or "unknown"
    WRITTEN.parent.mkdir(parents=True, exist_ok=True)
    WRITTEN.write_text(of + "\n")
    print(f"to be carried with commit {of}, beside its files:")
    for path in carried:
        print(f"  {size(path) / (1 << 20):6.1f} MiB  {path.resolve().relative_to(ROOT)}")
    total = sum(map(size, carried))
    print(f"  {total / (1 << 20):6.1f} MiB of at most {MOST >> 20}")
    print("and run there:")
    print("  " + COMMAND.format(visit="first", seconds=330))
    print("  " + COMMAND.format(visit="second", seconds=270) + "  # with the first's rows in build/flight/first.jsonl")
    if of.endswith("+changes"):
        print("files differ from the commit: commit them, and build again")
    return 0 if total < MOST else 1


if __name__ == "__main__":
    sys.exit(main())
