"""Triton caches that are filled without the GPU, and a record of the kernels that are compiled there all the same.

    python benchmarks/gpu/triton_cache.py fill build/flight/triton.tar.gz
    python benchmarks/gpu/triton_cache.py check build/flight/triton.tar.gz
    python benchmarks/gpu/triton_cache.py unpack build/flight/triton*.tar.gz FOLDER

`fill` compiles the kernels that a flight launches (triton_fill.py), `check` counts those that the archive lacks. A key
of the cache holds the kernel's source with its line numbers: fill it from the commit that flies, with the versions of
Triton and Python that it flies with.
"""

import argparse
import io
import json
import os
import sys
import sysconfig
import tarfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from triton.runtime import build

from harness import rows
from harness.commit import commit

ARCHITECTURE = 90
STAGE = "cache_miss"
# files of a kernel's entry that a launch reads; its intermediate forms are left out
KEPT = (".json", ".cubin")
# file beside the entries with the versions that they were made with
MADE = "made.json"

# ---- what was compiled, and what was found ---------------------------------------------------------------------------


@dataclass
class Seen:
    """Kernels that were found in the cache, and those that were compiled, with milliseconds."""

    hits: Counter[str] = field(default_factory=Counter)
    misses: dict[str, float] = field(default_factory=dict)


