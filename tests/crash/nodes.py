"""Harms a cluster again and again over a mixed queue: its machines, its processes, its network, its front."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.acceptance.conftest import TINY, environment
from tests.acceptance.machines import Cluster, Machine, machines
from tests.crash.harness import Baseline, stretched
from tests.crash.jobs import MODELS, Folders, Outcome, drop, examine, seen_too_early, unfinished

NODES = ("render2", "render3", "render4")
QUEUE_SECONDS = 900.0  # in which a queue ends at the latest once nothing is harmed any more
BETWEEN = (2.0, 15.0)  # seconds from one harm to the next
AWAY = (3.0, 25.0)  # seconds that a machine is frozen, cut off or dead: a part of them is lost, a part is not


@contextmanager
def cluster_of(models: str) -> Iterator[Cluster]:
    """Have a front and three machines that lend their processors."""
    with (
        tempfile.TemporaryDirectory(prefix="fpd", dir="/tmp") as root,
        machines("front", *NODES) as (front, *nodes),
    ):
        cluster = Cluster(Path(root), front, *nodes, models=models)
        try:
            yield cluster
        finally:
            cluster.end()


class Front:
    """The daemon, which has no card of its own."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self.log = folders.own / "daemon.log"
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "framepackd", "run", "--config", str(self._folders.config)]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, env=environment() | {"OMP_NUM_THREADS": "1"}
            )

    def again(self) -> None:
        """Kill it, and start it again."""
        self.process.kill()
        self.process.wait()
        self.process = self._started()

    def bridges(self) -> list[int]:
        """List its processes that each reach a card."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [pid for pid in map(int, children) if "spawn_main" in _command(pid)]

    def end(self) -> int:
        """Tell it to stop; gives its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@dataclass
