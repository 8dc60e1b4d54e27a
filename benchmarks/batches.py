"""Measures what a file, a job and a round cost the daemon in large batches, against a small batch.

Real folders, a real database and the real loop, paused, so that no worker is needed. Processor time is
measured: it does not depend on other load, and an fsync takes none, so the folders may lie in memory.

python -m benchmarks.batches [FOLDER]
"""

import contextlib
import itertools
import json
import logging
import os
import socket
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from hashlib import sha256
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import Row
from framepackd import daemon
from framepackd.control import client, commands
from framepackd.control import socket as control
from framepackd.control.status import in_one_line
from framepackd.daemon import Daemon
from framepackd.delivery.results_page import ResultsPage
from framepackd.inbox.scan import Inbox
from framepackd.jobs import lock as control_lock
from framepackd.jobs.job import Job, State, utc_now
from framepackd.jobs.store import JobStore
from framepackd.reports import prometheus
from framepackd.settings.config import Config, load_config

MEMORY = "/dev/shm"  # noqa: S108 - what is made there has a name of its own
PAIRS, FEW_PAIRS = 10_000, 300
CAPTIONS, FEW_CAPTIONS, KNOWN = 20_000, 2_000, 5_000
FOLDERS, FEW_FOLDERS = 2_000, 200
ASKED, FEW_ASKED = 3_000, 300
ENDED, FEW_ENDED = 100_000, 1_000
STUCK, FEW_STUCK = 1_000, 100
RESULTS, FEW_RESULTS = 10_000, 1_000


class Place:
    """The folders of a daemon, with a database in which nothing runs."""

    def __init__(self, root: Path) -> None:
        """Make them."""
        root.mkdir()
        (root / "config.toml").write_text(f'state_dir = "{root}"\nmodel = "demo"\nsettle_seconds = 0\n')
        self.config: Config = load_config(root / "config.toml")
        for folder in (self.config.inbox, self.config.outbox, self.config.failed, self.config.jobs_dir):
            folder.mkdir(parents=True)
        self.store = JobStore(self.config.database)
        self.store.pause()

    def fill(self, count: int, state: State, name: str = "known", **columns: Any) -> None:
        """Record jobs that are all alike."""
        seed = Job(id="20260101-000000-000000", name=name, folder="", state=state, created_at=utc_now())
        seed.inputs = {
            role: {"file": f"{name}{rest}", "sha256": sha256(b"x").hexdigest()}
            for role, rest in {"image": ".png", "text": ".txt"}.items()
        }
        seed.settings = dict.fromkeys(map("setting_{}".format, range(30)), 1.0) | {"model": "demo", "seed": 1}
        seed.settings |= {"prompt": "a lake at night " * 8}
        seed.finished_at = utc_now() if state not in (State.QUEUED, State.RUNNING) else None
        for column, value in columns.items():
            setattr(seed, column, value)
        self.store.add(seed)
        others = [column.name for column in Job.__table__.columns if column.name not in COUNTED]
        with closing(sqlite3.connect(self.config.database)) as connection, connection:
            connection.execute(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "  # noqa: S608 - columns of our own
                f"INSERT INTO job (id, name, position, inputs, {', '.join(others)}) "
                f"SELECT printf('20260101-%06d-%06x', i, i), printf('%s-%05d', name, i), position + i, "
                f"replace(inputs, '{name}.', printf('{name}-%05d.', i)), "
                f"{', '.join(others)} FROM n, job WHERE name = ?",
                (count - 1, name),
            )

    def daemon(self) -> Daemon:
        """Give a daemon that has scanned its inbox."""
        made = Daemon(self.config, self.store, load_again=lambda: self.config)
        made.paused = self.store.paused()
        for _ in range(3):
            go_round(made)
        return made


COUNTED = ("seq", "id", "name", "position", "inputs")


def go_round(made: Daemon) -> None:
    """Go round once, after what was begun in threads is over."""
    made.round()
    while made.deliveries.busy or made.scanning.busy:
        made.round()


