"""Machines that are namespaces of this one: network, processes and host name of their own, nothing beyond."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NETWORK = "10.77.0"


class Machine:
    """One machine, which lives until it is killed; the first one is the others' switch."""

    def __init__(self, name: str, number: int, switch: "Machine | None" = None) -> None:
        self.name, self.address = name, f"{NETWORK}.{number}"
        alone = ["--net", "--pid", "--uts", "--mount", "--fork", "--mount-proc", "--kill-child"]
        begin = f"hostname {name}; ip link set lo up; exec sleep infinity"
        with_us = ["setpriv", "--pdeathsig", "KILL"]  # the namespaces end with the tests, however those end
        self.holder = subprocess.Popen([*with_us, "unshare", *alone, "sh", "-c", begin])
        self.first = self._child_of_holder()
        self.started: list[subprocess.Popen[bytes]] = []
        if switch is None:
            self._ip("link add bridge type bridge")
            self._ip(f"addr add {self.address}/24 dev bridge")
            self._ip("link set bridge up")
        else:
            switch._ip(f"link add port{number} type veth peer name cable netns {self.first}")
            switch._ip(f"link set port{number} master bridge up")
            self._ip(f"addr add {self.address}/24 dev cable")
            self._ip("link set cable up")

    def start(self, *words: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        inside = ["nsenter", "--target", str(self.first), "--net", "--pid", "--uts", "--mount", "--"]
        with log.open("ab") as end:
            started = subprocess.Popen(
                [*inside, *words], stdout=end, stderr=end, env={**os.environ, **environment}
            )
        self.started.append(started)
        return started

    def processes(self) -> list[int]:
        """List the processes in it, the first one too."""
        space, names = _space(self.first), (path.name for path in Path("/proc").iterdir())
        return [pid for pid in map(int, filter(str.isdigit, names)) if _space(pid) == space]

    def find(self, words: str) -> list[int]:
        """List the processes in it whose command line holds the words."""
        return [pid for pid in self.processes() if words in _command(pid)]

    def freeze(self) -> None:
        """Stop all that runs in it, as a machine that hangs."""
        stopped: set[int] = set()
        while running := set(self.processes()) - stopped:
            for pid in running:
                _signal(pid, signal.SIGSTOP)
            stopped |= running

    def thaw(self) -> None:
        for pid in self.processes():
            _signal(pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill all that runs in it, at once."""
        _signal(self.first, signal.SIGKILL)
        for process in (*self.started, self.holder):
            process.kill()  # nsenter stops itself when what it started is stopped, and would stay so
            process.wait()

    def _ip(self, words: str) -> None:
        inside = ["nsenter", "--target", str(self.first), "--net", "--", "ip"]
        subprocess.run([*inside, *words.split()], check=True)

    def _child_of_holder(self) -> int:
        until = time.monotonic() + 10
        while time.monotonic() < until:
            children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()
            if children and "sleep" in _command(int(children[0])):
                return int(children[0])
            time.sleep(0.01)
        raise AssertionError("the namespaces did not come to be")


@contextmanager
def machines(*names: str) -> Iterator[list[Machine]]:
    """Have machines in one network of their own; all that runs in them ends with them."""
    made: list[Machine] = []
    try:
        for number, name in enumerate(names, 1):
            made.append(Machine(name, number, made[0] if made else None))
        yield made
    finally:
        for machine in made:
            if machine.holder.poll() is None:
                machine.thaw()
                machine.kill()


def framepackd(*words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "framepackd", *words]


def _space(pid: int) -> int:
    try:
        return Path(f"/proc/{pid}/ns/pid").stat().st_ino
    except OSError:
        return 0


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
