"""A daemon driven round by round, with a worker that says what the test wants."""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from framepackd.control import socket
from framepackd.daemon import Daemon
from framepackd.delivery import deliveries
from framepackd.intake import scanning
from framepackd.settings.cluster import ClusterConfig
from framepackd.supervisor import process as worker_process
from framepackd.supervisor import supervisor
from framepackd.supervisor.starter import Starter
from framepackd.supervisor.supervisor import Supervisor
from framepackd.worker import messages as worker_messages
from tests.daemon.place import Place

MADE: list["Loop"] = []  # by the running test
PATIENCES = ("PATIENCE_SECONDS", "HURRY_SECONDS")


class Loop:
    """A daemon on a place of its own, whose worker is the other end of a pipe."""

    def __init__(
        self,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        once: bool = False,
        devices: tuple[str, ...] | None = None,
        move_after: timedelta | None = None,
        cluster: ClusterConfig | None = None,
    ) -> None:
        self.place = Place(root)
        if devices is not None:
            gpu = self.place.config.gpu.model_copy(update={"device": devices, "move_after": move_after})
            self.place.config = self.place.config.model_copy(update={"gpu": gpu})
        if cluster is not None:
            self.place.config = self.place.config.model_copy(update={"cluster": cluster})
        self.others: list[Connection] = []  # of the devices after the first: their workers' ends
        self.ours, self.worker = multiprocessing.Pipe()
        self.alive = os.eventfd(0)  # never to be heard of
        self.started = 0
        monkeypatch.setattr(worker_process, "start", self._start)
        for module in (scanning, deliveries):  # what runs in threads ends within a round
            for patience in PATIENCES:
                monkeypatch.setattr(module, patience, 60.0)
        monkeypatch.setattr(supervisor, "LISTEN_SECONDS", 60.0)  # all that was sent is heard in one round
        config = self.place.config
        self.daemon = Daemon(config, self.place.store, once=once, load_again=lambda: config)
        MADE.append(self)

    def end(self) -> None:
        """End what it watches with, and close its database."""
        self.daemon.scanning.end()
        self.place.store.close()

    @property
    def starter(self) -> Starter:
        return self.daemon.cards.starters[0]

    @property
    def supervisor(self) -> Supervisor:
        return self.daemon.cards.each[0]

    def _start(self, device: str) -> worker_process.Handle:
        self.started += 1
        ours = self.ours
        if self.supervisor.worker is not None or device != self.supervisor.asked:
            ours, worker = multiprocessing.Pipe()
            self.others.append(worker)
        process: Any = SimpleNamespace(
            is_alive=lambda: True, join=lambda *_: None, kill=lambda: None, sentinel=self.alive
        )
        return worker_process.Handle(process, ours)

    def answer_and_leave(self, answer: worker_messages.Message) -> None:
        """Have the worker say how its job ends and end itself; the next one has another connection."""
        self.worker.send(answer)
        theirs, (self.ours, self.worker) = self.worker, multiprocessing.Pipe()
        self.round()
        theirs.close()

    def round(self) -> None:
        """Go round as if all that waits for its time were due."""
        self.daemon.retry_now()
        self.daemon.deliveries.retry_now()
        self.daemon.round()

    def start_job(self) -> None:
        self.place.drop()
        self.round()
        assert isinstance(self.worker.recv(), worker_messages.Work)

    def paused(self) -> str | None:
        return self.daemon.why_paused

    def counts(self) -> dict[str, int]:
        return {state: count for state, count in self.place.store.counts().items() if count}


def messages(loop: Loop) -> Iterator[object]:
    while loop.worker.poll():
        yield loop.worker.recv()


def ask_in_thread(loop: Loop, request: dict[str, Any]) -> Any:
    """Ask as another process does, and give the answer when the loop has gone round."""
    answers: list[Any] = []

    def ask() -> None:
        with socket.serve(loop.place.config.state_dir, loop.daemon.answer):
            answers.append(socket.ask(loop.place.config.state_dir, request))

    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 10
    while loop.daemon.requests.empty() and time.monotonic() < deadline:
        time.sleep(0.005)

    def answer() -> Any:
        thread.join(10)
        return answers[0]

    return answer


def started(loop: Loop) -> list[str]:
    """Name the folders of the jobs that were started since."""
    return got(loop, loop.worker)


def got(loop: Loop, worker: Connection) -> list[str]:
    """Name the folders of the jobs that a worker got since."""
    found = []
    while worker.poll():
        message = worker.recv()
        if isinstance(message, worker_messages.Work):
            found.append(loop.place.store.get(message.job_id).folder)
    return found
