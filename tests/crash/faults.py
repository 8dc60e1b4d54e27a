"""Harm that leaves the daemon alive: a full, failing or read-only disk, signals, a clock that jumps."""

import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.crash.disk import Disk
from tests.crash.harness import LIFE_SECONDS, Baseline, Life, stretched
from tests.crash.jobs import Folders, Outcome, drop, examine, seen_too_early, unfinished
from tests.crash.victim import Plan

HANG_SECONDS = 10.0  # configured for all of these
STOPPED_SECONDS = 15.0
REPAIRED_SECONDS = 3.0  # after which somebody comes and mends the disk
GIVEN_UP_SECONDS = 5.0  # after which they kill what does not end


@dataclass
class Trial:
    """One queue under harm, and what came of it."""

    folders: Folders
    baseline: Baseline
    rng: random.Random
    disk: Disk | None = None
    restarts: int = 0
    hang_seconds: float = HANG_SECONDS  # as configured

    def run(self, harms: Sequence[Callable[["Trial", Life], Life]]) -> Outcome:
        """Do one harm after the other while the queue runs; a daemon that ends is started again."""
        self.hang_seconds = stretched(HANG_SECONDS)
        self.folders.prepare(f"hang_seconds = {self.hang_seconds}\n")
        for name in self.folders.jobs:
            drop(self.folders, name)
        if self.disk is not None:
            self.disk.sync()  # what was dropped and is not durable yet is not the daemon's to lose
        early: list[str] = []
        life, to_come = Life(self.folders), list(harms)
        pause = self.baseline.seconds / (len(harms) + 2)
        next_harm = time.monotonic() + self.rng.uniform(0.2, 1) * pause
        began = time.monotonic()
        while True:
            limit = stretched(LIFE_SECONDS + 2 * STOPPED_SECONDS * len(harms))
            assert time.monotonic() - began < limit, f"the queue does not end: see {life.log}"
            if not life.alive:
                life.end()
                if not unfinished(self.folders):
                    break
                life = self.again()
            if to_come and time.monotonic() > next_harm:
                life = to_come.pop(0)(self, life)
                early += seen_too_early(self.folders, self.baseline.expected)
                next_harm = time.monotonic() + self.rng.uniform(0.2, 1) * pause
            time.sleep(0.02)
        outcome = examine(self.folders, self.baseline.expected)
        outcome.other += early
        if to_come:
            outcome.other.append(f"the queue was done before {len(to_come)} of the faults")
        return outcome

    def again(self) -> Life:
        """Start the daemon once more."""
        self.restarts += 1
        return Life(self.folders)

    @property
    def own_disk(self) -> Disk:
        """Give the disk, for harm that needs one."""
        assert self.disk is not None
        return self.disk


def fill_the_disk(trial: Trial, life: Life) -> Life:
    """Leave no free block for a while; a daemon that ends over it is started again, and again."""
    ballast = trial.own_disk.fill()
    mended = time.monotonic() + REPAIRED_SECONDS
    while time.monotonic() < mended:
        if not life.alive:
            life.end()
            life = trial.again()
        time.sleep(0.2)
    ballast.unlink()
    return life


def _replace_the_disk(trial: Trial, life: Life) -> Life:
    """Wait a while, end the daemon if it has not, repair and mount the disk, start it again."""
    time.sleep(REPAIRED_SECONDS)
    life.signal(signal.SIGTERM)
    given_up = time.monotonic() + GIVEN_UP_SECONDS
    while life.alive and time.monotonic() < given_up:
        time.sleep(0.05)
    life.signal(signal.SIGKILL)
    life.end()
    trial.own_disk.again()
    return trial.again()


def fail_the_disk(trial: Trial, life: Life) -> Life:
    """Have every access end in EIO, as a cable that comes loose."""
    trial.own_disk.cut_power()
    return _replace_the_disk(trial, life)


