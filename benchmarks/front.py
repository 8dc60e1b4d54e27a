"""Measures how many cards one front can carry, with cards that only send what workers say.

The daemon's loop, its supervisors, SQLite, the deliveries and the pipes are real. One other process plays all
cards: none computes or writes a checkpoint, each says every two seconds that a step is done. "Status" also
asks for the status once a second, as the page does. "As fast as it goes": no card waits between two steps.

The last rows are the front's disk: bridges that each write steps of the real size, with the calls that make a
checkpoint durable, one right after the other.

python -m benchmarks.front [FOLDER ON THE DISK TO MEASURE]
"""

import contextlib
import heapq
import itertools
import json
import multiprocessing
import os
import select
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image
from sqlalchemy.orm import Session

from benchmarks import Row
from framepackd import files
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

SMALL = os.environ.get("FRAMEPACKD_BENCHMARK") == "tiny"
CARDS = (4,) if SMALL else (64, 256)
SECONDS = 1.0 if SMALL else 20.0  # of each measurement, once all cards run
STARTING_SECONDS = 120.0  # at most, until they do
PACE = 0.1 if SMALL else 2.0  # seconds a step; the real model takes one to several
QUEUED = 20 if SMALL else 1000  # jobs behind those that run
STATUS_SECONDS = 1.0  # from one question for the status to the next
STEPS = 25  # of a section
WRITERS = (1, 2) if SMALL else (1, 4, 10)
STEP_BYTES = 1 << 20 if SMALL else 14_800_000  # a checkpoint of a step at 640x640, window 9
WRITTEN_SECONDS = 0.2 if SMALL else 10.0
SYNCS = 5 if SMALL else 100
CONFIG = f"""
model = "demo"
settle_seconds = 0
[defaults]
seconds = 4.8
steps = {STEPS}
height = 64
width = 64
"""


@dataclass(frozen=True)
class Asked:
    """What one measurement is of."""

    folder: str  # to work in
    cards: int
    pace: float  # seconds a step; 0: as fast as it goes
    status: bool  # it is asked once a second
    seconds: float = SECONDS
    queued: int = QUEUED


@dataclass
class Found:
    """What one measurement has found; all "a second" are means over it."""

    steps: float = 0.0  # recorded a second
    messages: float = 0.0  # the same, of all kinds
    commits: float = 0.0  # a second
    cpu: float = 0.0  # of one core, as a share
    memory: float = 0.0  # MiB, resident
    delays: tuple[float, float] = (0.0, 0.0)  # seconds from sent to recorded: median, 99 %
    idle: tuple[float, float] = (0.0, 0.0)  # seconds from a job's last message to the next job, the same
    status: float = 0.0  # seconds until the status is answered, median


def quantiles(values: list[float]) -> tuple[float, float]:
    """Give the median and what 99 % are below; 0 of none."""
    if len(values) < 2:
        return (values or [0.0])[0], (values or [0.0])[0]
    return statistics.median(values), statistics.quantiles(values, n=100, method="inclusive")[98]


# the cards, in a process of their own


