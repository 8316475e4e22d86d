"""What can't be served: counted, listed in a file with the reason, and too much when it is."""

import json
import logging
import math
from pathlib import Path

logger = logging.getLogger("fastmim.data")

NAME = "quarantine.jsonl"
# a larger share of unreadable samples is no accident
LIMIT = 0.1
# samples after which a share found is trusted
ENOUGH = 100


class Quarantine:
    """The unreadable samples met so far, `reasons` by number, and the file that lists them.

    The file is appended to, one JSON object a line with `file`, `id` and `reason`; nothing is written while nothing
    is bad. A file that could be read later, since it was repaired, gets a line whose reason is null.
    """

    def __init__(self, path: Path, samples: int) -> None:
        self.path, self.samples = path, samples
        self.reasons: dict[int, str] = {}
        self._listed: set[str] | None = None

    def add(self, sample: int, name: str, reason: str) -> None:
        if sample in self.reasons:
            return
        self.reasons[sample] = reason
        # %a: a name may hold bytes that are no text
        logger.warning("skipping %a: %s", name, reason)
        self._list(sample, name, reason)

    def remove(self, sample: int, name: str) -> None:
        """Note that a sample can be read; says so if it couldn't be before."""
        if self.reasons.pop(sample, None) is not None:
            logger.warning("%a can be read again", name)
        self._list(sample, name, None)

    def _list(self, sample: int, name: str, reason: str | None) -> None:
        """Append a line, unless the file says so already."""
        try:
            if self._listed is None:
                self._listed = set()
                self._listed |= {str(entry["file"]) for entry in listed(self.path)}
            if (name in self._listed) == (reason is None):
                self._listed ^= {name}
                # one write, so that lines of several processes don't mix
                with open(self.path, "a") as file:
                    file.write(json.dumps({"file": name, "id": sample, "reason": reason}) + "\n")
        except OSError as error:
            logger.warning("can't list it in %s: %s", self.path, error)

    def check(self, tried: int, failed: int) -> None:
        """Stop when more than LIMIT of all samples are known to be bad, or those tried leave no doubt of it.

        Raises:
            RuntimeError: naming the counts, a few samples and the file.
        """
        known = len(self.reasons)
        # five standard deviations above the limit
        surely = tried >= ENOUGH and failed > LIMIT * tried + 5 * math.sqrt(LIMIT * (1 - LIMIT) * tried)
        if known > LIMIT * self.samples or surely:
            found = f"{known} of {self.samples} samples" if not surely else f"{failed} of the first {tried} samples"
            some = "; ".join(f"{sample}: {reason}" for sample, reason in list(self.reasons.items())[:3])
            raise RuntimeError(f"{found} can't be read, and at most {LIMIT:.0%} may be: {some}; {self.path} lists them")


def listed(path: Path) -> list[dict[str, object]]:
    """The entries of a quarantine file, without those of files that could be read later; none where there is no file.

    Lines that can't be read are left out.
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
