"""Lock a folder, so that no two processes write into it and delete each other's files.

The operating system locks a file in the folder (flock). That works between processes of one machine, and between
machines on file systems that support it. For all other cases the file names the process that holds the lock, its
holder, which updates the modification time of the file regularly to show that it is alive.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import stat
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
# seconds between two updates of the modification time, and without an update until a holder counts as dead
BEAT = 5.0
PATIENCE = 20.0
# errors of flock on file systems without locks
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Locked(ValueError):
    """Error for a folder that is in use by another process, which the message names."""


class Lock:
    """Context manager that locks a folder by a file `.fastmim.lock` in it.

    The file stays there, and is empty while the folder isn't locked. After a holder was killed, the next process gets
    the lock at once, or after PATIENCE seconds where flock doesn't work. A child process of the holder does not hold
    the lock.

    Args:
        argument: name of the argument that `folder` was given as, for messages.
        folder: an existing folder.

    Raises:
        Locked: on entering: another process, or another lock of this process, holds the folder.
        OSError: on entering: the lock file can't be created, or is not a regular file.
    """

    def __init__(self, argument: str, folder: Path) -> None:
        self.argument, self.folder, self.path = argument, folder, folder / NAME

    def __enter__(self) -> "Lock":
        # without blocking, in case the file is a pipe
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise FileExistsError(errno.EEXIST, "it must be a regular file", str(self.path))
            self._by_kernel = self._lock_by_kernel()
            holder = self._holder()
            here = holder.get("host") == socket.gethostname()
            if holder and not (self._by_kernel and here) and self._is_alive(holder, log=True):
                raise self._refusal(holder)
            self._entry = self._sign()
            if not self._by_kernel:
                # of two processes that signed at the same moment, the later one keeps the lock
                time.sleep(BEAT / 10)
                if (holder := self._holder()) != self._entry:
                    raise self._refusal(holder)
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
            # this process is a child of the holder
            return
        _held.discard(self)
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self.is_mine():
                os.ftruncate(self._file, 0)
            if self._by_kernel:
                # explicitly: a child that was just forked may still have the file open
                fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)

    def is_mine(self) -> bool:
        """Return whether no other process holds the folder, which may have been removed and created anew by another."""
        return self._holder() in ({}, self._entry)

    # ---- the holder --------------------------------------------------------------------------------------------------

    def _lock_by_kernel(self) -> bool:
        """Lock the file by flock; return False where that is not supported."""
        if fcntl is None:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._by_kernel = True
            raise self._refusal(self._holder()) from None
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return False
            raise
        return True

    def _sign(self) -> dict[str, Any]:
        """Write this process into the lock file as its holder."""
        entry = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": textwrap.shorten(" ".join(sys.argv), 200, placeholder=" ..."),
            "nonce": os.urandom(8).hex(),
        }
        try:
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, json.dumps(entry).encode())
            os.fsync(self._file)
        except OSError:
            # the disk may be full; flock works without the entry
            if not self._by_kernel:
                raise
        return entry

    def _holder(self) -> dict[str, Any]:
        """Return the entry of the lock's holder; empty where there is none."""
        try:
            # opened anew, so that a network file system asks its server
            entry = json.loads(self.path.read_bytes() or b"{}")
        except (OSError, ValueError):
            return {}
        return entry if isinstance(entry, dict) else {}

    def _is_alive(self, holder: dict[str, Any], *, log: bool = False) -> bool:
        """Return whether a holder still runs.

        If its process isn't found on this machine, wait PATIENCE seconds for an update of the lock file.
        """
        pid = holder.get("pid")
        if holder.get("host") == socket.gethostname() and isinstance(pid, int):
            if pid == os.getpid():
                # a lock of this process, or one of an earlier process with its number, as in a restarted container
                return any(lock.path.resolve() == self.path.resolve() for lock in _held)
            if _is_running(pid):
                return True
        if log:
            logger.warning(
                "%s %s was last used by process %s on %s, which didn't end properly: waiting %g s for a sign of life",
                *(self.argument, self.folder, pid, holder.get("host"), PATIENCE),
            )
        return self._beats(holder)

    def _beats(self, holder: dict[str, Any]) -> bool:
        """Return whether the lock file is updated within PATIENCE seconds, by this holder or a later one."""
        updated, end = self._updated(), time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(PATIENCE / 20)
            if not (now := self._holder()):
                return False
            if now != holder or self._updated() != updated:
                return True
        return False

    def _updated(self) -> int:
        """Return the modification time of the lock file."""
        try:
            with open(self.path, "rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return -1

    def _beat(self) -> None:
        """Update the modification time until the lock is released."""
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._file if os.utime in os.supports_fd else self.path)

    def _refusal(self, holder: dict[str, Any]) -> Locked:
        here = holder.get("host") == socket.gethostname()
        if here and holder.get("pid") == os.getpid():
            by = "this process already"
        elif holder:
            by = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
            by += f" ({holder['command']})" if holder.get("command") else ""
        else:
            by = "another process"
        advice = "wait until it ends or choose another folder"
        if not self._by_kernel:
            advice += f"; if it has ended, remove {self.path}"
        return Locked(f"{self.argument} {self.folder} is in use by {by}: {advice}")


def holder_of(folder: Path) -> tuple[dict[str, Any], bool]:
    """Return the entry of the process that holds `folder`, empty if none does, and whether it is alive.

    If its process is on this machine and updated the lock file lately, it is alive; otherwise it is if it updates the
    file within PATIENCE seconds. The number of a dead process may be another one's, as after a restart of the machine.
    """
    lock = Lock("folder", folder)
    holder = lock._holder()
    here = holder.get("host") == socket.gethostname() and isinstance(pid := holder.get("pid"), int) and _is_running(pid)
    recent = abs(time.time() - lock._updated() / 1e9) < PATIENCE
    return holder, bool(holder) and ((here and recent) or lock._beats(holder))


def _is_running(pid: int) -> bool:
    """Return whether this machine has a process with that number; always False on Windows."""
    # on Windows, signal 0 is Ctrl-C
    if os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        # not a process number
        return False
    except OSError:
        return True
    return True


# locks that this process holds
_held: set[Lock] = set()


def _release_in_child() -> None:
    """Close the lock files that a forked child shares with its parent, so that the locks end with the parent."""
    for lock in _held:
        with contextlib.suppress(OSError):
            os.close(lock._file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
