"""Count unreadable samples, list them in a file with the reasons, and stop when there are too many."""

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

from .base_source import Source

logger = logging.getLogger("fastmim.data")

NAME = "quarantine.jsonl"
# largest share of unreadable samples
LIMIT = 0.1
# samples that must have been tried before the share among them is judged
ENOUGH = 100


def listing_of(source: Source, path: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the file that lists the unreadable samples of a source: `path`, else one in the source's folder."""
    if path is not None:
        return Path(path)
    return None if source.root is None else source.root / NAME


class Quarantine:
    """The unreadable samples found so far, `reasons` by sample number, and the file that lists them, or None.

    The file is only appended to, one JSON object per line with `file`, `id` and `reason`; it isn't created while every
    sample is readable. A file that becomes readable again gets a line with the reason null.
    """

    def __init__(self, path: Path | None, samples: int) -> None:
        self.path, self.samples = path, samples
        self.reasons: dict[int, str] = {}
        # names of files that the quarantine file lists; None until it is read
        self._listed: set[str] | None = None
        self._failure: OSError | None = None

    def add(self, sample: int, name: str, reason: str) -> None:
        """Record that a sample can't be read."""
        if sample in self.reasons:
            return
        self.reasons[sample] = reason
        # %a, since a name may hold bytes that are not valid text
        logger.warning("skipping %a: %s", name, reason)
        self._list(sample, name, reason)

    def remove(self, sample: int, name: str) -> None:
        """Record that a sample can be read, and log it if it couldn't be before."""
        if self.reasons.pop(sample, None) is not None:
            logger.warning("%a can be read again", name)
        self._list(sample, name, None)

    def remove_all(self, samples: Sequence[int], names: Sequence[str]) -> None:
        """Record that samples can be read; `names` are those of all samples."""
        if self.reasons or self._listed != set():
            for sample in samples:
                self.remove(sample, names[sample])

    def _list(self, sample: int, name: str, reason: str | None) -> None:
        """Append a line, unless the file states this already."""
        if self.path is None:
            return
        try:
            if self._listed is None:
                self._listed = set()
                self._listed |= {str(entry["file"]) for entry in listed(self.path)}
            if (name in self._listed) == (reason is None):
                self._listed ^= {name}
                # a single write, so that lines of several processes don't mix
                with open(self.path, "a") as file:
                    file.write(json.dumps({"file": name, "id": sample, "reason": reason}) + "\n")
        except OSError as error:
            self._failure = error
            logger.warning("can't list it in %s: %s", self.path, error)

    def listing(self) -> str:
        """Return where the samples are listed, or why they aren't, for messages."""
        if self.path is None:
            return "not listed, since no quarantine file was named"
        if self._failure is None:
            return f"listed in {self.path}"
        return f"not listed, since {self.path} can't be written: {self._failure.strerror}"

    def check(self, tried: int, failed: int) -> None:
        """Stop when more than LIMIT of all samples are unreadable, or clearly more than LIMIT of those tried so far.

        Raises:
            RuntimeError: there are too many; the message names the counts, a few samples and the file.
        """
        bad = len(self.reasons)
        # five standard deviations above the limit
        clearly = tried >= ENOUGH and failed > LIMIT * tried + 5 * math.sqrt(LIMIT * (1 - LIMIT) * tried)
        if bad > LIMIT * self.samples or clearly:
            found = f"{failed} of the first {tried} samples" if clearly else f"{bad} of {self.samples} samples"
            some = "; ".join(f"{sample}: {reason}" for sample, reason in list(self.reasons.items())[:3])
            raise RuntimeError(f"{found} can't be read, and at most {LIMIT:.0%} may be: {some}; {self.listing()}")


def listed(path: Path) -> list[dict[str, object]]:
    """Return the entries of a quarantine file, without files that could be read later; none if there is no file.

    Malformed lines are skipped.
    """
    entries: dict[str, dict[str, object]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "file" in entry:
            name = str(entry["file"])
            if entry.get("reason") is None:
                entries.pop(name, None)
            else:
                entries[name] = entry
    return list(entries.values())