@dataclass
class Player:
    """Plays all cards: each answers a job with the messages that a worker sends, at their times."""

    asked: Asked
    cards: list[Connection]
    due: list[tuple[float, int, int, Iterator[tuple[float, messages.Message]], messages.Message]] = field(
        default_factory=list
    )
    counter: Iterator[int] = field(default_factory=itertools.count)
    freed: dict[int, float] = field(default_factory=dict)  # by card: since when it waits for a job
    idle: list[float] = field(default_factory=list)

    def play(self) -> None:
        """Play until the daemon has closed all pipes."""
        begun, left = set[int](), dict(enumerate(self.cards))
        numbers = {card: number for number, card in left.items()}
        while left:
            patience = max(self.due[0][0] - time.monotonic(), 0.0) if self.due else None
            for card in wait(list(left.values()), patience):
                assert isinstance(card, Connection)
                number = numbers[card]
                try:
                    work = card.recv()
                except (EOFError, OSError):
                    del left[number]
                    continue
                if not isinstance(work, messages.Work):
                    continue
                if number in self.freed:
                    self.idle.append(time.monotonic() - self.freed.pop(number))
                # The first jobs are resumed, each at another step: so their ends lie apart, as in practice.
                total = work.sections * STEPS
                done = 0 if number in begun else total * number // len(self.cards)
                begun.add(number)
                self.follow(time.monotonic(), number, self.script(work, done))
            self.send_what_is_due(left)

    def script(self, work: messages.Work, done: int) -> Iterator[tuple[float, messages.Message]]:
        """Yield what a worker says of a job, each with the seconds that it takes before."""
        pace = self.asked.pace
        yield 0.0, messages.Ready("cpu", "cpu", "cpu")
        yield 0.0, messages.Resumed(done)
        for number in range(done, work.sections * STEPS):
            section, step = divmod(number, STEPS)
            yield pace, messages.StepDone(section + 1, step + 1, pace)
            if step == STEPS - 1:
                yield pace, messages.SectionDecoded(section + 1, pace)
        yield 0.0, messages.Sampled()
        files.make_folder(work.result)
        (work.result / ".mp4").write_bytes(b"video")
        yield pace / 2, messages.Written(messages.Finished({}, {}, {}, None))

    def follow(self, now: float, number: int, script: Iterator[tuple[float, messages.Message]]) -> None:
        """Note when the next message of a script is due."""
        for seconds, message in script:
            heapq.heappush(self.due, (now + seconds, next(self.counter), number, script, message))
            return

    def send_what_is_due(self, left: dict[int, Connection]) -> None:
        """Send the messages whose time has come, as far as their pipes have room."""
        now, full = time.monotonic(), []
        while self.due and self.due[0][0] <= now:
            at, order, number, script, message = heapq.heappop(self.due)
            if number not in left:
                continue
            room = select.poll()
            room.register(left[number], select.POLLOUT)
            if not room.poll(0):
                full.append((now + 0.001, order, number, script, message))
                continue
            with contextlib.suppress(OSError):  # the daemon has ended
                left[number].send((time.monotonic(), message))
            if isinstance(message, messages.Sampled):
                self.freed[number] = time.monotonic()
            self.follow(at, number, script)
        for each in full:
            heapq.heappush(self.due, each)


def play(asked: Asked, cards: list[Connection], results: Connection) -> None:
    """Play the cards, ask for the status, and send what both have found."""
    player, answers, ended = Player(asked, cards), list[float](), threading.Event()

    def ask() -> None:
        while not ended.wait(STATUS_SECONDS):
            begun = time.monotonic()
            with contextlib.suppress(OSError):
                socket.ask(Path(asked.folder, "state"), {"command": "status"})
                answers.append(time.monotonic() - begun)

    asking = threading.Thread(target=ask, daemon=True)
    if asked.status:
        asking.start()
    player.play()
    ended.set()
    results.send((player.idle, answers))


# the daemon, in a process of its own


class Counted:
    """Counts what is received and recorded; a message is recorded by the first commit after it."""

    def __init__(self) -> None:
        """Count from now on."""
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


COUNTED = Counted()


class CountedConnection(sqlite3.Connection):
    """Counts the commits that change something."""

    changes = 0

    def commit(self) -> None:
        """Commit, and count what is durable then."""
        super().commit()
        if self.total_changes > self.changes:
            self.changes = self.total_changes
            COUNTED.committed()


class Pipe:
    """The daemon's end of a card's pipe, which counts what it receives."""

    def __init__(self, connection: Connection) -> None:
        """Wrap a connection."""
        self.fileno, self.poll, self.close = connection.fileno, connection.poll, connection.close
        self.send, self._recv = connection.send, connection.recv

    def recv(self) -> messages.Message:
        """Receive and count."""
        return COUNTED.receive(*self._recv())


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

    latest = time.monotonic() + STARTING_SECONDS
    while len(daemon.cards.jobs) < asked.cards:
        assert time.monotonic() < latest, f"{len(daemon.cards.jobs)} of {asked.cards} cards run"
        daemon.round()
        daemon.sleep()
    go_round_until(time.monotonic() + 2 * asked.pace)
    COUNTED.__init__()  # type: ignore[misc] # count anew
    begun, cpu = time.monotonic(), time.process_time()
    go_round_until(begun + asked.seconds)
    seconds, cpu = time.monotonic() - begun, time.process_time() - cpu
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Found(
        COUNTED.steps / seconds,
        COUNTED.heard / seconds,
        COUNTED.commits / seconds,
        cpu / seconds,
        pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20),
        quantiles(COUNTED.delays),
    )


# the disk


