"""The worker writes the video of one job while it computes the next one."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from framepackd.worker import main, messages
from framepackd.worker.video import Video
from tests.daemon.worker.jobs import made, run, work_in


class Slow:
    """A disk that writes the first video only when it is allowed to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allowed = threading.Event()
        self._calls = 0
        write = Video.write

        def waiting(video: Video, *arguments: Any) -> None:
            self._calls += 1
            assert self._calls > 1 or self.allowed.wait(60)
            write(video, *arguments)

        monkeypatch.setattr(Video, "write", waiting)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    """Give the daemon's end of a worker that runs in a thread."""
    monkeypatch.setattr(main, "die_with", lambda parent: None)
    for name in ("signal", "pthread_sigmask"):
        monkeypatch.setattr(main.signal, name, lambda *_: None)
    ours, theirs = multiprocessing.Pipe()
    running = threading.Thread(target=main.main, args=(theirs, os.getppid(), "cpu"))
    running.start()
    yield ours
    ours.close()
    running.join(60)
    assert not running.is_alive()


def told_until(daemon: Connection, kind: type[messages.Message]) -> list[messages.Message]:
    told: list[messages.Message] = []
    while not told or not isinstance(told[-1], kind):
        assert daemon.poll(60), told
        told.append(daemon.recv())
    return told


def test_the_next_job_is_computed_while_the_video_is_written_and_both_are_what_they_are_alone(
    tmp_path: Path, daemon: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = work_in(tmp_path / "alone")
    assert isinstance(run(alone)[0], messages.Finished)
    disk = Slow(monkeypatch)
    first, second = work_in(tmp_path / "first"), work_in(tmp_path / "second")
    daemon.send(first)
    told_until(daemon, messages.Sampled)
    daemon.send(second)
    told = told_until(daemon, messages.StepDone)
    assert not any(isinstance(message, messages.Written) for message in told)
    disk.allowed.set()
    told = [*told_until(daemon, messages.Written), *told_until(daemon, messages.Written)]
    ends = [message for message in told if isinstance(message, messages.Sampled | messages.Written)]
    assert [type(message) for message in ends] == [messages.Written, messages.Sampled, messages.Written]
    assert all(isinstance(end.reply, messages.Finished) for end in ends if isinstance(end, messages.Written))
    assert made(first) == made(second) == made(alone)


def test_a_worker_that_ends_tells_first_what_became_of_the_video_that_it_writes(
    tmp_path: Path, daemon: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Slow(monkeypatch)
    first, second = work_in(tmp_path / "first"), work_in(tmp_path / "second")
    daemon.send(first)
    told_until(daemon, messages.Sampled)
    broken = messages.Again("compiling failed")
    monkeypatch.setattr(main, "answer", lambda *_: broken)
    daemon.send(second)
    disk.allowed.set()
    written, left = told_until(daemon, messages.Again)
    assert isinstance(written, messages.Written)
    assert left == broken


def test_a_video_that_cannot_be_written_is_told_of_and_the_worker_goes_on(
    tmp_path: Path, daemon: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Video, "write", fail)
    first = work_in(tmp_path / "first")
    for _ in range(2):
        daemon.send(replace(first))
        *_, written = told_until(daemon, messages.Written)
        assert isinstance(written, messages.Written)
        assert isinstance(written.reply, messages.Blocked), written


def test_what_exists_of_a_cancelled_job_is_written_before_the_next_job_begins(
    tmp_path: Path, daemon: Connection
) -> None:
    """Its last frames may lie on the device."""
    work = work_in(tmp_path / "first")
    daemon.send(work)
    told_until(daemon, messages.Written)
    daemon.send(replace(work, keep_only=True))
    told = told_until(daemon, messages.Finished)
    assert not any(isinstance(message, messages.Sampled) for message in told)
