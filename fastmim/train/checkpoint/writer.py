"""A thread that writes checkpoints while training continues."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs one job at a time in a thread.

    Args:
        failed: gets the OSError of a job, and may raise.
        quiet: end the process with status 1 instead of raising an error, which another process raises too.
    """

    def __init__(self, failed: Callable[[OSError], None], *, quiet: bool = False) -> None:
        self._pool = ThreadPoolExecutor(1, "fastmim-checkpoint")
        self._job: Future[None] | None = None
        self._failed, self._quiet = failed, quiet

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
            try:
                if strict:
                    raise
                self._failed(error)
            except OSError:
                if self._quiet:
                    raise SystemExit(1) from None
                raise

    def close(self) -> None:
        self._pool.shutdown()
