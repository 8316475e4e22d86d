"""TensorBoard's event files, written by the calling thread, so that it sees the errors of the disk."""

import os
import socket
import time
from pathlib import Path
from typing import Any

PREFIX = "events.out.tfevents."


class TensorBoardWriter:
    """Writer of scalars for `tensorboard --logdir`; it hides those that an earlier run wrote after step `start`.

    Raises:
        ImportError: tensorboard isn't installed.
        OSError: the file can't be written, then or later.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        # TensorBoard reads a folder's files in the order of their names: this one must be the last, even if the clock
        # was set back
        others = [
            (int(path.name.split(".")[3]), path.stat().st_mtime_ns) for path in folder.glob(f"{PREFIX}{'[0-9]' * 20}.*")
        ]
        self._began = max([time.time_ns(), *(max(times) + 1 for times in others)])
        self._clock = time.monotonic_ns()
        name = f"{PREFIX}{self._began:020}.{socket.gethostname()}.{os.getpid()}"
        self.file = open(folder / name, "ab")  # noqa: SIM115 (closed by close)
        self._writer = RecordWriter(self.file)
        self._add(file_version="brain.Event:2")
        self._add(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Write the values of one step."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._add(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        self.file.close()

    def _add(self, **parts: Any) -> None:
        now = self._began + time.monotonic_ns() - self._clock
        self._writer.write(self._event(wall_time=now / 1e9, **parts).SerializeToString())
        self.file.flush()
