"""The commit of a measurement."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# written with the files that are built for a machine without the repository's history
WRITTEN = ROOT / "build" / "flight" / "commit"


def commit(root: Path = ROOT) -> str | None:
    """Return the checked-out commit, with "+changes" where files differ; else the one written down, else None."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) == root.resolve():
            return git("rev-parse", "HEAD") + "+changes" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        pass
    written = root / WRITTEN.relative_to(ROOT)
    return written.read_text().strip() or None if written.exists() else None