def cpu(task: Callable[[], object], repeated: int = 1) -> float:
    """Give the seconds of all processors that a task takes this process, each time."""
    begun = time.process_time()
    for _ in range(repeated):
        task()
    return (time.process_time() - begun) / repeated


def intake(root: Path, pairs: int) -> float:
    """Take in pairs that were dropped at once: milliseconds a job, with all rounds of the loop."""
    place = Place(root)
    Image.new("RGB", (32, 32)).save(root / "picture.png")
    picture = (root / "picture.png").read_bytes()
    for number in range(pairs):
        (place.config.inbox / f"{number:05}.png").write_bytes(picture)
        (place.config.inbox / f"{number:05}.txt").write_text(f"a lake, {number}")
    taken = cpu(lambda: daemon.run(place.config, once=True))
    assert place.store.counts()[State.QUEUED] == pairs
    return 1e3 * taken / pairs


def _with_captions(root: Path, files: int) -> Place:
    """Drop texts without pictures, of names that jobs had."""
    place = Place(root)
    place.fill(KNOWN, State.DONE)
    for number in range(files):
        (place.config.inbox / f"known-{number:05}.txt").write_text("a lake")
    return place


def captions(root: Path, files: int) -> float:
    """Look for the first time at texts without pictures, of names that jobs had: milliseconds a file."""
    place = _with_captions(root, files)
    with fed() as times:
        made = Daemon(place.config, place.store, load_again=lambda: place.config)
        made.paused = place.store.paused()
        taken = cpu(lambda: go_round(made))
    assert len(made.scanning.looked.waiting) == files
    longest.append(max(after - before for before, after in itertools.pairwise(times)))
    return 1e3 * taken / files


def status_alone(root: Path, files: int) -> float:
    """Say how these stand without a daemon: milliseconds a file."""
    place = _with_captions(root, files)
    answers: list[Any] = []
    taken = cpu(lambda: answers.append(client.report(place.config)))
    assert len(answers[0][0]["waiting"]) == files
    return 1e3 * taken / files


longest: list[float] = []  # seconds without a sign of life for systemd
lines_of: list[int] = []  # that the log got of deliveries that could not be made


@contextlib.contextmanager
def fed() -> Iterator[list[float]]:
    """Listen as systemd does: gives when the daemon said that it lives."""
    times = [time.monotonic()]
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"{folder}/notify")
        os.environ |= {"NOTIFY_SOCKET": f"{folder}/notify", "WATCHDOG_USEC": "2000000"}

        def listen() -> None:
            while (said := systemd.recv(4096)) != b"end":
                if b"WATCHDOG=1" in said:
                    times.append(time.monotonic())

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield times
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
                end.sendto(b"end", f"{folder}/notify")
            thread.join()
            times.append(time.monotonic())
            del os.environ["NOTIFY_SOCKET"], os.environ["WATCHDOG_USEC"]


def defaults(root: Path, folders: int) -> float:
    """Look at folders with a job and a ``_defaults.toml`` each, for the first time: milliseconds a folder."""
    place = Place(root)
    for number in range(folders):
        folder = place.config.inbox / f"{number:05}"
        folder.mkdir()
        for name, text in {"_defaults.toml": "steps = 5", "cat.png": "x", "cat.txt": "a lake"}.items():
            (folder / name).write_text(text)
    inbox = Inbox(place.config.inbox, 0)
    taken = cpu(inbox.scan)
    assert len(inbox.scan().ready) == folders
    return 1e3 * taken / folders


def cancel(root: Path, jobs: int) -> float:
    """Cancel jobs in one call: milliseconds a job."""
    return asked(root, jobs, "cancel")


def retry(root: Path, jobs: int) -> float:
    """Try jobs again in one call: milliseconds a job."""
    return asked(root, jobs, "retry")


def top(root: Path, jobs: int) -> float:
    """Have jobs run next in one call: milliseconds a job."""
    return asked(root, jobs, "top")


