"""Signals by which schedulers end a job; the loop then finishes its step and saves."""

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))


class Interrupted(SystemExit):
    """Exit after a signal, once the run is saved, with status 128 + signal, as shells do."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class SignalListener:
    """Context that stores SIGTERM or SIGUSR1 in `received` instead of ending the process; in the main thread only."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "SignalListener":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
