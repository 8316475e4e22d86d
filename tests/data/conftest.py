"""Fixtures: small photographs, and a check that no thread of a loader survives its test."""

import gc
import threading

import pytest
from photos import write_pictures


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Folder of photographs that no test may change."""
    return write_pictures(tmp_path_factory.mktemp("photographs"))


@pytest.fixture
def own(tmp_path):
    """Folder of photographs that a test may damage."""
    return write_pictures(tmp_path / "own")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    """Check after each test that the threads of its loaders have ended."""
    # what is there already isn't looked through after each test
    gc.freeze()
    yield
    gc.collect()
    if _threads_left():
        gc.unfreeze()
        gc.collect()
    assert not _threads_left()


def _threads_left():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastmim")]
