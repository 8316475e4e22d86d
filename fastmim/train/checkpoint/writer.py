"""One thread that writes checkpoints while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """Runs one job at a time; `failed(error)` is told of one that couldn't write, and may raise."""

    def __init__(self, failed: Callable[[OSError], None]) -> None:
        self._pool = ThreadPoolExecutor(1, "fastmim-checkpoint")
        self._job: Future[None] | None = None
        self._failed = failed

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job, once the one before is done."""
        self.wait()
        self._job = self._pool.submit(job)

    def wait(self, *, strict: bool = False) -> None:
        """Until nothing is being written; `strict` raises what went wrong."""
        job, self._job = self._job, None
        try:
            if job is not None:
                job.result()
        except OSError as error:
            if strict:
                raise
            self._failed(error)

    def close(self) -> None:
        self._pool.shutdown()
