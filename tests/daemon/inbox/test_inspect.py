"""Decoding in a process of its own: whatever becomes of that process, the daemon gets an answer."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from framepack_core.errors import RequestError
from framepackd.inbox import inspect


@pytest.fixture
def picture(tmp_path: Path) -> Iterator[Path]:
    """Give a picture, and a process that has not been asked anything yet."""
    inspect.end()
    Image.new("RGB", (40, 30)).save(tmp_path / "cat.png")
    yield tmp_path / "cat.png"
    inspect.end()


def test_a_picture_that_cannot_be_used_is_told_and_the_next_one_read(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "dog.png").write_text("no picture")
    with pytest.raises(RequestError, match=r"^dog\.png is not a picture"):
        inspect.picture_size(tmp_path / "dog.png")
    assert inspect.picture_size(picture) == (30, 40)


def test_stopping_the_daemons_group_does_not_end_a_decode(picture: Path) -> None:
    inspect.picture_size(picture)
    assert inspect.running is not None
    first = inspect.running.pid
    os.kill(first, signal.SIGTERM)
    os.kill(first, signal.SIGINT)
    assert inspect.picture_size(picture) == (30, 40)
    assert inspect.running.pid == first


def test_a_process_that_somebody_killed_is_started_again(picture: Path) -> None:
    inspect.picture_size(picture)
    assert inspect.running is not None
    os.kill(inspect.running.pid, signal.SIGKILL)
    assert inspect.picture_size(picture) == (30, 40)


@pytest.mark.parametrize(
    ("name", "said"),
    [("SEGV", r"breaks its decoder \(exit code -11\)"), ("ALRM", "takes more than 15 s to decode")],
)
def test_a_picture_that_ends_its_decoder_fails_and_nothing_else(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    broken = tmp_path / "python"
    broken.write_text(f"#!/bin/sh\nread line\nkill -{name} $$\n")
    broken.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr("sys.executable", str(broken))
        with pytest.raises(RequestError, match=f"cat.png {said}"):
            inspect.picture_size(picture)
    assert inspect.picture_size(picture) == (30, 40)
