"""Signs of life that the processes of a run give one another, so that the loss of one ends the others in known time.

Each process writes into the common store, which lives where the first process does. The first one judges what the
others wrote and publishes a verdict, which they read; they judge the first one, also by the store's silence. Nothing
wakes a process that waits for a lost one in an exchange of gloo, so a thread ends it.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

ENDED, LEFT = "ended: ", "left"
ADVICE = "this process ends too; the same command goes on from the last checkpoint"


class LostProcess(RuntimeError):
    """Error for another process that ended or gave no sign of life, which the message names with its host."""


class Peers:
    """Watches over all processes of a run.

    Args:
        store: a store of all processes, with a connection and keys of its own.
        rank, world: rank of this process, and number of processes.
        patience: seconds without a sign of life after which a process is lost.
        timeout: seconds to wait for all processes to join.

    Raises:
        LostProcess: a process didn't join.
    """

    def __init__(
        self,
        store: dist.Store,  # type: ignore[name-defined]
        rank: int,
        world: int,
        patience: float,
        timeout: float,
    ) -> None:
        self.store, self.rank, self.world, self.patience = store, rank, world, patience
        self.interval = patience / 12
        self.verdict: str | None = None
        self._lives = [f"life/{other}" for other in range(world)]
        self._note, self._count = "", 0
        self._tell()
        store.set(f"host/{rank}", socket.gethostname())
        self.hosts = self._meet(timeout)
        store.set_timeout(timedelta(seconds=patience))
        self._answered = time.monotonic()
        self._seen = [(b"", self._answered)] * world
        # this process's end is in hand; wake the thread that talks; it has ended
        self._over, self._wake, self._silent = threading.Event(), threading.Event(), threading.Event()
        for target in (self._talk, self._watch):
            threading.Thread(target=target, name="fastmim-peers", daemon=True).start()

    def _meet(self, timeout: float) -> list[str]:
        """Return the host of each process, once all have joined."""
        keys = [f"host/{other}" for other in range(self.world)]
        try:
            self.store.wait(keys, timedelta(seconds=timeout))
            return [text.decode() for text in self.store.multi_get(keys)]
        except dist.DistStoreError:
            absent = [other for other, key in enumerate(keys) if not self.store.check([key])]
            here = sorted({self.store.get(key).decode() for key in keys if self.store.check([key])})
            raise LostProcess(
                f"rank {', '.join(map(str, absent))} of {self.world} did not join within {timeout:g} s; processes on "
                f"{', '.join(here)} did"
            ) from None

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Tell the others how the block ends; raise LostProcess where an exchange in it failed through another's end.

        Raises:
            LostProcess: after at most `patience` seconds.
        """
        try:
            yield
        except BaseException as error:
            if _is_of_exchange(error):
                self._explain(error)
            self._leave(LEFT if isinstance(error, SystemExit) else f"{ENDED}{_in_a_line(error)}")
            raise
        self._leave(LEFT)

    # ---- the end of this process -------------------------------------------------------------------------------------

    def _explain(self, error: BaseException) -> NoReturn:
        """Raise LostProcess as soon as it is known which process is the cause."""
        end = time.monotonic() + self.patience + 2 * self.interval
        while not self.verdict and not self._silent.is_set() and time.monotonic() < end:
            self._wake.set()
            time.sleep(min(0.1, self.interval))
        if self.verdict is None and self._silent.is_set():
            self.verdict = f"{self.name(0)} closed its connections"
        cause = self.verdict or f"all {self.world} processes give signs of life, but {_in_a_line(error)}"
        self._leave(f"{ENDED}{cause}")
        raise LostProcess(f"{cause}; {ADVICE}") from error

    def _leave(self, note: str) -> None:
        """Tell the others the end of this process; as the first one wait a little, until all have read of a fault."""
        self._over.set()
        self._note = note
        self._wake.set()
        end = time.monotonic() + 2 * self.interval
        while not self._silent.wait(min(0.05, self.interval)) and time.monotonic() < end:
            # the store ends with the first process
            gone = all(value.startswith((ENDED.encode(), LEFT.encode())) for value, _ in self._seen)
            if self.rank == 0 and (gone or note == LEFT):
                break
            self._wake.set()

    # ---- threads -----------------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        """Give signs of life and read those of others, until told of this process's end or the store fails."""
        try:
            while True:
                note = self._note
                self._tell()
                if self.rank > 0 and self.store.check(["lost"]):
                    self.verdict = self.verdict or self.store.get("lost").decode()
                self._judge()
                self._answered = time.monotonic()
                if note and self.rank > 0:
                    return
                self._wake.wait(self.interval)
                self._wake.clear()
        except RuntimeError:
            # connections of a store are not renewed
            pass
        finally:
            self._silent.set()

    def _tell(self) -> None:
        self._count += 1
        self.store.set(self._lives[self.rank], self._note or str(self._count))

    def _judge(self) -> None:
        """Find a lost process: the first process looks for any and publishes it, the others look at the first."""
        now = time.monotonic()
        for other, value in enumerate(self.store.multi_get(self._lives if self.rank == 0 else self._lives[:1])):
            if value != self._seen[other][0]:
                self._seen[other] = value, now
            text, silence = value.decode(), now - self._seen[other][1]
            if self.verdict or text == LEFT or (silence <= self.patience and not text.startswith(ENDED)):
                continue
            of = text if text.startswith(ENDED) else f"gave no sign of life for {silence:.0f} s"
            self.verdict = f"{self.name(other)} {of}"
            if self.rank == 0:
                self.store.set("lost", self.verdict)

    def _watch(self) -> None:
        """End this process if another is lost and the main thread waits for it."""
        while not self._over.wait(self.interval / 2):
            if (silence := time.monotonic() - self._answered) > self.patience and not self.verdict:
                self.verdict = f"{self.name(0)} gave no sign of life for {silence:.0f} s"
            # the main thread may raise by itself; the first process's store must be there until all have read it
            if self.verdict and not self._over.wait(2 * self.interval):
                print(f"fastmim: {self.verdict}; {ADVICE}", file=sys.stderr, flush=True)
                os._exit(1)


def _is_of_exchange(error: BaseException) -> bool:
    """Return whether an exchange between processes failed; gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
