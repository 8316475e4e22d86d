"""Fixtures of the checkpoint tests."""

from pathlib import Path

import pytest


@pytest.fixture
def file(tmp_path) -> Path:
    """Path of the checkpoint that a test writes."""
    return tmp_path / "checkpoint.pth"
