"""Fixtures for the tests of the daemon."""

from collections.abc import Iterator

import pytest

from tests.daemon import loop
from tests.daemon.place import cross


@pytest.fixture(autouse=True)
def _nothing_watches_any_more() -> Iterator[None]:
    """End what the test's daemons watch with: a user has 128 inotify instances."""
    yield
    while loop.MADE:
        loop.MADE.pop().end()


@pytest.fixture
def across(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every rename between two folders cross to another file system."""
    cross(monkeypatch)
