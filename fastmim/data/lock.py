"""Exclusive use of a folder: processes that write into the same one would delete each other's files.

The kernel's lock (flock) on a file in the folder decides between processes of one machine, and of several where the
file system carries it from one to another. Where it doesn't, or has no such locks, the file says who holds it, and its
modification time, which the holder renews, that the holder is alive.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("fastmim.data")

NAME = ".fastmim.lock"
# seconds between two signs of life, and without any until a holder that no kernel knows of counts as dead
BEAT = 5.0
PATIENCE = 20.0
# errors of file systems without locks
NONE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Locked(ValueError):
    """A folder that another process writes to; the message names the process."""


class Lock:
    """Exclusive use of a folder while entered; the file `.fastmim.lock` in it stays there, empty when nobody holds it.

    A holder that was killed holds nothing: the next one gets the lock at once, or after PATIENCE seconds where the
    kernel can't tell. A child of the holder, by fork or otherwise, holds nothing either.

    Args:
        what: the name of the argument that `folder` was given as, for messages.
        folder: an existing folder.

    Raises:
        Locked: when entered: another process, or another lock of this one, holds the folder.
        OSError: when entered: the file can't be made.
    """

    def __init__(self, what: str, folder: Path) -> None:
        self.what, self.folder, self.path = what, folder, folder / NAME

    def __enter__(self) -> "Lock":
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._sure = sure = self._ask_kernel()
            holder = self._holder()
            if holder and not (sure and holder.get("host") == socket.gethostname()) and self._is_alive(holder):
                raise self._refusal(holder, sure)
            self._said = self._sign(strict=not sure)
            if not sure:
                # without the kernel, of two that come at the same moment the later stays
                time.sleep(BEAT / 10)
                if (holder := self._holder()) != self._said:
                    raise self._refusal(holder, sure)
        except BaseException:
            os.close(self._file)
            raise
        _held.add(self)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="fastmim-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self not in _held:
            # a child of the holder
            return
        _held.discard(self)
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self.is_mine():
                os.ftruncate(self._file, 0)
            if self._sure:
                # a child that was just forked may not have closed the file yet
                fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)

    def is_mine(self) -> bool:
        """Return whether nobody else has signed since: the folder may have been removed and made anew by another."""
        return self._holder() in ({}, self._said)

    # ---- who holds it ------------------------------------------------------------------------------------------------

    def _ask_kernel(self) -> bool:
        """Take the kernel's lock; return False where there is none."""
        if fcntl is None:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise self._refusal(self._holder(), True) from None
        except OSError as error:
            if error.errno in NONE:
                return False
            raise
        return True

    def _sign(self, *, strict: bool) -> dict[str, Any]:
        said = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": textwrap.shorten(" ".join(sys.argv), 200, placeholder=" ..."),
            "nonce": os.urandom(8).hex(),
        }
        try:
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, json.dumps(said).encode())
            os.fsync(self._file)
        except OSError:
            # on a full disk the kernel's lock holds without a name
            if strict:
                raise
        return said

    def _holder(self) -> dict[str, Any]:
        """Read who holds the lock; empty where nobody does, or nobody has signed yet."""
        try:
            # opened anew: network file systems then ask their server
            said = json.loads(self.path.read_bytes() or b"{}")
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        pid = holder.get("pid")
        if holder.get("host") == socket.gethostname() and isinstance(pid, int):
            if pid == os.getpid():
                # if not this process, then one before it, as in a container that was started again
                return any(lock.path.resolve() == self.path.resolve() for lock in _held)
            if _runs(pid):
                return True
        logger.warning(
            "%s %s was last used by process %s on %s, which didn't end by itself: waiting %g s for a sign of life",
            *(self.what, self.folder, pid, holder.get("host"), PATIENCE),
        )
        seen, end = self._renewed(), time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(PATIENCE / 20)
            if not (now := self._holder()):
                return False
            if now != holder or self._renewed() != seen:
                return True
        return False

    def _renewed(self) -> int:
        try:
            with open(self.path, "rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return -1

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._file if os.utime in os.supports_fd else self.path)

    def _refusal(self, holder: dict[str, Any], sure: bool) -> Locked:
        here = holder.get("host") == socket.gethostname()
        if here and holder.get("pid") == os.getpid():
            by = "this process already"
        elif holder:
            by = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
            by += f" ({holder['command']})" if holder.get("command") else ""
        else:
            by = "another process"
        way = "wait for its end or choose another folder"
        if not sure:
            way += f"; if it has ended, remove {self.path}"
        return Locked(f"{self.what} {self.folder} is in use by {by}: {way}")


def _runs(pid: int) -> bool:
    """Return whether a process of this machine has the number; signal 0 means another thing on Windows."""
    if os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        # the file holds no number of a process
        return False
    except OSError:
        return True
    return True


# of this process
_held: set[Lock] = set()


def _let_go() -> None:
    """In a child, close the files that it shares with its parent: it would hold the locks beyond the parent's death."""
    for lock in _held:
        with contextlib.suppress(OSError):
            os.close(lock._file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