class Harmed:
    """A campaign against a cluster, and what came of it."""

    cluster: Cluster
    folders: Folders
    baseline: Baseline
    rng: random.Random
    tell: Callable[[str], None] = print
    harms: Counter[str] = field(default_factory=Counter)
    restarts: int = 0  # of the daemon
    queues: int = 0
    outcome: Outcome = field(default_factory=Outcome)
    front: Front | None = None
    mends: list[tuple[float, Callable[[], None]]] = field(default_factory=list)  # due on the monotonic clock
    away: set[str] = field(default_factory=set)  # machines that are frozen, cut off or dead

    def run(self, harms: int) -> None:
        """Run queue after queue until so many harms are done, and the last queue to its end."""
        while self.harms.total() < harms:
            self.queue(harms)

    def queue(self, harms: int) -> None:
        """Run one queue from the drop to the end, harmed meanwhile."""
        self.folders.prepare()
        self._write_config()
        to_drop = list(self.folders.jobs)
        self.rng.shuffle(to_drop)
        self.front = Front(self.folders)
        try:
            self._harm_and_wait(to_drop, harms)
        finally:
            code = self.front.end()
            while self.mends:
                self.mends.pop()[1]()
        if code:
            self.outcome.other.append(f"the daemon ended with {code}")
        self.queues += 1
        outcome = examine(replace(self.folders, devices=len(NODES)), self.baseline.expected)
        if not outcome.clean:
            self.tell(f"queue {self.queues}: {outcome}")
        self.outcome += outcome

    def _write_config(self) -> None:
        names = {"inbox": self.folders.inbox, "outbox": self.folders.outbox, "failed": self.folders.failed}
        lines = "".join(f'{name} = "{folder}"\n' for name, folder in names.items())
        self.folders.config.write_text(
            f'{lines}state_dir = "{self.folders.state}"\nsettle_seconds = 0.1\nmax_attempts = 100\n{TINY}'
            f"keep_latents = true\n{MODELS}[gpu]\ndevice = []\n"
            f'[cluster]\nnodes = "all"\nsocket = "{self.cluster.socket}"\n'
        )

    def _harm_and_wait(self, to_drop: list[str], harms: int) -> None:
        next_harm = time.monotonic() + self.rng.uniform(*BETWEEN)
        until: float | None = None
        while to_drop or not self._is_done():
            now = time.monotonic()
            if to_drop:
                drop(self.folders, to_drop.pop())
            for due, mend in [each for each in self.mends if each[0] <= now]:
                self.mends.remove((due, mend))
                mend()
            if now >= next_harm and self.harms.total() < harms:
                name, do = self._chosen()
                if do():
                    self.harms[name] += 1
                    self.tell(f"{self.harms.total():4} {name}")
                next_harm = time.monotonic() + self.rng.uniform(*BETWEEN)
            with contextlib.suppress(FileNotFoundError):  # a part that got its name while we looked
                early = seen_too_early(self.folders, self.baseline.expected)
                self.outcome.other += [f"{wrong} (harm {self.harms.total()})" for wrong in early]
            if self.harms.total() >= harms:
                until = until or now + stretched(QUEUE_SECONDS)
                assert now < until, f"the queue does not end: see {self.folders.own}"
            time.sleep(0.1)

    def _is_done(self) -> bool:
        database = self.folders.state / "framepackd.db"
        return database.exists() and not unfinished(self.folders)

    def _chosen(self) -> tuple[str, Callable[[], bool]]:
        there = sorted(self.cluster.nodes.keys() - self.away)
        node = self.cluster.nodes[self.rng.choice(there)]
        ways: dict[str, Callable[[], bool]] = {
            "worker killed": lambda: self._kill(node, "spawn_main"),
            "node's end killed": lambda: self._kill(node, "framepackd.cluster.node"),
            "actor killed": lambda: self._kill(node, "ray::Relay"),
            "raylet killed": lambda: self._kill(node, "raylet/raylet"),
            "bridge killed": self._kill_bridge,
            "link killed": lambda: self._kill(self.cluster.front, "framepackd.cluster.link"),
            "head killed": lambda: self._kill(self.cluster.front, "gcs_server"),
            "framepackd node of the front killed": self._kill_door,
            "daemon killed": self._kill_daemon,
        }
        if len(there) > 1:  # one machine is always there
            ways |= {
                "machine frozen": lambda: self._freeze(node),
                "machine cut off": lambda: self._cut_off(node),
                "machine killed": lambda: self._kill_machine(node),
            }
        name = self.rng.choice(sorted(ways))
        return name, ways[name]

    def _kill(self, machine: Machine, words: str) -> bool:
        found = machine.find(words)
        if found:
            _kill(self.rng.choice(found))
        return bool(found)

    def _kill_bridge(self) -> bool:
        assert self.front is not None
        found = self.front.bridges()
        if found:
            _kill(self.rng.choice(found))
        return bool(found)

    def _kill_door(self) -> bool:
        self._kill(self.cluster.front, "framepackd node")
        self.cluster.start(self.cluster.front)
        return True

    def _kill_daemon(self) -> bool:
        assert self.front is not None
        self.front.again()
        self.restarts += 1
        return True

    def _freeze(self, node: Machine) -> bool:
        node.freeze()
        self._away_for_a_while(node, node.thaw)
        return True

    def _cut_off(self, node: Machine) -> bool:
        node.cable(plugged=False)
        self._away_for_a_while(node, lambda: node.cable(plugged=True))
        return True

    def _kill_machine(self, node: Machine) -> bool:
        node.kill()
        self._away_for_a_while(node, lambda: self.cluster.boot(node.name))
        return True

    def _away_for_a_while(self, node: Machine, back: Callable[[], None]) -> None:
        self.away.add(node.name)

        def mend() -> None:
            back()
            self.away.discard(node.name)

        self.mends.append((time.monotonic() + self.rng.uniform(*AWAY), mend))

    @property
    def good(self) -> bool:
        """Whether all is as promised: nothing lost, twice or different, one durable step again for a harm.

        What harms the front or the head hits the jobs of all cards. With a step cache it is one step that is
        computed, and those that were skipped around it.
        """
        found, hit = self.outcome, self.harms.total() * len(NODES)
        plain = found.repeated - found.repeated_cached
        return found.clean and plain <= hit and found.repeated_cached <= 3 * hit

    def report(self) -> str:
        """Give the numbers."""
        found = self.outcome
        return "\n".join(
            (
                f"harms: {self.harms.total()}, queues: {self.queues}, jobs: {found.jobs}",
                ", ".join(f"{name} {number}" for name, number in self.harms.most_common()),
                f"jobs lost: {len(found.lost)}",
                f"jobs duplicated: {len(found.duplicated)}",
                f"files that differ: {len(found.differing)}",
                f"steps repeated: {found.repeated} (with a step cache: {found.repeated_cached})",
                f"other faults: {len(found.other)}",
                *(f"! {text}" for text in (*found.lost, *found.duplicated, *found.differing, *found.other)),
            )
        )


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
