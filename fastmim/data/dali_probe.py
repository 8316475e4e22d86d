"""Find out whether DALI can decode regions of JPEGs, once per installation and GPU, in a child process.

Some versions of nvImageCodec fail at this on some cards, and others crash the process, which Python can't catch. Where
regions can't be decoded, DALI decodes whole images and the crops are cut from them.
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
from . import images
from .crops import Crop, Crops
from .resample import Resampled, cut

# seconds; they include starting CUDA and DALI
LIMIT = 120.0
# printed by the child once whole images, and then regions, have the right pixels; distinct from what libraries print
WHOLE, REGIONS = "fastmim:whole", "fastmim:regions"
# largest mean difference in grey levels between decoders and filters on smooth images; a wrong region differs by ten
# times as much
TOLERANCE = 4.0


class Answer(NamedTuple):
    """Result of a probe: `usable`, with the reason if not; `lasting` results are stored."""

    usable: bool
    reason: str = ""
    lasting: bool = True


@functools.cache
def can_decode_regions(device: torch.device) -> bool:
    """Return whether DALI decodes regions on a CUDA device: the stored result, or else that of a child process."""
    key = {**_versions(), "driver": _driver(), "card": torch.cuda.get_device_name(device)}
    answer = _load(key)
    if answer is None:
        answer = probe(child_code(device))
        if answer.lasting:
            _store(key, answer)
    if not answer.usable:
        warnings.warn(f"DALI decodes whole images on {key['card']}: {answer.reason}", stacklevel=2)
    return answer.usable


def stored() -> dict[str, str]:
    """Return the stored results for the installed versions, by card and driver. Starts no CUDA context."""
    found, versions = {}, _versions()
    try:
        paths = sorted(_folder().glob("regions-*.json"))
    except (OSError, RuntimeError):
        paths = []
    for path in paths:
        key, answer = _read(path)
        if answer is not None and {name: key.get(name) for name in versions} == versions:
            result = "used" if answer.usable else f"whole images are decoded: {answer.reason}"
            found[f"{key.get('card')}, driver {key.get('driver')}"] = result
    return found


# ---- the child process -----------------------------------------------------------------------------------------------


def child_code(device: torch.device) -> str:
    """Return the code of the child, which imports fastmim from the same place as this process."""
    path = [*map(str, sys.path)]
    return f"import sys; sys.path[:] = {path!r}; from fastmim.data.dali_probe import main; main({str(device)!r})"


def probe(code: str, limit: float = LIMIT) -> Answer:
    """Run a child and judge it by what it printed before it ended, crashed, or was killed after `limit` seconds."""
    try:
        ended, output, errors = _run(code, limit)
    except OSError as error:
        return Answer(False, f"the child process can't be started: {error}", lasting=False)
    words = output.split()
    if REGIONS in words:
        return Answer(True)
    reason = ": ".join([ended, *errors.strip().splitlines()[-1:]])
    if WHOLE in words:
        return Answer(False, f"decoding regions failed in a child process, {reason}")
    return Answer(False, f"a child process could not decode at all, {reason}", lasting=False)


def _run(code: str, limit: float) -> tuple[str, str, str]:
    """Run a child; return how it ended, its output, and its error output."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            status = process.wait(limit)
            ended = f"ended by {_signal(-status)}" if status < 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            process.kill()
            # a process that hangs in the driver may not die
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            ended = f"still busy after {limit:g} s"
        return ended, _text(out), _text(err)


def main(device: str) -> None:
    """Decode a few small JPEGs, whole and then by regions, and print a word after each."""
    for regions, word in ((False, WHOLE), (True, REGIONS)):
        check(torch.device(device), regions)
        print(word, flush=True)


def check(device: torch.device, regions: bool) -> None:
    """Compare crops from DALI with those from Pillow.

    Raises:
        RuntimeError: some crops differ or are missing.
    """
    from .dali import Dali, Job
    from .transfer import link_to

    crops = Crops((64, 64), (0.2, 1.0), (3 / 4, 4 / 3), True, 2)
    link = link_to(device) if device.type == "cuda" else None
    decoder = Dali(crops, device, 2, link, regions=regions)
    try:
        files = [_sample_jpeg(number) for number in range(16)]
        jobs = [decoder.prepare(data, draws) for data, draws in zip(files, crops.draws(0, 0, np.arange(len(files))))]
        decoded = decoder._decode([job for job in jobs if isinstance(job, Job)])
        decoder.release()
        for data, job, found in zip(files, jobs, decoded, strict=True):
            if found is None:
                raise RuntimeError("DALI gives no pixels of a plain JPEG")
            assert isinstance(job, Job)
            assert not isinstance(found, Resampled)
            for crop, pixels in zip(job.crops, found, strict=True):
                _compare(pixels.cpu().numpy() if isinstance(pixels, torch.Tensor) else pixels, data, crop, crops)
    finally:
        decoder.close()


def _compare(found: Any, data: bytes, crop: Crop, crops: Crops) -> None:
    expected = cut(images.decode(data), [crop], crops).made()[0]
    difference = float(np.abs(found.astype(np.float64) - expected).mean())
    if not difference < TOLERANCE:
        raise RuntimeError(f"pixels of a crop are {difference:.1f} grey levels off")


def _sample_jpeg(number: int) -> bytes:
    """Return a smooth JPEG of the size of a photograph, whose regions are unlike each other."""
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


# ---- stored results --------------------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    """Return the versions of fastmim, DALI and DALI's image decoders."""
    # reversed: of several distributions on sys.path the first is imported, and must win
    named = ((str(found.metadata["Name"] or "").lower(), found.version) for found in reversed([*distributions()]))
    kept = {name: version for name, version in named if name.startswith(("nvidia-dali", "nvidia-nvimgcodec"))}
    return {"fastmim": __version__, **dict(sorted(kept.items()))}


def _driver() -> str:
    """Return the release of the NVIDIA driver, where the system states it, and the CUDA version that it supports."""
    try:
        release = re.search(r"\d+(\.\d+)+", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        release = None
    cuda = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
    return f"{release.group() if release else 'unknown'} (CUDA {cuda})"


def _folder() -> Path:
    """Return the cache folder. Raises RuntimeError where there is no home."""
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


def _load(key: dict[str, str]) -> Answer | None:
    try:
        stored_key, answer = _read(_path(key))
    except RuntimeError:
        return None
    return answer if stored_key == key else None


def _store(key: dict[str, str], answer: Answer) -> None:
    """Write a result, atomically; a cache folder that can't be written to is not an error."""
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            complete = Path(folder, path.name)
            complete.write_text(json.dumps({"key": key, "usable": answer.usable, "reason": answer.reason}))
            os.replace(complete, path)
    except (OSError, RuntimeError):
        pass