def asked(root: Path, jobs: int, command: str) -> float:
    """Have the loop do a command."""
    place = Place(root)
    place.fill(jobs, State.QUEUED, "asked")
    for job in place.store.in_state(State.QUEUED):
        inputs = place.config.jobs_dir / job.id / "inputs"
        inputs.mkdir(parents=True)
        for entry in job.inputs.values():
            (inputs / entry["file"]).write_text("x")
    wanted = list(place.store.states())
    if command == "retry":
        commands.perform({"command": "cancel", "jobs": wanted}, commands.Queue(place.config, place.store))
    made = place.daemon()
    answers: list[Any] = []

    def ask() -> None:
        for results in client.change(place.config, {"command": command, "jobs": wanted}):
            answers.extend(results)
        made.wake()

    lock = control_lock.Lock(place.config.state_dir)
    with control.serve(place.config.state_dir, made.answer):
        asking = threading.Thread(target=ask)
        begun = time.process_time()
        asking.start()
        while asking.is_alive():
            made.sleep()
            made.round()
        taken = time.process_time() - begun
    lock.release()
    assert len(answers) == jobs
    assert all(answer["done"] for answer in answers), answers[0]
    return 1e3 * taken / jobs


def one_round(root: Path, jobs: int) -> float:
    """Go round with so many ended jobs: milliseconds."""
    place = Place(root)
    place.fill(jobs, State.DONE)
    made = place.daemon()
    return 1e3 * cpu(made.round, 20)


def one_report(root: Path, jobs: int) -> float:
    """Say how things stand, as systemd is told every second and status is answered: milliseconds."""
    place = Place(root)
    place.fill(jobs, State.DONE)
    made = place.daemon()
    return 1e3 * cpu(lambda: in_one_line(made.snapshot(), datetime.now(UTC)), 5)


def queued_report(root: Path, jobs: int) -> float:
    """Say how a long queue stands: milliseconds a job."""
    place = Place(root)
    place.fill(jobs, State.QUEUED, inputs={})
    made = place.daemon()
    return 1e3 * cpu(lambda: in_one_line(made.snapshot(), datetime.now(UTC)), 3) / jobs


def figures(root: Path, jobs: int) -> float:
    """Sum up all jobs for Prometheus, every 15 s: milliseconds."""
    place = Place(root)
    place.fill(jobs, State.DONE, timings={"sampling": 60.0, "decoding": 5.0})
    return 1e3 * cpu(lambda: list(prometheus.totals(place.store)), 3)


def stuck(root: Path, jobs: int) -> float:
    """Try deliveries that cannot be made, all once: milliseconds a job."""
    place = Place(root)
    place.fill(jobs, State.RUNNING, "stuck", delivery={"state": State.DONE, "error": None})
    listener = BufferingHandler(10 * jobs)
    logging.getLogger("framepackd").addHandler(listener)
    made = Daemon(place.config, place.store, load_again=lambda: place.config)

    def all_once() -> None:
        go_round(made)
        while made.deliveries.due == 0.0:
            go_round(made)

    taken = cpu(all_once)
    logging.getLogger("framepackd").removeHandler(listener)
    lines_of.append(len([line for line in listener.buffer if line.levelno >= logging.WARNING]))
    return 1e3 * taken / jobs


def resume(root: Path, jobs: int) -> float:
    """Answer ``resume`` while such deliveries are tried: seconds on the clock."""
    place = Place(root)
    place.fill(jobs, State.RUNNING, "stuck", delivery={"state": State.DONE, "error": None})
    made = place.daemon()
    made.deliveries.retry_now()
    took: list[float] = []

    def ask() -> None:
        time.sleep(0.1)  # while the loop is at it
        begun = time.monotonic()
        made.answer({"command": "resume"})
        took.append(time.monotonic() - begun)

    asking = threading.Thread(target=ask)
    asking.start()
    while asking.is_alive():
        made.round()
    return took[0]


