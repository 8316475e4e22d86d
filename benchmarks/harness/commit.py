"""The commit of a measurement."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# written with the files that are built for a machine without the repository's history
WRITTEN = ROOT / "build" / "flight" / "commit"


def commit(root: Path = ROOT) -> str | None:
    """Return the checked-out commit, with "+changes" where files differ; else the one written down, else None.

    The one written down counts, too, where the checkout doesn't know it: its files came without their history.
    """
    written = root / WRITTEN.relative_to(ROOT)
    noted = written.read_text().strip() if written.exists() else ""

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) == root.resolve() and _is_known(root, noted):
            return git("rev-parse", "HEAD") + "+changes" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        pass
    return noted or None


def _is_known(root: Path, noted: str) -> bool:
    """Return whether a checkout has the commit that is written down, if any is."""
    command = ["git", "-C", str(root), "cat-file", "-e", noted.partition("+")[0]]
    return not noted or subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
