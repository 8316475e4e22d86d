"""Photographs to load, and a look at the threads afterwards."""

import gc
import threading

import pytest
from photos import write_pictures


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("photographs"))


@pytest.fixture
def own(tmp_path):
    """Photographs that a test may damage."""
    return write_pictures(tmp_path / "own")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    """Whatever a test does to its loaders, their threads end."""
    yield
    gc.collect()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("fastmim")]
    assert not left
