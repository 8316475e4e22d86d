"""Signals by which schedulers end a job: noted, so that the loop can finish its step and save."""

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))


class Interrupted(SystemExit):
    """The run was asked to stop, saved, and can go on: ends the process with status 128 + signal, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class Interruptions:
    """While entered, SIGTERM and SIGUSR1 are noted in `number`; only the main thread can listen."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruptions":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
