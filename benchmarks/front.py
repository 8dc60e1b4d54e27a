"""Measures how many cards one front can carry, with cards that only send what workers say.

The daemon is real, the cards are played (many_cards): each says every two seconds that a step is done.
"Status" also asks for the status once a second, as the page does. "As fast as it goes": no card waits between
two steps.

The last rows are the front's disk: bridges that each write steps of the real size, with the calls that make a
checkpoint durable, one right after the other.

python -m benchmarks.front [FOLDER ON THE DISK TO MEASURE]
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks import Row
from benchmarks.many_cards import STEPS, Asked, Found
from framepackd import files

SMALL = os.environ.get("FRAMEPACKD_BENCHMARK") == "tiny"
CARDS = (4,) if SMALL else (64, 256)
SECONDS = 1.0 if SMALL else 20.0  # of each measurement, once all cards run
PACE = 0.1 if SMALL else 2.0  # seconds a step; the real model takes one to several
QUEUED = 200 if SMALL else 1000  # jobs behind those that run
WRITERS = (1, 2) if SMALL else (1, 4, 10)
STEP_BYTES = 1 << 20 if SMALL else 14_800_000  # a checkpoint of a step at 640x640, window 9
WRITTEN_SECONDS = 0.2 if SMALL else 10.0
SYNCS = 5 if SMALL else 100


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


def apart(where: str | None, cards: int, pace: float, *, status: bool) -> Found:
    """Take one measurement in a process of its own."""
    with tempfile.TemporaryDirectory(dir=where) as folder:
        asked = json.dumps(asdict(Asked(folder, cards, pace, status, SECONDS, QUEUED)))
        command = [sys.executable, "-m", "benchmarks.many_cards.daemon", asked]
        # The daemon refuses variables that it does not know.
        own = {name: value for name, value in os.environ.items() if name != "FRAMEPACKD_BENCHMARK"}
        done = subprocess.run(command, stdout=subprocess.PIPE, env=own, check=True)  # noqa: S603 - this package
    return Found(**json.loads(done.stdout))


def rows(where: str | None = None) -> Iterator[Row]:
    """Measure, in a folder or in the one for temporary files; six minutes."""
    for cards in CARDS:
        steps = cards / PACE * STEPS / (STEPS + 1)  # one more pause follows each section
        for status in (False, True):
            found = apart(where, cards, PACE, status=status)
            yield from _paced(f"{cards} cards{', status' if status else ''}", found, steps)
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


if __name__ == "__main__":
    for row in rows(*sys.argv[1:]):
        print(f"{row.name:60} {row.ours:10.2f} {row.unit}   {row.baseline or ''}", flush=True)
