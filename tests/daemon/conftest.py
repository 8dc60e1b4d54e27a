"""Fixtures for the tests of the daemon."""

import pytest

from tests.daemon.place import cross


@pytest.fixture
def across(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every rename between two folders cross to another file system."""
    cross(monkeypatch)
