"""Kills a daemon again and again over a mixed queue, and compares with what an undisturbed one makes."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.acceptance.conftest import environment
from tests.crash.disk import Disk
from tests.crash.jobs import Folders, Outcome, drop, examine, expected_of, seen_too_early, unfinished
from tests.crash.victim import GOINGDOWN_LOGFLUSH, GOINGDOWN_NOLOGFLUSH, Plan, Victim

REPOSITORY = Path(__file__).parents[2]
LIFE_SECONDS = 180.0  # in which the mixed queue is done many times over
JOB_SECONDS = 5.0  # in which a job of a batch is
UNDISTURBED = Plan()
# Points of workers alone.
IN_WORKERS = ("checkpoint:", "preview:", "decode:generation.", "decode:video.", "encode:video.")


def stretched(seconds: float) -> float:
    """Give the time that a machine needs for what takes so long where nothing else runs."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def life_seconds(folders: Folders) -> float:
    """Give the time in which a queue is done at the latest."""
    return LIFE_SECONDS + JOB_SECONDS * len(folders.jobs)


class Life:
    """One daemon from its start to its end, in a process group of its own."""

    def __init__(self, folders: Folders, plan: Plan = UNDISTURBED, *, once: bool = True) -> None:
        self._longest = life_seconds(folders)
        self._control = folders.own / "control"
        self._control.mkdir(exist_ok=True)
        plan.write(self._control)
        self.log = folders.own / "daemon.log"
        command = [sys.executable, "-m", "tests.crash.victim", "run", "--config", str(folders.config)]
        own = {"CRASH_CONTROL": str(self._control)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--once"] if once else command,
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
                # One thread: two wait for each other on a busy machine.
                env=environment() | own | {"OMP_NUM_THREADS": "1"},
                process_group=0,
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def fired(self) -> int:
        """How often what was planned has happened."""
        file = self._control / "fired"
        return file.stat().st_size if file.exists() else 0

    @property
    def hears_sigterm(self) -> bool:
        """Whether it has come so far as to handle that signal itself."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    def signal(self, number: signal.Signals) -> None:
        """Send it to every process of the daemon, or do nothing if none is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing running, whatever went wrong here."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> int:
        """Wait until every process has ended; gives the exit code."""
        try:
            code = self.process.wait(stretched(self._longest))
        finally:
            self.signal(signal.SIGKILL)  # at the latest now
        deadline = time.monotonic() + stretched(20)
        while _group_lives(self.process.pid):
            assert time.monotonic() < deadline, "a process of the daemon outlives it"
            time.sleep(0.01)
        return code

    @property
    def last_point(self) -> str:
        """Name the point it was killed at."""
        return (self._control / "points").read_text().splitlines()[-1].split(" ", 2)[2]

    def points(self) -> Counter[str]:
        """Count the points it has reached, by label."""
        lines = (self._control / "points").read_text().splitlines()
        return Counter(line.split(" ", 2)[2] for line in lines if line.count(" ") >= 2)


def _group_lives(group: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                return True
    return False


@dataclass(frozen=True)
class Baseline:
    """What an undisturbed daemon makes of the queue, and the points it passes."""

    expected: dict[str, str]  # file -> SHA-256; without the records, which tell the time
    points: Counter[str]
    seconds: float


def undisturbed(folders: Folders) -> Baseline:
    """Run the queue without any harm."""
    folders.prepare()
    for name in folders.jobs:
        drop(folders, name)
    began = time.monotonic()
    with Life(folders) as life:
        assert life.end() == 1, life.log.read_text()  # one of the jobs fails
    expected = expected_of(folders)
    outcome = examine(folders, expected)
    assert outcome.clean, outcome
    assert outcome.repeated == 0, outcome
    return Baseline(expected, life.points(), time.monotonic() - began)


@dataclass
class Campaign:
    """Kills, and what came of them."""

    folders: Folders
    baseline: Baseline
    rng: random.Random
    disk: Disk | None = None  # cut its power instead of only killing
    tell: Callable[[str], None] = print
    kills: int = 0
    queues: int = 0
    outcome: Outcome = field(default_factory=Outcome)
    seen: Counter[str] = field(default_factory=Counter)  # points that were reached, by label
    killed_at: Counter[str] = field(default_factory=Counter)  # points at which it was killed
    missed: Counter[str] = field(default_factory=Counter)  # points it was to be killed at, and did not pass

    def run(self, kills: int) -> None:
        """Run queue after queue until so many kills are done, and the last queue to its end."""
        while self.kills < kills:
            self.queue(self.plans(kills - self.kills))

    def plans(self, number: int) -> Iterator[Plan]:
        """Think of so many places to kill at: those not yet tried, the first after a start, and any time."""
        for _ in range(number):
            points = self.baseline.points | self.seen
            untried = sorted(
                label for label in points if label not in self.killed_at and self.missed[label] < 3
            )
            way = self.rng.random()
            if self.folders.devices > 1 and way < 0.5:
                whom: Victim = self.rng.choice(("this", "workers"))
                # Not in the first moments of a worker: it would never come to a step.
                yield Plan(labels=IN_WORKERS, occurrence=self.rng.randint(10, 60), whom=(whom,))
            elif untried and way < 0.8:
                phase = self.rng.choice(sorted({label.partition(":")[0] for label in untried}))
                labels = tuple(label for label in untried if label.startswith(f"{phase}:"))
                yield Plan(labels=labels, occurrence=self.rng.choice((1, 1, 2, 3)))
            elif way < 0.9:
                yield Plan(number=self.rng.randint(1, 150))
            else:
                yield Plan(after=self.rng.uniform(0.2, self.baseline.seconds / 2))

    def queue(self, plans: Iterator[Plan]) -> None:
        """Run one queue from the drop to the end, with a plan for each start until there are no more."""
        self.folders.prepare()
        to_drop = list(self.folders.jobs)
        self.rng.shuffle(to_drop)
        second_look = False
        while True:
            plan = next(plans, UNDISTURBED)
            some = len(to_drop) if plan == UNDISTURBED else self.rng.randint(0, len(self.folders.jobs) // 3)
            for name in to_drop[:some]:
                drop(self.folders, name)
            del to_drop[:some]
            if self.disk is not None:
                self.disk.sync()  # what was dropped and is not durable yet is not the daemon's to lose
            killed = self._live(plan, to_drop)
            early = seen_too_early(self.folders, self.baseline.expected)
            self.outcome.other += [f"{wrong} (kill {self.kills}, {plan})" for wrong in early]
            if not killed and not to_drop:
                # Something may have been dropped just after the daemon had looked for the last time.
                if second_look or not unfinished(self.folders):
                    break
                second_look = True
        self.queues += 1
        outcome = examine(self.folders, self.baseline.expected)
        if not outcome.clean:
            self.tell(f"queue {self.queues}: {outcome}")
        self.outcome += outcome

    def _live(self, plan: Plan, to_drop: list[str]) -> bool:
        """Run a daemon until it is killed, or has nothing left to do; say whether it was killed."""
        mode = self.rng.choice((GOINGDOWN_LOGFLUSH, GOINGDOWN_NOLOGFLUSH))
        if self.disk is not None:
            plan = replace(plan, power=str(self.disk.root), power_mode=mode)
        killed = False
        with Life(self.folders, plan) as life:
            began, next_drop = time.monotonic(), self.rng.uniform(0.5, 5)
            while life.alive and not killed:
                lived = time.monotonic() - began
                # A drop that the power interrupts would be nobody's fault.
                if to_drop and lived > next_drop and self.disk is None:
                    drop(self.folders, to_drop.pop())
                    next_drop += self.rng.uniform(0.5, 5)
                if plan.after and lived > plan.after:
                    if self.disk is not None:
                        self.disk.cut_power(mode)
                    life.signal(signal.SIGKILL)
                    killed = True
                longest = stretched(life_seconds(self.folders))
                assert lived < longest, f"the daemon does not end: see {life.log}"
                time.sleep(0.02)
            code = life.end()
        killed = killed or life.fired > 0
        if self.disk is not None and killed:
            self.disk.again()
        self.seen += life.points()
        if killed:
            self._count(life)
            return True
        self.missed.update(plan.labels)
        if code not in (0, 1):
            self.outcome.other.append(f"the daemon ended with {code}")
        return False

    def _count(self, life: Life) -> None:
        self.kills += max(life.fired, 1)
        where = life.last_point if life.fired else "at any time"
        self.killed_at[where] += 1
        self.tell(f"{self.kills:4} {where}")

    @property
    def good(self) -> bool:
        """Whether all is as promised: nothing lost, twice or different, at most one step repeated a kill.

        With a step cache it is one that is computed, and those that were skipped around it: one on each side.
        """
        found, hit = self.outcome, self.kills * self.folders.devices  # so many running jobs
        plain = found.repeated - found.repeated_cached
        return found.clean and plain <= hit and found.repeated_cached <= 3 * hit

    def report(self) -> str:
        """Give the numbers."""
        points = self.seen | self.baseline.points
        untried = sorted(points.keys() - self.killed_at.keys())
        by_phase: Counter[str] = Counter()
        for label, number in self.killed_at.items():
            by_phase[label.partition(":")[0]] += number
        found = self.outcome
        return "\n".join(
            (
                f"kills: {self.kills}, queues: {self.queues}, jobs: {found.jobs}",
                f"jobs lost: {len(found.lost)}",
                f"jobs duplicated: {len(found.duplicated)}",
                f"files that differ: {len(found.differing)}",
                f"steps repeated: {found.repeated} (with a step cache: {found.repeated_cached})",
                f"other faults: {len(found.other)}",
                f"points: {len(points)}, of them killed at: {len(points) - len(untried)}",
                f"by phase: {', '.join(f'{phase} {number}' for phase, number in by_phase.most_common())}",
                *(f"never killed at: {label}" for label in untried),
                *(f"! {text}" for text in (*found.lost, *found.duplicated, *found.differing, *found.other)),
            )
        )