def turn_read_only(trial: Trial, life: Life) -> Life:
    """Have every write end in EROFS, as ext4 does after an error."""
    trial.own_disk.turn_read_only()
    return _replace_the_disk(trial, life)


def terminate(trial: Trial, life: Life) -> Life:
    """Stop it as systemd does: every process gets the signal, and the exit code has to be 0."""
    while life.alive and not life.hears_sigterm:
        time.sleep(0.01)
    life.signal(signal.SIGTERM)
    code = life.end()
    assert code in (0, 1), code  # 1: it had just finished, and one of the jobs fails
    return trial.again()


def suspend(trial: Trial, life: Life) -> Life:
    """Stop the clocks of all its processes for longer than a worker may be silent."""
    life.signal(signal.SIGSTOP)
    time.sleep(trial.hang_seconds + STOPPED_SECONDS - HANG_SECONDS)
    life.signal(signal.SIGCONT)
    return life


def jump(trial: Trial, life: Life) -> Life:
    """Start it anew with a clock that jumps ten years ahead or back after a while."""
    life.signal(signal.SIGTERM)
    life.end()
    years = trial.rng.choice((-10.0, 10.0))
    trial.restarts += 1
    return Life(trial.folders, Plan(number=trial.rng.randint(5, 150), jump_years=years))


def hang_the_outbox(trial: Trial, life: Life) -> Life:
    """Have the targets' disk not answer, kill the daemon under it, and start the next before it answers."""
    with trial.own_disk.frozen():
        time.sleep(REPAIRED_SECONDS)
        life.signal(signal.SIGKILL)
        following = trial.again()  # which waits for the one that cannot end
        time.sleep(REPAIRED_SECONDS)
    life.end()
    return following


def unmount_the_outbox(trial: Trial, life: Life) -> Life:
    """Take the targets' disk away for a while; nothing may be put into the folder underneath."""
    disk = trial.own_disk
    disk.unmount()  # a delivery that is just under way ends first
    time.sleep(REPAIRED_SECONDS)
    assert not list(disk.root.iterdir()), "something was put where the disk is mounted"
    disk.mount()
    if not life.alive:  # --once does not wait for better times
        life.end()
        return trial.again()
    return life


def plant_foreign_entries(trial: Trial, life: Life) -> Life:
    """Put what is not framepackd's beside the work folders and into the inbox, and start the daemon anew."""
    jobs, inbox = trial.folders.state / "jobs", trial.folders.inbox
    holiday, link, file = jobs / "0-holiday", jobs / "0-link", jobs / "0-file"
    forgotten = inbox / ".framepackd-20200101-000000-abcdef-old.png.part"
    recycled = inbox / "#recycle" / "old.png"
    for path in (holiday / "beach.png", recycled, forgotten, file):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"somebody's")
    link.symlink_to(holiday)
    life.signal(signal.SIGKILL)
    life.end()
    life = trial.again()
    time.sleep(stretched(REPAIRED_SECONDS))
    for path in (holiday / "beach.png", recycled, forgotten, file):
        assert path.read_bytes() == b"somebody's", f"{path} was touched"
    assert link.is_symlink()
    for path in (link, file, forgotten):
        path.unlink()
    shutil.rmtree(holiday)
    shutil.rmtree(recycled.parent)
    return life


HARMS: dict[str, Callable[[Trial, Life], Life]] = {
    "full-disk": fill_the_disk,
    "failing-disk": fail_the_disk,
    "read-only-disk": turn_read_only,
    "terminate": terminate,
    "suspend": suspend,
    "clock": jump,
    "hung-outbox": hang_the_outbox,
    "unmounted-outbox": unmount_the_outbox,
    "foreign-entries": plant_foreign_entries,
}
ON_A_DISK = ("full-disk", "failing-disk", "read-only-disk")  # of its own
TARGETS_ON_A_DISK = ("hung-outbox", "unmounted-outbox")  # outbox and failed folder alone
