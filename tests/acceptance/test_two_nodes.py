"""A daemon without a card and two other machines, by real Ray: whatever is harmed, the job goes on elsewhere.

The machines are namespaces, with a network of their own: nothing listens beyond it.
"""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from framepackd.text import printable_json
from tests.acceptance.conftest import Daemon, MakeDaemon
from tests.acceptance.machines import Cluster, Machine, machines

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the namespaces of machines need root")

# Seconds from a harm until a step is done elsewhere, no model load counted; where the daemon or the head
# starts again, until the job runs again. A busy machine takes several times as long as a quiet one.
BARS = {"actor": 2.0, "frozen": 20.0, "killed": 5.0, "front": 5.0, "head": 30.0}
SLACK = 8.0  # for a machine that is busy with other tests; the line that is printed says how long it took
SETTINGS: dict[str, Any] = {"seconds": 120, "steps": 100}  # 30000 steps: more than the harms leave time for


class Watched:
    """One job, as status shows it."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self._daemon, self._name = daemon, name

    @property
    def now(self) -> dict[str, Any]:
        jobs = [job for job in self._daemon.status()["jobs"] if job["name"] == self._name]
        return jobs[0] if jobs else {}

    @property
    def steps(self) -> int:
        job = self.now
        return (job["section"] - 1) * job["steps"] + job["step"] if job.get("state") == "running" else -1

    @property
    def machine(self) -> str:
        return str(self.now.get("device", "")).partition(":")[0]

    def until(self, true: Callable[[], bool], what: str, seconds: float = 90) -> float:
        """Wait for something; give the seconds that it took."""
        begun = time.monotonic()
        while not true():
            log = self._daemon.log.read_text()[-3000:]
            assert time.monotonic() < begun + seconds, f"waited {seconds} s for {what}: {self.now}\n{log}"
            time.sleep(0.02)
        return time.monotonic() - begun


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    root = Path(tempfile.mkdtemp(prefix="fpd", dir="/tmp"))  # short: Ray's sockets lie deep below it
    try:
        with machines("front", "render2", "render3") as (front, *nodes):
            made = Cluster(root, front, *nodes)
            yield made
    finally:
        print(made.logs())
        shutil.rmtree(root)


def test_a_job_goes_on_when_a_machine_freezes_when_one_dies_and_when_the_front_dies(
    cluster: Cluster, make_daemon: MakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    night = Night(cluster, make_daemon)
    night.harm("frozen", Machine.freeze).thaw()
    night.harm("killed", Machine.kill)
    night.kill_front()
    night.check(capsys, attempts=0)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_job_goes_on_whatever_is_harmed(
    cluster: Cluster, make_daemon: MakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    night = Night(cluster, make_daemon)
    for _ in range(2):
        night.warm_the_other()
        night.harm("actor", kill_actors)
    night.warm_the_other()
    night.harm("frozen", Machine.freeze).thaw()
    night.warm_the_other()
    night.harm("killed", Machine.kill)
    night.kill_front()
    night.kill_head()
    night.check(capsys, attempts=1)


def kill_actors(machine: Machine) -> None:
    for process in machine.find("ray::Relay"):
        os.kill(process, signal.SIGKILL)


class Night:
    """A long job on one of two machines, and how long it takes until it goes on after each harm."""

    def __init__(self, cluster: Cluster, make_daemon: MakeDaemon) -> None:
        self._cluster = cluster
        tables = f'[gpu]\ndevice = []\n[cluster]\nnodes = "all"\nsocket = "{cluster.socket}"\n'
        self._daemon = make_daemon(models=tables)
        self._took: dict[str, list[float]] = {}
        self._job = Watched(self._daemon, "long")
        self._daemon.start()
        begun = time.monotonic()
        self._daemon.until(lambda: idle(self._daemon) == {"render2", "render3"}, "both machines to greet")
        self._note("start", begun)
        self._daemon.drop("long", **SETTINGS)
        self._job.until(lambda: self._job.steps >= 3, "the job to run")

    def warm_the_other(self) -> None:
        """Have the machine that is free make a small video, so that the model is loaded there."""
        name = f"small-{time.monotonic_ns()}"
        self._daemon.until(lambda: bool(idle(self._daemon)), "the other machine to greet")
        self._daemon.drop(name, steps=2, seconds=1)
        small = Watched(self._daemon, name)
        small.until(lambda: small.now.get("state") == "done", "the small job")
        self._daemon.until(lambda: bool(idle(self._daemon)), "the other machine to be free")

    def harm(self, what: str, do: Callable[[Machine], None]) -> Machine:
        """Harm the machine that computes the job, and wait until another one has done a step more."""
        self._daemon.until(lambda: bool(idle(self._daemon)), "the other machine to greet")
        job, harmed = self._job, self._cluster.nodes[self._job.machine]
        begun = time.monotonic()
        do(harmed)
        before = job.steps
        job.until(lambda: job.machine not in ("", harmed.name) and job.steps > before, "a step elsewhere")
        self._note(what, begun)
        return harmed

    def kill_front(self) -> None:
        """Kill the daemon and start it again."""
        self._daemon.stop(signal.SIGKILL)
        begun = time.monotonic()
        self._daemon.start()
        self._job.until(lambda: bool(at_work(self._daemon)), "the job to run again")
        self._note("front", begun)
        self._go_on()

    def kill_head(self) -> None:
        """Kill the process that all machines of Ray meet at; framepackd node starts it again."""
        for process in self._cluster.front.find("gcs_server"):
            os.kill(process, signal.SIGKILL)
        begun = time.monotonic()
        self._job.until(lambda: not at_work(self._daemon), "the loss of the head")
        self._job.until(lambda: bool(at_work(self._daemon)), "the job to run again")
        self._note("head", begun)
        self._go_on()

    def check(self, capsys: pytest.CaptureFixture[str], attempts: int) -> None:
        """Print how long all took; ``attempts``: how many the job may have lost."""
        took = {what: min(seconds) for what, seconds in self._took.items()}
        with capsys.disabled():
            print("\ntwo machines: " + ", ".join(f"{what} {seconds:.1f} s" for what, seconds in took.items()))
        assert not {what: took[what] for what in took if took[what] > BARS.get(what, 60.0) * SLACK}
        assert self._job.now["attempts"] <= attempts, printable_json(self._job.now)

    def _go_on(self) -> None:
        self._job.until(lambda: self._job.steps > 0, "a step")
        before = self._job.steps
        self._job.until(lambda: self._job.steps > before, "the job to go on")

    def _note(self, what: str, begun: float) -> None:
        self._took.setdefault(what, []).append(time.monotonic() - begun)


def idle(daemon: Daemon) -> set[str]:
    """Name the machines that can begin a job now."""
    devices = daemon.status()["daemon"].get("devices", [])
    return {
        card["name"].partition(":")[0]
        for card in devices
        if card["card"] and not card["held"] and not card["job"]
    }


def at_work(daemon: Daemon) -> set[str]:
    devices = daemon.status()["daemon"].get("devices", [])
    return {card["name"].partition(":")[0] for card in devices if card["job"] is not None}
