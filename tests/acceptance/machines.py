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
PORT = 6379
OPENSSL = """
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 \
    -subj /CN=framepackd -keyout ca.key -out ca.crt
openssl rand -hex 32 > token
"""
CERTIFICATE = """
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN={name} \
    -keyout {name}.key -out {name}.csr
printf 'subjectAltName=IP:{address}' > {name}.ext
openssl x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -extfile {name}.ext \
    -out {name}.crt
"""


class Machine:
    """One machine, which lives until it is killed; the first one is the others' switch."""

    def __init__(self, name: str, number: int, switch: "Machine | None" = None) -> None:
        self.name, self.number, self.address = name, number, f"{NETWORK}.{number}"
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

    def cable(self, *, plugged: bool) -> None:
        """Pull its network cable, or plug it in again."""
        self._ip(f"link set cable {'up' if plugged else 'down'}")

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


class Cluster:
    """A front, whose daemon has no card of its own, and machines that lend their processors as cards."""

    def __init__(self, root: Path, front: Machine, *nodes: Machine, models: str = "") -> None:
        self.root, self.front, self.nodes = root, front, {node.name: node for node in nodes}
        self._models = models  # tables of the configuration that all machines have
        self._shell(OPENSSL)
        (root / "token").chmod(0o600)
        for machine in (front, *nodes):
            self._shell(CERTIFICATE.format(name=machine.name, address=machine.address))
            (root / f"{machine.name}.key").chmod(0o600)
            self.start(machine)

    @property
    def socket(self) -> Path:
        return self.root / "front/bridges.sock"

    def start(self, machine: Machine) -> None:
        """Run framepackd node there."""
        name, config = machine.name, self.root / f"{machine.name}.toml"
        config.write_text(
            f'state_dir = "{self.root}/{name}/state"\n[cluster]\naddress = "{self.front.address}:{PORT}"\n'
            f'socket = "{self.root}/{name}/bridges.sock"\ntoken_file = "token"\n'
            f'tls_cert = "{name}.crt"\ntls_key = "{name}.key"\ntls_ca = "ca.crt"\n{self._models}'
        )
        lends = [] if machine is self.front else ["--cpu"]
        words = framepackd("node", "--config", str(config), *lends)
        machine.start(*words, log=self.root / f"{name}.log", OMP_NUM_THREADS="1")

    def boot(self, name: str) -> None:
        """Start a machine that was killed, and framepackd node there."""
        self.nodes[name] = Machine(name, self.nodes[name].number, self.front)
        self.start(self.nodes[name])

    def end(self) -> None:
        """Kill all machines that it has now."""
        for machine in (*self.nodes.values(), self.front):
            if machine.holder.poll() is None:
                machine.thaw()
                machine.kill()

    def logs(self) -> str:
        return "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in self.root.glob("*.log"))

    def _shell(self, commands: str) -> None:
        subprocess.run(["sh", "-ec", commands], cwd=self.root, check=True, capture_output=True)


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
