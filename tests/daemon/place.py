"""A daemon's folders in a test, a power cut at any line, and renames that cross file systems."""

import ctypes
import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from framepackd import files
from framepackd.delivery import deliver as delivery
from framepackd.inbox.scan import Inbox
from framepackd.intake import take as intake
from framepackd.jobs import folder as work_folder
from framepackd.jobs.job import Job, State
from framepackd.jobs.store import JobStore
from framepackd.settings.config import Config, load_config

# What changes files: each call is a point at which the process can die.
CHANGING: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (files, ("rename_new", "copy", "sync_folder")),
    (Path, ("unlink", "rename", "replace", "mkdir", "write_text", "write_bytes")),
    (os, ("write",)),
    (shutil, ("rmtree",)),
)


class Died(Exception):  # noqa: N818 - not an error: the power went
    """Simulates the end of the process at a line."""


def cross(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every rename between two folders fail as between two file systems."""
    rename = files.rename_new

    def refuse(source: Path, target: Path) -> None:
        if source.parent != target.parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target)

    monkeypatch.setattr(files, "rename_new", refuse)


def without_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have renameat2 fail as on network file systems that cannot refuse to replace a file."""

    def unknown(*_: object) -> int:
        ctypes.set_errno(errno.ENOSYS)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=unknown))


@contextmanager
def dying_at(module: Any, name: str, path: Path) -> Iterator[None]:
    """Have the process die where a function is called for a path."""
    call = getattr(module, name)

    def die(first: Path, *others: Any, **named: Any) -> Any:
        if first == path:
            raise Died
        return call(first, *others, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, name, die)
        with pytest.raises(Died):
            yield


def dying(
    call: Callable[..., object], calls: Iterator[int], last: int, error: type[BaseException] = Died
) -> Callable[..., object]:
    """Give a function that raises from the ``last`` of the counted calls on."""

    def wrapped(*arguments: object, **named: object) -> object:
        if next(calls) >= last:
            raise error
        return call(*arguments, **named)

    return wrapped


def at_every_call(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], None], check: Callable[[], None], *, every: int = 1
) -> int:
    """Run repeatedly, each time dying at a later call that changes files; gives how many runs it took."""
    for number in range(1, 500, every):
        with monkeypatch.context() as patched:
            calls = itertools.count(1)
            for owner, names in CHANGING:
                for name in names:
                    patched.setattr(owner, name, dying(getattr(owner, name), calls, number))
            try:
                run()
                died = False
            except Died:
                died = True
        check()
        if not died:
            return number
    raise AssertionError("never came to an end")


def undelivered(store: JobStore) -> list[Job]:
    """Give the jobs whose end is decided and whose files are still to be moved."""
    return [store.get(job_id) for job_id in store.to_deliver()]


class Place:
    """Folders, a store and one job's files."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        (root / "config.toml").write_text('state_dir = "state"\nmodel = "demo"\nsettle_seconds = 0\n')
        self.config: Config = load_config(root / "config.toml")
        for folder in (*self.config.folders.values(), self.config.jobs_dir):
            folder.mkdir(parents=True, exist_ok=True)
        self.store = JobStore(self.config.database)

    def drop(self, folder: str = "") -> None:
        (self.config.inbox / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(self.config.inbox / folder / "cat.png")
        (self.config.inbox / folder / "cat.txt").write_text("pan left")

    def take(self) -> Job:
        for group in Inbox(self.config.inbox, 0).scan().ready:
            intake.take(group, self.config, self.store)
        return self.store.in_state(State.QUEUED, State.FAILED)[-1]

    def generate(self) -> Job:
        job = self.store.claim()
        assert job is not None
        result = self.config.jobs_dir / job.id / work_folder.RESULT
        result.mkdir()
        (result / ".mp4").write_text("video")
        (result / ".section-0.png").write_text("still")
        self.store.decide(job.id, State.DONE)
        return self.store.get(job.id)

    def make_ready(self) -> None:
        """Bring a job to where only its delivery is left."""
        self.drop()
        self.take()
        self.generate()

    def deliver(self) -> None:
        for job in undelivered(self.store):
            delivery.deliver(job, self.config, self.store)

    def outbox(self) -> list[str]:
        return sorted(path.name for path in self.config.outbox.iterdir())


DELIVERED = ["cat.json", "cat.mp4", "cat.png", "cat.section-0.png", "cat.txt"]
