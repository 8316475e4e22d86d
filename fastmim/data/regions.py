"""Probe of DALI's decoding of regions of JPEGs: once for an installation and GPU, in a process that may crash.

Versions of nvImageCodec fail at it on some cards and end the process on others, which no Python code can catch. Where
regions can't be decoded, whole images are, and the crops are cut out of them.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .._version import __version__
from . import pictures
from .crops import Crop, Crops

# seconds, the first start of CUDA and DALI included
LIMIT = 120.0
# what the child says once whole images have the right pixels, and once regions have: no library prints these words
WHOLE, REGIONS = "fastmim:whole", "fastmim:regions"
CHILD = "import sys; sys.path[:] = {path!r}; from fastmim.data.regions import main; main({device!r})"
# grey levels, in the mean, between decoders and filters on smooth pictures; another region is ten times as far off
CLOSE = 4.0


class Answer(NamedTuple):
    """The outcome of a probe: `usable`, the reason if not, and `lasting` if it is worth remembering."""

    usable: bool
    reason: str = ""
    lasting: bool = True


@functools.cache
def usable(device: torch.device) -> bool:
    """Return whether DALI decodes regions on a CUDA device: as remembered, else as a child process finds out."""
    key = {**_versions(), "driver": _driver(), "card": torch.cuda.get_device_name(device)}
    answer = _recall(key)
    if answer is None:
        answer = probe(CHILD.format(path=sys.path, device=str(device)))
        if answer.lasting:
            _remember(key, answer)
    if not answer.usable:
        warnings.warn(f"DALI decodes whole images on {key['card']}: {answer.reason}", stacklevel=2)
    return answer.usable


def remembered() -> dict[str, str]:
    """Return what is known of the installed versions, by card and driver. Starts no CUDA context."""
    found, versions = {}, _versions()
    try:
        paths = sorted(_folder().glob("regions-*.json"))
    except (OSError, RuntimeError):
        paths = []
    for path in paths:
        key, answer = _read(path)
        if answer is not None and {name: key.get(name) for name in versions} == versions:
            how = "used" if answer.usable else f"whole images are decoded: {answer.reason}"
            found[f"{key.get('card')}, driver {key.get('driver')}"] = how
    return found


# ---- the child -------------------------------------------------------------------------------------------------------


def probe(code: str, limit: float = LIMIT) -> Answer:
    """Run a child and judge it by what it said before it ended, crashed, or was given up after `limit` seconds."""
    try:
        ended, said, complaint = _run(code, limit)
    except OSError as error:
        return Answer(False, f"no process to try it in: {error}", lasting=False)
    words = said.split()
    if REGIONS in words:
        return Answer(True)
    reason = ": ".join([ended, *complaint.strip().splitlines()[-1:]])
    if WHOLE in words:
        return Answer(False, f"decoding regions failed in a child process, {reason}")
    return Answer(False, f"a child process could not decode at all, {reason}", lasting=False)


def _run(code: str, limit: float) -> tuple[str, str, str]:
    """Return how a child ended, what it printed, and what it wrote to standard error."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            status = child.wait(limit)
            ended = f"ended by {_signal(-status)}" if status < 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            child.kill()
            # one that hangs in the driver may not die
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1)
            ended = f"still busy after {limit:g} s"
        return ended, _text(out), _text(err)


def main(device: str) -> None:
    """Decode a few small JPEGs, whole and then by regions, and say so."""
    for regions, word in ((False, WHOLE), (True, REGIONS)):
        check(torch.device(device), regions)
        print(word, flush=True)


def check(device: torch.device, regions: bool) -> None:
    """Compare crops of DALI with those of Pillow.

    Raises:
        RuntimeError: they differ, or some aren't decoded.
    """
    from .dali import Dali, Job
    from .transfer import link_to

    crops = Crops((64, 64), (0.2, 1.0), (3 / 4, 4 / 3), True, 2)
    link = link_to(device) if device.type == "cuda" else None
    decoder = Dali(crops, device, 2, link, regions=regions)
    try:
        files = [_picture(number) for number in range(16)]
        jobs = [decoder.prepare(data, draws) for data, draws in zip(files, crops.draws(0, 0, np.arange(len(files))))]
        decoded = decoder._decode([job for job in jobs if isinstance(job, Job)])
        decoder.release()
        for data, job, found in zip(files, jobs, decoded, strict=True):
            if found is None:
                raise RuntimeError("DALI gives no pixels of a plain JPEG")
            assert isinstance(job, Job)
            for crop, pixels in zip(job.crops, found, strict=True):
                _compare(pixels.cpu().numpy() if isinstance(pixels, torch.Tensor) else pixels, data, crop)
    finally:
        decoder.close()


def _compare(found: Any, data: bytes, crop: Crop) -> None:
    right = pictures.resize(pictures.decode(data), crop, (64, 64))
    far = float(np.abs(found.astype(np.float64) - right).mean())
    if not far < CLOSE:
        raise RuntimeError(f"pixels of a crop are {far:.1f} grey levels off")


def _picture(number: int) -> bytes:
    """A JPEG of the size of a photograph, smooth, and unlike its shifted self."""
    from PIL import Image

    random = np.random.default_rng(number)
    width, height = ((500, 375), (375, 500), (640, 427), (333, 500))[number % 4]
    coarse = Image.fromarray(random.integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8))
    file = io.BytesIO()
    smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
    smooth.save(file, "JPEG", quality=90, subsampling=number % 3, progressive=number % 8 == 7)
    return file.getvalue()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))


# ---- what is remembered ----------------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    """Return those of fastmim, DALI and what DALI decodes with."""
    # of several on sys.path the first is imported: it comes last
    named = ((str(found.metadata["Name"] or "").lower(), found.version) for found in reversed([*distributions()]))
    kept = {name: version for name, version in named if name.startswith(("nvidia-dali", "nvidia-nvimgcodec"))}
    return {"fastmim": __version__, **dict(sorted(kept.items()))}


def _driver() -> str:
    """The release of the driver where the system tells, and the CUDA version that it serves."""
    try:
        told = re.search(r"\d+(\.\d+)+", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        told = None
    cuda = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
    return f"{told.group() if told else 'unknown'} (CUDA {cuda})"


def _folder() -> Path:
    """Raises RuntimeError where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmim"


def _path(key: dict[str, str]) -> Path:
    return _folder() / f"regions-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> tuple[dict[str, str], Answer | None]:
    try:
        found = json.loads(path.read_text())
        key, answer = dict(found["key"]), Answer(bool(found["usable"]), str(found["reason"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}, None
    return key, answer


def _recall(key: dict[str, str]) -> Answer | None:
    try:
        theirs, answer = _read(_path(key))
    except RuntimeError:
        return None
    return answer if theirs == key else None


def _remember(key: dict[str, str], answer: Answer) -> None:
    """Write the answer whole or not at all; a folder that can't be written to is no error."""
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, path.name)
            whole.write_text(json.dumps({"key": key, "usable": answer.usable, "reason": answer.reason}))
            os.replace(whole, path)
    except (OSError, RuntimeError):
        pass
