"""A thread that writes checkpoints while training continues."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs one job at a time in a thread; an OSError of a job goes to `failed`, which may raise."""

    def __init__(self, failed: Callable[[OSError], None]) -> None:
        self._pool = ThreadPoolExecutor(1, "fastmim-checkpoint")
        self._job: Future[None] | None = None
        self._failed = failed

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job, after waiting for the one before."""
        self.wait()
        self._job = self._pool.submit(job)

    def wait(self, *, strict: bool = False) -> None:
        """Wait until nothing is being written; with `strict`, raise the OSError of the job."""
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