def watch(record: bool = True) -> Seen:
    """Count from now on, in this process, the kernels that the cache has and those that it lacks.

    Each of the latter leaves a row with its signature. A cache that was filled by another build of this very version of
    Triton is used all the same.
    """
    adopt(Path(triton.knobs.cache.dir))
    seen = Seen()

    def listen(*, src: Any, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        function = getattr(src, "fn", None)
        name = f"{function.module}.{src.name}" if function else src.name
        if cache_hit:
            seen.hits[name] += 1
            return
        key = f"{name} {metadata['hash'][:12]}"
        seen.misses[key] = times.total / 1e3
        if record:
            constants = {str(place): str(value) for place, value in getattr(src, "constants", {}).items()}
            rows.record(
                STAGE,
                key,
                kernel=name,
                milliseconds=round(times.total / 1e3),
                signature=[str(kind) for kind in src.signature.values()],
                constants=constants,
                aligned=[str(place) for place in getattr(src, "attrs", {})],
                num_warps=metadata.get("num_warps"),
                num_stages=metadata.get("num_stages"),
            )

    triton.knobs.compilation.listener = listen
    return seen


def adopt(folder: Path) -> None:
    """Make this process look for the keys with which the folder was filled, if Triton's version is the same.

    They hold a hash of Triton's build, for which 400 MB would be read, and, those of C modules, the name of the
    platform, whose last word, ELF, is missing where the program `file` isn't installed.
    """
    made = folder / MADE
    if not made.is_file():
        return
    facts = json.loads(made.read_text())
    if facts["triton"] != triton.__version__:
        return
    triton.runtime.cache.triton_key = lambda: facts["key"]
    if facts.get("platform", "").startswith(build.platform_key().removesuffix("ELF")):
        build.platform_key = lambda: facts["platform"]


def facts() -> dict[str, Any]:
    """Return what an entry's key holds besides its kernel."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return {
        "commit": commit(),
        "triton": triton.__version__,
        "key": triton.runtime.cache.triton_key(),
        "platform": build.platform_key(),
        "ptxas": triton.knobs.nvidia.ptxas.version,
        "environment": dict(get_cache_invalidating_env_vars()),
        "python": sysconfig.get_config_var("EXT_SUFFIX"),
        "torch": torch.__version__,
        "architecture": ARCHITECTURE,
    }


def differences(made: dict[str, Any]) -> list[str]:
    """Describe the differences between here and where an archive was made that may make it useless."""
    here = facts()
    names = [name for name in ("triton", "ptxas", "environment", "python", "commit") if made.get(name) != here[name]]
    found = [f"{name} is {here[name]}, there it was {made.get(name)}" for name in names]
    if "triton" not in names and made.get("key") != here["key"]:
        found.append("Triton is another build of its version; its entries are used all the same")
    return found


# ---- archives --------------------------------------------------------------------------------------------------------


def pack(folder: Path, archive: Path, kernels: set[str]) -> None:
    """Write the files of a cache that launches read into an archive: entries of kernels, and all C modules."""
    with tarfile.open(archive, "w:gz", compresslevel=9) as tar:
        add(tar, MADE, json.dumps(facts()).encode())
        for file in sorted(folder.glob("*/*")):
            if file.suffix == ".so" or (file.parent.name in kernels and file.suffix in KEPT):
                add(tar, f"{file.parent.name}/{file.name}", file.read_bytes())


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(content), int(time.time()), 0o644
    tar.addfile(member, io.BytesIO(content))


def unpack(archive: Path, folder: Path) -> dict[str, Any]:
    """Unpack an archive of this script, or any of a cache's entries, into a folder; return what it was made with.

    Groups of files, which name them by whole paths, name those that are in the folder. Times stay those of the archive.
    """
    folder = folder.resolve()
    made: dict[str, Any] = {}
    times: dict[Path, float] = {}
    groups: list[tuple[Path, float]] = []
    with tarfile.open(archive) as tar:
        for member in tar:
            path = (folder / member.name).resolve()
            if not path.is_relative_to(folder) or not (member.isfile() or member.isdir()):
                raise ValueError(f"{archive} holds {member.name}, which is no entry of a cache")
            if not member.isfile():
                continue
            reader = tar.extractfile(member)
            assert reader is not None
            content = reader.read()
            if path.name.startswith("__grp__"):
                groups.append((path, member.mtime))
            if path == folder / MADE:
                made = json.loads(content)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            os.utime(path, (member.mtime, member.mtime))
            if path.parent != folder:
                times[path.parent] = max(member.mtime, times.get(path.parent, 0.0))
    for path, modified in groups:
        files = [path.parent / Path(name).name for name in json.loads(path.read_text())["child_paths"]]
        path.write_text(json.dumps({"child_paths": {file.name: str(file) for file in files if file.is_file()}}))
        os.utime(path, (modified, modified))
    for entry, modified in times.items():
        os.utime(entry, (modified, modified))
    return made


def unpack_all(archives: list[Path], folder: Path) -> int:
    """Unpack archives into a folder and print the faults of each; return 1 if one can't be unpacked."""
    status = 0
    for archive in archives:
        try:
            # an archive of single entries doesn't say what it was made with
            problems = differences(made) if (made := unpack(archive, folder)) else []
        except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
            problems, status = [f"not unpacked: {error}"], 1
        for line in problems:
            print(f"{archive.name}: {line}")
    return status


def made_with(archive: Path) -> dict[str, Any]:
    """Return the facts that an archive was made with; an empty dict without an archive."""
    if not archive.is_file():
        return {}
    with tarfile.open(archive) as tar:
        reader = tar.extractfile(MADE)
        assert reader is not None
        found: dict[str, Any] = json.load(reader)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("fill", "compile into it"), ("check", "count what it lacks"), ("unpack", "into a folder")):
        command = commands.add_parser(name, help=about)
        if name == "unpack":
            command.add_argument("archives", type=Path, nargs="+")
            command.add_argument("folder", type=Path)
            continue
        command.add_argument("archive", type=Path)
        if name == "fill":
            command.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if args.command == "unpack":
        sys.exit(unpack_all(args.archives, args.folder))
    from gpu import triton_fill

    if args.command == "fill":
        made = made_with(args.archive)
        if made.get("commit") and not made["commit"].endswith("+changes") and not differences(made):
            print(f"{args.archive} is of this commit")
        else:
            print(json.dumps(triton_fill.fill(args.archive, triton_fill.programs(), args.processes), indent=1))
    else:
        seen = triton_fill.check(args.archive, triton_fill.programs())
        for name, milliseconds in seen.misses.items():
            print(f"missing: {name}, {milliseconds:.0f} ms")
        print(f"{sum(seen.hits.values())} kernels found, {len(seen.misses)} compiled")
        sys.exit(1 if seen.misses else 0)


if __name__ == "__main__":
    main()
