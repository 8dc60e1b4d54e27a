"""A queue whose jobs end as a test says."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from framepackd.jobs.job import Job, State, utc_now
from framepackd.jobs.store import JobStore


class Queue:
    """A job store, and jobs that come to their end in it."""

    def __init__(self, state_dir: Path) -> None:
        state_dir.mkdir()
        self.store = JobStore(state_dir / "framepackd.db")

    def add(self, name: str) -> str:
        self.store.add(Job(id=f"id-{name}", name=name, state=State.QUEUED, created_at=utc_now()))
        return f"id-{name}"

    def end(self, name: str, state: State = State.DONE, **values: Any) -> None:
        self.store.claim()
        self.store.finish(f"id-{name}", state, **({"error": None, "output": f"/out/{name}.mp4"} | values))


def until(true: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)