def results(root: Path, count: int) -> float:
    """Write the results page for the first time: milliseconds a result."""
    place, page = Place(root), ResultsPage()
    make_results(place, 0, count)
    return 1e3 * cpu(lambda: page.update(place.config.outbox, place.config.failed)) / count


def results_again(root: Path, count: int) -> float:
    """Write the results page after one result more: milliseconds a result."""
    place, page = Place(root), ResultsPage()
    make_results(place, 0, count)
    page.update(place.config.outbox, place.config.failed)
    make_results(place, count, count + 1)
    return 1e3 * cpu(lambda: page.update(place.config.outbox, place.config.failed)) / count


def make_results(place: Place, first: int, end: int) -> None:
    """Have results in the outbox."""
    for number in range(first, end):
        minutes, seconds = divmod(number, 60)
        record: dict[str, object] = {
            **{"id": f"20260101-000000-{number:06x}", "name": f"{number:05}", "prompt": "a lake"},
            **{"width": 640, "height": 608, "frames": 145, "fps": 30, "seed": number, "steps": 25},
            "finished_at": f"2026-01-01T{minutes // 60:02}:{minutes % 60:02}:{seconds:02}Z",
            "inputs": {"image": {"file": f"{number:05}.png", "sha256": "0" * 64}},
        }
        (place.config.outbox / f"{number:05}.json").write_text(json.dumps(record))
        for suffix in (".png", ".txt", ".mp4"):
            (place.config.outbox / f"{number:05}{suffix}").write_text("x")


def rows(where: str | None = None) -> Iterator[Row]:
    """Measure, in a folder or in memory."""
    logging.getLogger("framepackd").setLevel(logging.ERROR)  # else a line for each job
    with tempfile.TemporaryDirectory(dir=where or MEMORY) as folder:
        places = (Path(folder) / str(number) for number in itertools.count())

        def row(measure: Callable[[Path, int], float], many: int, few: int, unit: str, proves: str) -> Row:
            name = f"{(measure.__doc__ or '').partition(':')[0]}: {many} against {few}"
            return Row(name, measure(next(places), many), measure(next(places), few), unit, proves)

        yield row(intake, PAIRS, FEW_PAIRS, "ms a job", "no scan for each handful of jobs (bar: 1.5)")
        yield row(captions, CAPTIONS, FEW_CAPTIONS, "ms a file", "jobs are asked for at once (bar: 1 ms)")
        silence = max(longest)
        yield Row(
            "the longest silence meanwhile", silence, 45.0, "s", "the loop goes round: systemd waits 45 s"
        )
        yield row(status_alone, CAPTIONS, FEW_CAPTIONS, "ms a file", "the same without a daemon (bar: 1 ms)")
        yield row(defaults, FOLDERS, FEW_FOLDERS, "ms a folder", "linear")
        for command in (cancel, retry, top):
            yield row(command, ASKED, FEW_ASKED, "ms a job", "ends, and is linear")
        yield row(one_round, ENDED, FEW_ENDED, "ms", "indexes (bar: 5 ms)")
        yield row(one_report, ENDED, FEW_ENDED, "ms", "indexes")
        yield row(queued_report, PAIRS, FEW_PAIRS, "ms a job", "linear")
        yield row(figures, ENDED, FEW_ENDED, "ms", "reads all, every 15 s")
        yield row(stuck, STUCK, FEW_STUCK, "ms a job", "linear")
        yield Row("lines in the log meanwhile", lines_of[0], STUCK, "lines", "one a reason, not one a job")
        yield row(resume, STUCK, FEW_STUCK, "s", "others are heard between (bar: 1 s)")
        yield row(results, RESULTS, FEW_RESULTS, "ms a result", "linear")
        yield row(results_again, RESULTS, FEW_RESULTS, "ms a result", "linear, and no record is read twice")


if __name__ == "__main__":
    for measured in rows(*sys.argv[1:]):
        print(f"{measured.name:90} {measured.ours:9.3g} {measured.baseline:9.3g} {measured.unit}")