def written(folder: Path, writers: int) -> tuple[float, float]:
    """Have so many write steps of the real size; gives MB a second of all, and the median seconds a step."""
    taken: list[float] = []
    until = time.monotonic() + WRITTEN_SECONDS
    content = os.urandom(STEP_BYTES)

    def write(number: int) -> None:
        place = folder / f"{writers}-{number}"
        place.mkdir()
        for step in itertools.count():
            begun = time.monotonic()
            if begun > until:
                return
            files.write_bytes(place / f"state-{step:08}", content)
            (place / f"state-{step - 2:08}").unlink(missing_ok=True)
            taken.append(time.monotonic() - begun)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(taken) * STEP_BYTES / 1e6 / (time.monotonic() - begun), statistics.median(taken)


def syncs(folder: Path) -> float:
    """Give the median seconds that it takes to make 4 KiB at the end of a file durable."""
    taken = []
    descriptor = os.open(folder / "synced", os.O_WRONLY | os.O_CREAT)
    try:
        for _ in range(SYNCS):
            begun = time.monotonic()
            os.write(descriptor, b"x" * 4096)
            os.fsync(descriptor)
            taken.append(time.monotonic() - begun)
    finally:
        os.close(descriptor)
    return statistics.median(taken)


# the rows


def apart(where: str | None, cards: int, pace: float, *, status: bool) -> Found:
    """Take one measurement in a process of its own."""
    with tempfile.TemporaryDirectory(dir=where) as folder:
        asked = json.dumps(asdict(Asked(folder, cards, pace, status)))
        command = [sys.executable, "-m", "benchmarks.front", asked]
        # The daemon refuses variables that it does not know.
        own = {name: value for name, value in os.environ.items() if name != "FRAMEPACKD_BENCHMARK"}
        done = subprocess.run(command, stdout=subprocess.PIPE, env=own, check=True)  # noqa: S603 - this module
    return Found(**json.loads(done.stdout))


def rows(where: str | None = None) -> Iterator[Row]:
    """Measure, in a folder or in the one for temporary files; six minutes."""
    for cards in CARDS:
        for status in (False, True):
            found = apart(where, cards, PACE, status=status)
            yield from _paced(f"{cards} cards{', status' if status else ''}", found, cards / PACE)
        fast = apart(where, cards, 0.0, status=False)
        name = f"{cards} cards, as fast as it goes"
        yield Row(f"{name}: messages", fast.messages, None, "a second", "the most that is recorded")
        yield Row(f"{name}: commits", fast.commits, None, "a second", "several messages share one")
        yield Row(f"{name}: daemon's CPU", 100 * fast.cpu, None, "% of a core", "what bounds it")
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Row("fsync of 4 KiB", 1e3 * syncs(Path(folder)), None, "ms", "what a commit waits for")
        for writers in WRITERS:
            rate, seconds = written(Path(folder), writers)
            yield Row(f"steps of 14.8 MB, {writers} writers", rate, None, "MB/s", "10 cards: 74 MB/s")
            yield Row("the same, a step", 1e3 * seconds, None, "ms", "less than a step takes a card")


def _paced(name: str, found: Found, asked: float) -> Iterator[Row]:
    yield Row(f"{name}: steps recorded / asked for", found.steps, asked, "a second", "the loop keeps up")
    for share, seconds in zip(("median", "99 %"), found.delays, strict=True):
        yield Row(f"{name}: sent to recorded, {share}", 1e3 * seconds, None, "ms", "it does not fall behind")
    for share, seconds in zip(("median", "99 %"), found.idle, strict=True):
        yield Row(f"{name}: a card without a job, {share}", 1e3 * seconds, None, "ms", "no card waits long")
    yield Row(f"{name}: commits", found.commits, None, "a second", "what the disk syncs")
    yield Row(f"{name}: daemon's CPU", 100 * found.cpu, None, "% of a core", "what is left of it")
    yield Row(f"{name}: daemon's memory", found.memory, None, "MiB", "it holds no files")
    if found.status:
        yield Row(f"{name}: status answered", 1e3 * found.status, None, "ms", "people wait for it")


def main() -> None:
    """Print all rows, or take the one measurement that is asked for."""
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        sqlite3.connect = _counted
        print(json.dumps(asdict(measure(Asked(**json.loads(sys.argv[1]))))))
        return
    for row in rows(*sys.argv[1:]):
        print(f"{row.name:60} {row.ours:10.2f} {row.unit}   {row.baseline or ''}", flush=True)


def _counted(*arguments: Any, _connect: Any = sqlite3.connect, **named: Any) -> Any:
    return _connect(*arguments, **{"factory": CountedConnection} | named)


if __name__ == "__main__":
    main()
