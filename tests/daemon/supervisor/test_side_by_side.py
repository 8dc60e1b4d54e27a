"""Devices that each take a fixed time for a job: so many of them are done with a queue so much sooner."""

import multiprocessing
import os
import statistics
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from framepackd.delivery import deliveries
from framepackd.intake import scanning
from framepackd.supervisor import process as worker_process
from framepackd.worker.messages import Finished, Ready, Sampled, SectionDecoded, StepDone, Work, Written
from tests.crash.harness import stretched
from tests.daemon.loop import PATIENCES, Loop

JOBS, SECONDS = 8, 2.0  # of each job


class FixedTime:
    """Workers that do nothing for a fixed time, each in a thread."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended: list[float] = []
        self.idle: list[float] = []  # between two jobs of a worker

    def start(self, _: str) -> worker_process.Handle:
        ours, theirs = multiprocessing.Pipe()
        threading.Thread(target=self._work, args=(theirs,), daemon=True).start()
        alive = os.eventfd(0)  # never to be heard of
        process: Any = SimpleNamespace(
            is_alive=lambda: True, join=lambda *_: None, kill=lambda: None, sentinel=alive
        )
        return worker_process.Handle(process, ours)

    def _work(self, connection: Connection) -> None:
        last: float | None = None
        while True:
            try:
                work = connection.recv()
            except (EOFError, OSError):
                return
            if not isinstance(work, Work):
                continue
            began = time.monotonic()
            self.begun.append(began)
            if last is not None:
                self.idle.append(began - last)
            connection.send(Ready("cpu", "cpu", "cpu"))
            for step in range(1, 4):
                connection.send(StepDone(1, step, 0.1))
            time.sleep(SECONDS - (time.monotonic() - began))
            connection.send(SectionDecoded(1, 0.1))
            last = time.monotonic()
            self.ended.append(last)
            connection.send(Sampled())
            work.result.mkdir(parents=True, exist_ok=True)
            (work.result / ".mp4").write_bytes(b"video")
            connection.send(Written(Finished({}, {}, {}, None)))


@pytest.mark.long
@pytest.mark.parametrize("devices", [2, 4])
def test_so_many_devices_are_done_with_the_queue_so_much_sooner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int
) -> None:
    workers = FixedTime()
    own = [(module, name, getattr(module, name)) for module in (deliveries, scanning) for name in PATIENCES]
    loop = Loop(tmp_path / "place", monkeypatch, devices=("cpu",) * devices)
    for module, name, seconds in own:  # no round waits for a disk as the loop of other tests does
        monkeypatch.setattr(module, name, seconds)
    monkeypatch.setattr(worker_process, "start", workers.start)
    for number in range(JOBS):
        loop.place.drop(str(number))
        loop.place.take()
    deadline = time.monotonic() + stretched(JOBS * SECONDS + 10)
    while len(workers.ended) < JOBS or loop.daemon.cards.busy:
        loop.daemon.round()
        loop.daemon.sleep()
        assert time.monotonic() < deadline
    wall = max(workers.ended) - min(workers.begun)
    between = ", ".join(f"{1000 * idle:.0f}" for idle in workers.idle)
    print(f"\n{devices} devices: {wall:.2f} s of {JOBS * SECONDS:.0f}; from job to job {between} ms")
    assert wall <= stretched(1.1 * JOBS * SECONDS / devices)
    assert len(workers.idle) == JOBS - devices
    assert statistics.median(workers.idle) <= stretched(0.05)
