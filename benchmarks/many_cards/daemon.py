"""Runs a daemon with played cards and measures it: ``python -m benchmarks.many_cards.daemon ASKED``.

ASKED is an :class:`~benchmarks.many_cards.Asked` as JSON; what is found is printed as JSON.
"""

import json
import multiprocessing
import os
import sqlite3
import sys
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image
from sqlalchemy.orm import Session

from benchmarks.many_cards import STEPS, Asked, Found, quantiles
from benchmarks.many_cards.cards import play
from framepackd.control import socket
from framepackd.daemon import Daemon
from framepackd.inbox.scan import Inbox
from framepackd.intake.take import take
from framepackd.jobs.database import open_database
from framepackd.jobs.folder import INPUTS
from framepackd.jobs.job import Job
from framepackd.jobs.store import JobStore
from framepackd.settings.config import Config, load_config
from framepackd.supervisor import process
from framepackd.worker import messages

STARTING_SECONDS = 120.0  # at most, until all cards run
CONFIG = f"""
model = "demo"
settle_seconds = 0
[defaults]
seconds = 4.8
steps = {STEPS}
height = 64
width = 64
"""


class Counted:
    """Counts what is received and recorded; a message is recorded by the first commit after it."""

    def __init__(self) -> None:
        """Begin."""
        self.begin()

    def begin(self) -> None:
        """Count from now on, at zero."""
        self.steps = self.heard = self.commits = 0
        self.delays: list[float] = []
        self.unrecorded: list[float] = []  # when they were sent

    def receive(self, sent: float, message: messages.Message) -> messages.Message:
        """Count a message."""
        self.heard += 1
        self.steps += isinstance(message, messages.StepDone)
        self.unrecorded.append(sent)
        return message

    def committed(self) -> None:
        """Count a commit, and the messages that it records."""
        self.commits += 1
        sent, self.unrecorded = self.unrecorded, []
        now = time.monotonic()
        self.delays += [now - each for each in sent]


counted = Counted()


class CountedConnection(sqlite3.Connection):
    """Counts the commits that change something."""

    changes = 0

    def commit(self) -> None:
        """Commit, and count what is durable then."""
        super().commit()
        if self.total_changes > self.changes:
            self.changes = self.total_changes
            counted.committed()


class Pipe:
    """The daemon's end of a card's pipe, which counts what it receives."""

    def __init__(self, connection: Connection) -> None:
        """Wrap a connection."""
        self.fileno, self.poll, self.close = connection.fileno, connection.poll, connection.close
        self.send, self._recv = connection.send, connection.recv

    def recv(self) -> messages.Message:
        """Receive and count."""
        return counted.receive(*self._recv())


def set_up(asked: Asked) -> tuple[Config, JobStore]:
    """Make a daemon's folders, with jobs in the queue: one is taken in, the others are its copies."""
    root = Path(asked.folder)
    (root / "config.toml").write_text(f'state_dir = "{root}/state"\n{CONFIG}')
    config = load_config(root / "config.toml")
    gpu = config.gpu.model_copy(update={"device": ("cpu",) * asked.cards})
    config = config.model_copy(update={"gpu": gpu})
    for folder in (*config.folders.values(), config.jobs_dir):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64)).save(config.inbox / "cat.png")
    (config.inbox / "cat.txt").write_text("pan left")
    store = JobStore(config.database)
    (group,) = Inbox(config.inbox, 0).scan().ready
    (made,) = take(group, config, store)
    values = {column.name: getattr(made, column.name) for column in Job.__table__.columns}
    with Session(open_database(config.database)) as session, session.begin():
        for number in range(asked.cards + asked.queued):
            job_id = f"{made.id[:-6]}{number:06x}"
            own = {"seq": None, "id": job_id, "position": 2 + number, "folder": f"{number}"}
            session.add(Job(**values | own))
            folder = config.jobs_dir / job_id / INPUTS
            folder.mkdir(parents=True)
            for file in (config.jobs_dir / made.id / INPUTS).iterdir():
                (folder / file.name).hardlink_to(file)
    return config, store


def measure(asked: Asked) -> Found:
    """Run a daemon with played cards in this process, and measure it once all cards have begun."""
    config, store = set_up(asked)
    spawn = multiprocessing.get_context("spawn")
    pairs = [spawn.Pipe() for _ in range(asked.cards)]
    results, theirs = spawn.Pipe()
    player = spawn.Process(target=play, args=(asked, [pair[1] for pair in pairs], theirs), daemon=True)
    player.start()
    for pair in pairs:
        pair[1].close()
    results.recv()
    unused = iter(pairs)

    def start(device: str) -> process.Handle:
        running: Any = SimpleNamespace(
            is_alive=lambda: True, join=lambda *_: None, kill=lambda: None, sentinel=os.eventfd(0)
        )
        pipe: Any = Pipe(next(unused)[0])
        return process.Handle(running, pipe)

    process.start = start
    daemon = Daemon(config, store, load_again=lambda: config)
    with socket.serve(config.state_dir, daemon.answer):
        found = measured(daemon, asked)
    daemon.scanning.end()
    for pair in pairs:
        pair[0].close()
    idle, answers = results.recv()
    player.join()
    store.close()
    found.idle, found.status = quantiles(idle), quantiles(answers)[0]
    return found


def measured(daemon: Daemon, asked: Asked) -> Found:
    """Have the loop run until all cards do, and then measure it.

    Raises:
        AssertionError: they do not all begin.
    """

    def go_round_until(last: float) -> None:
        while time.monotonic() < last:
            daemon.round()
            daemon.sleep()

    latest, begun_jobs = time.monotonic() + STARTING_SECONDS, set[str]()
    while len(begun_jobs) < asked.cards:  # in this order: a fast card ends its job before others begin
        assert time.monotonic() < latest, f"{len(begun_jobs)} of {asked.cards} cards run"
        daemon.round()
        begun_jobs.update(daemon.cards.running)
        daemon.sleep()
    go_round_until(time.monotonic() + 2 * asked.pace)
    counted.begin()
    begun, cpu = time.monotonic(), time.process_time()
    go_round_until(begun + asked.seconds)
    seconds, cpu = time.monotonic() - begun, time.process_time() - cpu
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Found(
        counted.steps / seconds,
        counted.heard / seconds,
        counted.commits / seconds,
        cpu / seconds,
        pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20),
        quantiles(counted.delays),
    )


def _connect(*arguments: Any, _connect: Any = sqlite3.connect, **named: Any) -> Any:
    return _connect(*arguments, **{"factory": CountedConnection} | named)


if __name__ == "__main__":
    sqlite3.connect = _connect
    print(json.dumps(asdict(measure(Asked(**json.loads(sys.argv[1]))))))
